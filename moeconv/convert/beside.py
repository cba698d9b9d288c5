"""What may lie beside the files of the manifest: what verify and push write, and what people add.

Below both of them: structure takes none of these for a stranger, and push sends nothing else.
"""

from pathlib import Path

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
    """Whether verify made a folder to write its report into; one that was killed left it."""
    return path.name.startswith(WRITING) and path.is_dir() and not path.is_symlink()
