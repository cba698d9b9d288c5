"""A run whose stories are read as it goes, and what it leaves is converted."""

import json

import pytest
from cli_runner import moeconv
from moeconv_train.tokenizer import read_stories
from test_train_endings import cache, jax_as_it_was, train

__all__ = ["cache", "jax_as_it_was", "train"]  # fixtures

pytest.importorskip("maxtext")
pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.maxtext,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": s.strip()}) + "\n" for s in read_stories()[:150]))
    return path


def test_a_streamed_source_trains_and_saves_when_its_data_end(train, stories, tmp_path):
    ran, run = train(dataset_type="hf", hf_path="json", hf_train_files=stories, steps=1000)
    assert ran.code == 0, ran.err
    outcome = json.loads(ran.out)
    assert outcome["status"] == "stopped" and 0 < outcome["completed"] < 100
    assert outcome["saved_step"] == outcome["completed"] - 1
    assert "You may have run out of training data" in outcome["message"]
    assert "dataset_type=hf begins its data anew at every resume" in ran.err
    assert (run / "tokenizer" / "tokenizer.json").is_file()
    converted = moeconv("convert", run, tmp_path / "model")
    assert converted.code == 0, converted.err
