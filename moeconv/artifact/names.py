"""The names of an output's files, and of those allowed next to them: ours, and what people add.

Below verify and push: structure accepts these files, and push sends no others.
"""

from pathlib import Path

from moeconv.hf.tokenizer import TOKENIZER_FILES

_CONFIGS = ("config.json", "generation_config.json", "model.safetensors.index.json")
# Of an adapter for PEFT.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
CARD_NAME = "README.md"
LOSS_PLOT = "training_loss.png"
# What people add.
LEGAL = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
VERDICT = (
    "verify.json",
    "verify.md",
    "verify_kl_by_position.png",
    "verify_error_by_layer.png",
    "verify_logits.png",
)
# A folder of a verify that is writing its report, or that was killed meanwhile.
WRITING = ".moeconv-verify-"
# What push takes from the disk.
ALLOWED = (CARD_NAME, *VERDICT, *LEGAL)
# What it makes on the way, and what the Hub and a download from it leave in a folder.
KNOWN = (*ALLOWED, LOSS_PLOT, ".gitattributes", ".cache")


def is_leftover(path: Path) -> bool:
    """Returns True for the folder of a report that verify was killed while writing."""
    return path.name.startswith(WRITING) and path.is_dir() and not path.is_symlink()


def is_output_name(name: str) -> bool:
    """Returns True if convert writes files of this name: no path, no code, nothing unknown.

    A manifest that names anything else was not written by it.
    """
    if name in (*_CONFIGS, *_ADAPTER) or name in TOKENIZER_FILES:
        return True
    weights = name.startswith("model") and name.endswith(".safetensors") and len(name) <= 255
    return weights and name.isascii() and name.replace("-", "").replace(".", "").isalnum()
