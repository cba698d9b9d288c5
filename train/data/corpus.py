"""The embedded corpus: stories that come with moeconv, for runs without a network."""

from pathlib import Path

from moeconv_train.make_corpus import CORPUS


def read_stories(path: Path = CORPUS) -> list[str]:
    """The stories of a corpus file, which empty lines separate."""
    return path.read_text(encoding="utf-8").strip().split("\n\n")
