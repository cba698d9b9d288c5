"""What the tests of wrong input share: converting a checkpoint, and looking at a refusal."""

import json
import os
from pathlib import Path

import synthetic
from cli_runner import Ran, moeconv

from moeconv.errors import MoeconvError

CLICK_USAGE = 2


def convert(checkpoint, *flags: object, told: dict | None = None) -> Ran:
    """Converts to `<run>/../out` with the run's YAML."""
    work = checkpoint.run.parent
    config = checkpoint.config_file(work, **(told or {}))
    return moeconv("convert", checkpoint.run, work / "out", "--config", config, *flags)


def refused(ran: Ran, error: type[MoeconvError] | int, *words: str, out: Path | None = None) -> str:
    """Checks a failure: its code, its sentence, and that nothing was written."""
    code = error if isinstance(error, int) else error.exit_code
    sentence = ran.error
    assert ran.code == code, sentence
    for word in words:
        assert word in sentence, sentence
    assert not sentence[0].isupper() or sentence.startswith("OUT ")
    assert ran.out == ""
    if out is not None:
        left = [name for name in os.listdir(out.parent) if out.name in name]
        assert left == []
    return sentence


def out_of(checkpoint) -> Path:
    return checkpoint.run.parent / "out"


WI_0 = "decoder.layers.MoeBlock_0.wi_0"


def changed(tmp_path, change, block="mixtral", **how):
    return synthetic.write(tmp_path / "run", block, change=change, **how)


def tokenizer(folder: Path, size: int, **config: object) -> Path:
    """A tokenizer directory of `size` tokens."""
    folder.mkdir()
    vocab = {f"t{n}": n for n in range(size)}
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocab}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
