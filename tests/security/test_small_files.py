"""A file that is small by nature is not read where it is large: --max-memory counts none."""

import pytest
import synthetic

from moeconv.errors import ConfigError, TokenizerError
from moeconv.hf import tokenizer
from moeconv.maxtext import checkpoint as source
from moeconv.maxtext.run_record import read_run
from moeconv.orbax.locate import locate
from moeconv.orbax.store import Folder

MIB = 2**20


@pytest.fixture
def checkpoint(tmp_path):
    return synthetic.write(tmp_path / "run", ocdbt=False)


def sparse(path, size):
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def test_a_sidecar(checkpoint):
    sparse(checkpoint.run / "moeconv_run.json", 4 * MIB + 1)
    with pytest.raises(ConfigError, match=r"moeconv_run.json: is larger than 4 MiB; .*--config"):
        source.find_sidecar(locate(str(checkpoint.run)), needed=True)


def test_metrics(checkpoint):
    sparse(checkpoint.run / "metrics.jsonl", 500 * MIB)
    record, warnings = read_run(locate(str(checkpoint.run)), None)
    assert record is None
    [warning] = warnings
    assert "metrics.jsonl: is larger than 64 MiB; the manifest has no losses" in warning


def test_a_tokenizer_as_a_whole(tmp_path):
    """None of its files is too large, all together are."""
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        sparse(tmp_path / "tokenizer" / name, 24 * MIB)
    with pytest.raises(TokenizerError, match=r"tokenizer: its files up to merges.txt .* 64 MiB"):
        tokenizer.read_tokenizer(str(tmp_path / "tokenizer"), model_max_length=None)
    sidecar = source.RunSidecar(format="moeconv-run", version=1, config={}, tokenizer="tokenizer")
    with pytest.raises(TokenizerError, match=r"tokenizer: its files up to merges.txt .* 64 MiB"):
        source.run_tokenizer(
            source.FoundSidecar(sidecar, Folder.open(tmp_path)), model_max_length=None
        )
