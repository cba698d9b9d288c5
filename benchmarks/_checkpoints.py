"""What is measured with, made at run time, in a process of its own: it needs jax and much memory.

python _checkpoints.py maxtext RUN_DIR SPEC   a checkpoint, and beside it config.yml, its config
python _checkpoints.py streamed RUN_DIR SPEC  the same of one layer larger than memory
python _checkpoints.py tokenizer FOLDER       a tokenizer

MaxText builds the model and saves it (tests/maxtext_lab.py). The weights are random, which
compresses as little as trained ones do.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"


def maxtext(run_dir: Path, spec: dict[str, Any]) -> None:
    """SPEC is JSON: `overrides` (MaxText keys over the lab's base) and `full_state`."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    sys.path.insert(0, str(TESTS))
    import yaml
    from maxtext_lab import write_checkpoint

    made = write_checkpoint(run_dir, spec["overrides"], full_state=spec["full_state"], step=1)
    (run_dir / "config.yml").write_text(yaml.safe_dump(dict(made.config)))


def tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes: it costs neither contender anything to load."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<s>", "</s>"]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    folder.mkdir(parents=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    if sys.argv[1] == "maxtext":
        maxtext(Path(sys.argv[2]), json.loads(sys.argv[3]))
    elif sys.argv[1] == "streamed":
        from _streamed import write

        write(Path(sys.argv[2]), json.loads(sys.argv[3])["overrides"])
    else:
        tokenizer(Path(sys.argv[2]))
