"""The run's tokenizer at a store that fails meanwhile: a warning of level weights."""

import json

import synthetic

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import StorageError
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status
from moeconv.verification.levels import tokenizers

TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}


def test_a_store_that_fails_warns(tmp_path, monkeypatch):
    made = synthetic.write(tmp_path / "run")
    (made.run / "tokenizer").mkdir()
    (made.run / "tokenizer" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    sidecar = {"format": "moeconv-run", "version": 1, "config": dict(made.config)}
    (made.run / "moeconv_run.json").write_text(json.dumps({**sidecar, "tokenizer": "tokenizer"}))
    convert(plan_conversion(str(made.run), ConvertOptions()), tmp_path / "out")

    def fails(*_, **__):
        raise StorageError("gs://bucket/run: no answer")

    monkeypatch.setattr(tokenizers, "run_tokenizer", fails)
    (found,) = tokenizers.check_own_tokenizer(Candidate.open(tmp_path / "out"))
    assert found.status is Status.WARN
    assert "gs://bucket/run: no answer" in found.summary
