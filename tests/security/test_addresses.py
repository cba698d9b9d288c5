"""An address where a place on this machine is meant: refused, and no folder of that name made."""

import pytest
import synthetic
from cli_runner import moeconv

from moeconv.artifact.destination import resolve_out
from moeconv.errors import OutputError, TokenizerError, UsageError

ADDRESSES = (
    "gs://bucket/out", "gs:/bucket/out", "s3://bucket/out", "hf://user/model", "hf:user/model",
    "http://127.0.0.1:9/out", "file:///tmp/out", "GS://bucket/out", "abfs+x://a/b",
    "gs:bucket/out", "S3:/bucket/out", "az://box/out", " gs://bucket/out", "me@host:out",
    "\\\\server\\share",
)  # fmt: skip
USES = (
    ("convert", "run", "{}"),
    ("convert", "run", "{}", "--dry-run"),
    ("convert", "run", "out", "--config", "{}"),
    ("inspect", "run", "--config", "{}"),
    ("verify", "{}"),
    ("verify", "out", "--report", "{}"),
    ("verify", "out", "--config", "{}"),
    ("verify", "out", "--prompts", "{}"),
    ("verify", "out", "--against", "hf:{}"),
    ("push", "{}", "--dry-run"),
    ("data", "prepare", "--out", "{}"),
)


@pytest.mark.parametrize("use", USES, ids=" ".join)
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_no_path(tmp_path, monkeypatch, use, address):
    monkeypatch.chdir(tmp_path)
    ran = moeconv(*(word.format(address) for word in use))
    # Of --against: no verdict.
    assert ran.code == UsageError.exit_code == 2
    assert "is an address" in ran.err and address in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_is_no_address_either(tmp_path):
    made = synthetic.write(tmp_path / "run")
    options = ("--config", made.config_file(), "--tokenizer", "gs://bucket/tokenizer")
    ran = moeconv("convert", made.run, tmp_path / "out", *options)
    assert ran.code == TokenizerError.exit_code
    assert "gs://bucket/tokenizer: is an address" in ran.error


@pytest.mark.parametrize("address", ADDRESSES)
def test_nor_for_the_library(address):
    with pytest.raises(OutputError, match="is an address"):
        resolve_out(address)


def test_a_local_name_with_a_colon_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = synthetic.write(tmp_path / "run:1")
    ran = moeconv("convert", "run:1", "out:1", "--config", made.config_file())
    assert ran.code == 0
    assert (tmp_path / "out:1" / "config.json").is_file()
