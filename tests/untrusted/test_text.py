"""JSON and text of others."""

import pytest

from moeconv.untrusted import strict_json
from moeconv.untrusted.text import printable

NO_JSON = {
    "nan": "NaN",
    "infinity": '{"a": [-Infinity]}',
    "overflow": "1e999",
    "surrogate": '"\\ud800"',
    "deep": "[" * 100_000,
    "cut": "{",
    "empty": "",
    "long": "9" * 5000,
}


@pytest.mark.parametrize("raw", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_is_refused_by_value_error(raw: str):
    for given in (raw, raw.encode()):
        with pytest.raises(ValueError):
            strict_json.loads(given)


def test_a_name_that_stands_twice_is_refused_where_that_is_asked():
    raw = '{"a": [{"b": 1, "b": 2}]}'
    assert strict_json.loads(raw) == {"a": [{"b": 2}]}
    with pytest.raises(ValueError, match="'b' twice"):
        strict_json.loads(raw, unique=True)


def test_json_comes_back():
    content = {"text": "é\U0001f600", "numbers": [1, 0.1, -0.0, 1e308], "none": None}
    assert strict_json.loads(strict_json.dumps(content)) == content
    assert strict_json.loads('"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize("content", [float("nan"), [float("inf")], {"a": "\ud800"}])
def test_what_is_no_json_is_not_written(content: object):
    with pytest.raises(ValueError):
        strict_json.dumps(content)


def test_a_terminal_is_not_told_to_do_anything():
    assert printable("a\tb\nc é 漢 😀") == "a\tb\nc é 漢 😀"
    assert printable("\x1b[2J\r\x07\x9b\u202e\u2066\ud800") == (
        "\\x1b[2J\\x0d\\x07\\x9b\\u202e\\u2066\\ud800"
    )
