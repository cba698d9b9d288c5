"""What the tests of levels structure and weights share: changing an output."""

import json
from pathlib import Path

import numpy as np

from moeconv.hf.safetensors import read_header
from moeconv.verification.files import sha256

SIZES = {"V": 32, "D": 16, "H": 4, "K": 2, "h": 8, "E": 4, "F": 24}


def edit(out: Path, **changes) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))


def tensor(out: Path, name: str) -> np.ndarray:
    spec, offset = read_header(out / "model.safetensors")[name]
    return np.memmap(out / "model.safetensors", np.float32, "r+", offset=offset, shape=spec.shape)


def scale(out: Path, name: str, factor: float) -> None:
    tensor(out, name)[:] *= np.float32(factor)


def change(out: Path, name: str, by) -> None:
    values = tensor(out, name)
    values[:] = by(values.copy())


def write_tokenizer(folder: Path, words: list[str], *, split="WhitespaceSplit") -> None:
    tokens = ["<s>", "</s>", *words]
    folder.mkdir(exist_ok=True)
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": n, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for n, t in enumerate(tokens[:2])],
        "normalizer": None,
        "pre_tokenizer": {"type": split},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {t: n for n, t in enumerate(tokens)},
                  "unk_token": "w0"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def admit(out: Path, *names: str, **fields) -> None:
    """The manifest is made to agree with files that somebody changed."""
    manifest = json.loads((out / "moeconv_manifest.json").read_text())
    for name in names:
        record = {"size": (out / name).stat().st_size, "sha256": sha256(out / name)}
        manifest["files"][name] = record
    (out / "moeconv_manifest.json").write_text(json.dumps(manifest | fields))


def config(name: str, value):
    return lambda out: edit(out, **{name: value})
