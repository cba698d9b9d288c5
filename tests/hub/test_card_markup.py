"""Nothing that a run says of itself is markup in the card, or in its metadata."""

import json
import re

import pytest
import yaml

from moeconv.errors import OutputError
from moeconv.hub.metadata import read_metadata
from moeconv.hub.prepare import PushOptions, prepare
from moeconv.verification.report.tables import code, plain

HOSTILE = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](https://evil.example/p.png)",
    "**bold** _em_ `code` ~~gone~~ $x$ &lt; @somebody",
    "line\n---\ninjected: true\n\n# Heading",
    "\x1b[31mred\x07\u202e",
    "{{ config }} {% raw %} | a | b |",
    "`` ` ``",
    "https://evil.example www.evil.example",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_plain_text_is_no_markup(text):
    shown = plain(text)
    assert not re.search(r"(?<!\\)(?:[<>\[\]`*$~&{}@]|:(?=//))|[\n\x00-\x1f\u202e]", shown)
    assert "www.evil" not in shown
    assert not re.search(r"[\n\x00-\x1f\u202e]", code(text)) and code(text).count("`") == 2


@pytest.mark.parametrize("text", ["# x", "- x", "+ x", "1. x", "2) x", "=== x", "---"])
def test_the_beginning_of_a_line_is_no_markup(text):
    assert re.match(r"\\|\d+\\", plain(text))


@pytest.mark.parametrize(
    "text", ["0.2.5", "3e-05", "adam_w", "cosine", "KL 1e-6 (a|b), 50%", "x-y"]
)
def test_ordinary_words_stay(text):
    assert plain(text) == text


def outside_code(body: str) -> str:
    return re.sub(r"(?<!\\)`[^`\n]*`", "", re.sub(r"```[\s\S]*?```", "", body))


def card_of(out) -> str:
    options = PushOptions(unverified=True)
    return prepare(out, options, dry_run=True, note=lambda text: None).card(None)[0]


@pytest.mark.parametrize("text", HOSTILE)
def test_facts_of_a_run_are_no_markup_in_the_card(out, text):
    manifest = json.loads((out / "moeconv_manifest.json").read_text())
    clean = card_of(out)
    manifest["run"]["maxtext_version"] = text
    manifest["run"]["settings"] |= {"opt_type": text, "hardware": text, "dtype": text}
    manifest["run"]["facts"] |= {"dataset": text, "license": text, "dataset_digest": text}
    manifest["warnings"] = [text]
    manifest["source"] |= {"format": text, "layout": text, "path": f"/a/{text}"}
    manifest["dropped"] = {text: text}
    (out / "moeconv_manifest.json").write_text(json.dumps(manifest))
    card = card_of(out)
    head, body = re.match(r"---\n([\s\S]*?)\n---\n([\s\S]*)", card).groups()
    told = yaml.safe_load(head)
    assert set(told) <= set(yaml.safe_load(clean.split("---\n")[1])) and "injected" not in told
    assert "\n" not in told["license"]
    for markup in (r"(?<!\\)\]\([^)]*\)", r"(?<!\\)<\w*", r"(?<!\\)!\[", r"(?<!\\)\*\*"):
        assert set(re.findall(markup, outside_code(body))) <= set(re.findall(markup, clean))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", card)
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings == [line for line in clean.splitlines() if line.startswith("#")]


METADATA = {
    "aliases": "a: &a [x, x]\nb: [*a, *a]",
    "many empty lines": "tags: [x]" + "\n" * 200,
    "nested": "a: " + "[" * 5000,
    "a number as a key": "1: 2",
    "results of nothing": "model-index: 7",
    "results of text": "model-index:\n- name: x\n  results: [y]",
    "a date that is none": "date: 2024-99-99",
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_of_somebody_else_are_read_or_refused(case):
    with pytest.raises(OutputError, match="cannot be read"):
        read_metadata(f"---\n{METADATA[case]}\n---\ntext", "README.md")
