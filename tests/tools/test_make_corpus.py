"""The embedded corpus and its tokenizer are what their generator writes."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def generator():
    return runpy.run_path(str(ROOT / "tools" / "make_corpus.py"))


def test_the_committed_corpus_is_what_the_generator_writes(generator):
    assert generator["CORPUS"].read_text(encoding="utf-8") == generator["make_corpus"]()


def test_the_committed_tokenizer_is_what_is_learnt_from_the_corpus(generator, tmp_path):
    stories = generator["make_corpus"]().strip().split("\n\n")
    generator["save_tokenizer"](generator["train_tokenizer"](stories), tmp_path)
    learnt, committed = (
        {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in (tmp_path, generator["TOKENIZER"])
    )
    assert learnt == committed


def test_stories_are_different_whole_and_plain(generator):
    stories = generator["make_corpus"]().strip().split("\n\n")
    assert len(set(stories)) == len(stories) == generator["STORIES"]
    for story in stories:
        assert story.isascii()
        assert "\n" not in story and "  " not in story
        assert not set(story) & set("{}")
        assert " a old" not in story and " A old" not in story
        assert story[-1] == "."
