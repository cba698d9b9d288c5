"""Several tokens that end a text, and a tokenizer's own generation_config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import synthetic
from cli_runner import moeconv
from tokenizer_lab import refused
from transformers import AutoConfig, GenerationConfig

from moeconv.artifact.manifest import MANIFEST_NAME, Manifest
from moeconv.errors import ConfigError, TokenizerError
from moeconv.hf.tokenizer import check_fits, read_tokenizer

# As Llama 3.1's, with what nobody should take over from a stranger's file.
OWN: dict[str, Any] = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "pad_token_id": None,
    "assistant_confidence_threshold": 0.4,
    "transformers_version": "4.43.0",
}


def tell(saved: Path, **fields: Any) -> None:
    (saved / "generation_config.json").write_text(json.dumps(fields))


def test_it_is_taken_over(saved: Path) -> None:
    tell(saved, **OWN)
    tokenizer = read_tokenizer(str(saved), model_max_length=None)
    assert "generation_config.json" not in tokenizer.files  # convert writes it
    assert tokenizer.eos_token_id == 1
    assert tokenizer.token_ids() == {"bos_token_id": 0, "eos_token_id": (1, 2)}
    assert tokenizer.generation["temperature"] == 0.6
    assert "not taken over" in tokenizer.notes[-1]
    assert tokenizer.notes[-1].endswith("sampling: assistant_confidence_threshold")
    assert check_fits(tokenizer, 268) == []
    tell(saved, eos_token_id=[1, 300])
    with pytest.raises(TokenizerError, match="eos_token_id 300 has no row in the model"):
        check_fits(read_tokenizer(str(saved), model_max_length=None), 268)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", []),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", -1),
        ("eos_token_id", True),
        ("bos_token_id", [1]),
        ("temperature", "hot"),
        ("temperature", True),
        ("do_sample", 1),
    ],
)
def test_what_transformers_could_not_use(saved: Path, field: str, value: object) -> None:
    tell(saved, **{field: value})
    assert f"generation_config.json: {field} is" in refused(saved)


def test_a_list_is_converted(saved: Path, tmp_path: Path) -> None:
    made = synthetic.write(tmp_path / "run", "mixtral", sizes={"V": 268})
    tell(saved, **OWN)
    options = ("--config", made.config_file(), "--tokenizer", saved)
    for more, ids in (((), [1, 2]), (("--set", "eos_token_id=[2,1]"), [2, 1])):
        out = tmp_path / f"out{len(more)}"
        ran = moeconv("convert", made.run, out, *options, *more)
        assert ran.code == 0, ran.error
        written = GenerationConfig.from_pretrained(out)
        assert (written.eos_token_id, written.do_sample, written.top_p) == (ids, True, 0.9)
        assert AutoConfig.from_pretrained(out).eos_token_id == ids
        manifest = Manifest.model_validate_json((out / MANIFEST_NAME).read_text())
        assert manifest.model["eos_token_id"].value == ids
        verified = moeconv("verify", out, "--level", "structure")
        assert verified.code == 0, verified.error


@pytest.mark.parametrize("value", ["[]", "[1,99]", "[1,-1]", "[1,1.5]"])
def test_a_list_must_hold_rows(value: str, tmp_path: Path) -> None:
    made = synthetic.write(tmp_path / "run", "mixtral")
    options = ("--config", made.config_file(), "--set", f"eos_token_id={value}")
    ran = moeconv("convert", made.run, tmp_path / "out", *options)
    assert ran.code == ConfigError.exit_code
    assert "is no row of the embedding" in ran.error
