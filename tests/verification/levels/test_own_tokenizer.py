"""Level structure and weights of the tokenizer: stale, too large, unable to hold a text."""

import json
import shutil
from pathlib import Path

import pytest
from outputs_lab import edit, write_tokenizer

from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status
from moeconv.verification.levels.structure import check_structure
from moeconv.verification.levels.tokenizers import check_own_tokenizer

# The tokenizer that lies in OUT; the verdict on it at level weights; words of it.
TOKENIZERS = {
    "the run's own": ([f"w{n}" for n in range(30)], {}, Status.PASS, "the run's own"),
    "stale": (
        [f"w{n}" for n in (1, 0, *range(2, 30))], {}, Status.FAIL,
        "2 tokens have other ids, 'w0' has 3 instead of 2"),
    "of another release": (
        [f"w{n}" for n in range(30)], {"split": "Whitespace"}, Status.WARN,
        "but another pre_tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stale_tokenizer_is_found(told, tmp_path, name):
    words, options, status, summary = TOKENIZERS[name]
    out = tmp_path / "out"
    shutil.copytree(told, out)
    write_tokenizer(out, words, **options)
    (check,) = check_own_tokenizer(Candidate.open(out))
    assert (check.status, check.level) == (status, "weights")
    assert summary in check.summary


def test_a_tokenizer_that_does_not_fit_is_found_without_the_checkpoint(told, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(told, out)
    write_tokenizer(out, [f"w{n}" for n in range(40)])
    found = tokenizer_check(out)
    assert found.status is Status.FAIL and "32" in found.summary and "42" in found.summary
    write_tokenizer(out, [f"w{n}" for n in range(30)])
    edit(out, eos_token_id=0)
    found = tokenizer_check(out)
    assert found.status is Status.FAIL
    assert found.summary == "eos_token_id: 1 in the tokenizer, 0 in config"


def tokenizer_check(out: Path):
    return next(c for c in check_structure(Candidate.open(out)) if c.name == "tokenizer")


def test_text_must_survive_the_tokenizer(told, tmp_path):
    found = tokenizer_check(told)  # which has 30 words
    assert found.status is Status.FAIL and "text does not survive the tokenizer" in found.summary
    out = tmp_path / "out"
    shutil.copytree(told, out)
    content = json.loads((out / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Unheard"}
    (out / "tokenizer.json").write_text(json.dumps(content))
    found = tokenizer_check(out)
    assert found.status is Status.FAIL and "cannot" in found.summary
