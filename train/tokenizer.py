"""The embedded corpus and its tokenizer; tools/make_corpus.py writes both."""

from pathlib import Path

# How settings call both.
EMBEDDED = "embedded"
CORPUS = Path(__file__).parent / "corpus" / "stories.txt"
# A directory as transformers 4 and 5 load it.
TOKENIZER = CORPUS.with_name("tokenizer")


def read_stories() -> list[str]:
    """The stories of the corpus, which empty lines separate."""
    return CORPUS.read_text(encoding="utf-8").strip().split("\n\n")
