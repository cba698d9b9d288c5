"""Documents made wrong: one valid document, and small changes of it that hypothesis chooses.

A change is data that prints as the code that makes it, so that a failure can be pasted into a table
of regressions. Values go by the name they have in `NASTY`.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

# By name, the JSON text that takes a value's place. Not all of it is JSON.
NASTY = {
    **{word: word for word in ("null", "true", "false", "0", "1", "-1", "3", "0.5", "-0.0", "65")},
    **{word: word for word in ("NaN", "Infinity", "-Infinity", "1e308", "-1e308", "1e400")},
    **{word: word for word in ("[]", "{}", "[null]", "[[]]", "[1, 2]", '[""]', "{", '"')},
    **{f"2**{n}": str(2**n) for n in (31, 40, 53, 63, 64)},
    "10**30": "1" + "0" * 30,
    "10**5000": "1" + "0" * 5000,
    "empty": '""',
    "space": '" "',
    "word": '"abc"',
    "number in a string": '"4"',
    "superscript": '"²"',
    "5,000 letters": f'"{"a" * 5000}"',
    "half a character": r'"\ud800"',
    "NUL": r'"a\u0000b"',
    "escape codes": r'"\u001b[31mred\u001b[0m\u0007\u009b31m"',
    "right to left": r'"\u202eabc\u2066"',
    "lines": r'"a\nb\rc\u2028d"',
    "markup": r'"[bold]x[/bold][/] | <script>x</script> | ](x)` {{x}} %s {0} ---"',
    "up": '"../secret/id_rsa"',
    "dots": '".."',
    "absolute": '"/etc/passwd"',
    "home": '"~nobody-of-this-name"',
    "address": '"http://127.0.0.1:9/x"',
    "code": '"evil.Evil"',
    "deep list": "[" * 900 + "]" * 900,
    "deeper list": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 900 + "1" + "}" * 900,
    "100,000 numbers": f"[{','.join('1' * 100_000)}]",
    "100,000 keys": "{" + ",".join(f'"k{n}":{n}' for n in range(100_000)) + "}",
}

# What a YAML parser knows besides.
YAML = {
    "alias bomb": "[&a [x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], "
    "&c [*b,*b,*b,*b,*b,*b,*b,*b,*b], &d [*c,*c,*c,*c,*c,*c,*c,*c,*c], "
    "&e [*d,*d,*d,*d,*d,*d,*d,*d,*d], &f [*e,*e,*e,*e,*e,*e,*e,*e,*e], "
    "&g [*f,*f,*f,*f,*f,*f,*f,*f,*f], [*g,*g,*g,*g,*g,*g,*g,*g,*g]]",
    "itself": "&me [*me]",
    "itself in an object": "&me {me: *me}",
    "unknown alias": "*nothing",
    "python": "!!python/object/apply:os.system [id]",
    "tag": "!nothing x",
    "binary": "!!binary aGk=",
    "bad binary": "!!binary é",
    "set": "!!set {a, b}",
    "pairs": "!!omap [a: 1, b: 2]",
    "date": "2001-01-01",
    "no date": "2001-99-99",
    "time": "2001-01-01t00:00:00Z",
    "inf": ".inf",
    "nan": ".nan",
    "base 60": "1:2:3",
    "octal": "0777",
    "underscores": "1_000",
    "yes": "yes",
    "list for a key": "{? [a] : b}",
    "object for a key": "{? {a: b} : c}",
    "merge": "{<<: 3}",
    "tab": "\tx",
    "colon": "a: b: c",
    "document": "1\n---\n2",
}

BYTES = {
    "nothing": b"",
    "NUL": b"\0" * 64,
    "0xff": b"\xff" * 64,
    "half a character": b'{"a": "\xc3\x28"}',
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "text": b"once upon a time\n",
    "UTF-16": "\ufeff{}".encode("utf-16-le"),
    "newlines": b"\n\r\n\n",
    "png": b"\x89PNG\r\n\x1a\n",
    "protobuf": b"\n\x0b\n\x04abcd\x15\0\0\0\0",
    "ranks": b"YQ== 0\nYg== 1\n",
    "bad ranks": b"YQ== 0\nYQ== -1\nnot base64 \xff 10000000000000000000000\n",
    "deep": b"[" * 100_000,
    "quotes": b'"' * 1000,
}

# What may lie where a file should.
KINDS = (
    "missing", "folder", "file", "FIFO", "link out", "link to a folder", "link to nothing",
    "link to itself", "link to zeros", "huge",
)  # fmt: skip

Path_ = tuple[str | int, ...]


class Object(list[tuple[str, Any]]):
    """An object's pairs; a key may stand twice."""


@dataclass(frozen=True)
class Raw:
    """Text that stands for a value."""

    text: str


@dataclass(frozen=True)
class Edit:
    """A change of the parsed document: `Edit("replace", ("model", "vocab"), "null")`.

    Attributes:
        op: replace, delete, again (the key twice), add, rename, swap, nudge.
        path: Of the value.
        value: Name in `NASTY` or `YAML`, for swap another path, for nudge a number.
    """

    op: str
    path: Path_
    value: Any = None


@dataclass(frozen=True)
class Spoil:
    """A change of the bytes: flip (a bit), cut, insert, whole, before.

    Attributes:
        op: Which.
        at: Where, in thousandths of the length.
        value: Name in `BYTES`, for flip a bit.
    """

    op: str
    at: int = 0
    value: Any = None


@dataclass(frozen=True)
class Kind:
    """Another thing than a regular file; see `KINDS`."""

    kind: str


Change = Edit | Spoil | Kind


# --- formats ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """How bytes become a document that can be edited, and, given them again, back."""

    parse: Callable[[bytes], Any]
    encode: Callable[[Any, bytes], bytes]
    values: dict[str, str]


def _loads(raw: bytes) -> Any:
    return json.loads(raw, object_pairs_hook=Object)


def _text(node: Any) -> str:
    match node:
        case Raw(text):
            return text
        case Object():
            return "{" + ",".join(f"{_text(k)}:{_text(v)}" for k, v in node) + "}"
        case list():
            return "[" + ",".join(map(_text, node)) + "]"
    return json.dumps(node)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _json(document: Any, raw: bytes) -> bytes:
    return _bytes(_text(document))


def _lines(document: Any, raw: bytes) -> bytes:
    rows = document if type(document) is list else [document]
    return _bytes("".join(f"{_text(row)}\n" for row in rows))


def _yaml(document: Any, raw: bytes) -> bytes:
    if not isinstance(document, Object):
        return _bytes(_text(document))
    return _bytes("".join(f"{_text(k)}: {_text(v)}\n" for k, v in document))


def _header(raw: bytes) -> Any:
    (size,) = struct.unpack("<Q", raw[:8])
    return _loads(raw[8 : 8 + size])


def _with_header(document: Any, raw: bytes) -> bytes:
    (size,) = struct.unpack("<Q", raw[:8])
    header = _bytes(_text(document))
    return struct.pack("<Q", len(header)) + header + raw[8 + size :]


JSON = Format(_loads, _json, NASTY)
JSON_LINES = Format(lambda raw: [_loads(row) for row in raw.splitlines()], _lines, NASTY)
CONFIG = Format(_loads, _yaml, {**NASTY, **YAML})
SAFETENSORS = Format(_header, _with_header, NASTY)


# --- making changes -----------------------------------------------------------------------------


def apply(raw: bytes, changes: Sequence[Edit | Spoil], form: Format | None) -> bytes:
    """The document with all of the changes; one whose place is gone changes nothing."""
    edits = [one for one in changes if isinstance(one, Edit)]
    if edits and form is not None:
        document = [form.parse(raw)]
        for edit in edits:
            _edit(document, edit, form.values)
        if document:
            raw = form.encode(document[0], raw)
    for one in changes:
        if isinstance(one, Spoil):
            raw = _spoil(raw, one)
    return raw


def _find(root: list[Any], path: Path_) -> tuple[list[Any], int] | None:
    """The container and the position of a value."""
    container, position = root, 0
    for step in path:
        container = container[position]
        if type(container) is tuple:
            container = container[1]
        if isinstance(container, Object) and isinstance(step, str):
            keys = [key for key, _ in container]
            position = keys.index(step) if step in keys else -1
        elif type(container) is list and isinstance(step, int):
            position = step if step < len(container) else -1
        else:
            return None
        if position < 0:
            return None
    return container, position


def _edit(root: list[Any], edit: Edit, values: dict[str, str]) -> None:
    found = _find(root, edit.path)
    if found is None:
        return
    container, position = found
    pair = isinstance(container, Object)
    key, old = container[position] if pair else (None, container[position])

    def put(value: Any) -> None:
        container[position] = (key, value) if pair else value

    match edit.op:
        case "replace":
            put(Raw(values[edit.value]))
        case "delete":
            del container[position]
        case "again":
            container.append((key, Raw(values[edit.value])) if pair else old)
        case "add" if isinstance(old, Object):
            old.append((edit.value, 1))
        case "add" if isinstance(old, list):
            old.append(Raw(values.get(edit.value, "null")))
        case "rename" if pair:
            container[position] = (edit.value, old)
        case "nudge" if isinstance(old, int):
            put(old + edit.value)
        case "swap" if (other := _find(root, edit.value)) is not None:
            there, place = other
            theirs = there[place]
            put(theirs[1] if type(theirs) is tuple else theirs)
            there[place] = (theirs[0], old) if type(theirs) is tuple else old


def _spoil(raw: bytes, change: Spoil) -> bytes:
    at = len(raw) * change.at // 1000
    match change.op:
        case "flip" if raw:
            at = min(at, len(raw) - 1)
            return raw[:at] + bytes([raw[at] ^ 1 << change.value]) + raw[at + 1 :]
        case "cut":
            return raw[:at]
        case "insert":
            return raw[:at] + BYTES[change.value] + raw[at:]
        case "whole":
            return BYTES[change.value]
        case "before":
            return BYTES[change.value] + raw
    return raw


def place(path: Path, kind: str, secret: Path) -> None:
    """Puts another thing in the place of a file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "file":
            path.touch()
        case "FIFO":
            os.mkfifo(path)
        case "link out":
            path.symlink_to(secret)
        case "link to a folder":
            path.symlink_to(secret.parent)
        case "link to nothing":
            path.symlink_to("nothing")
        case "link to itself":
            path.symlink_to(path.name)
        case "link to zeros":
            path.symlink_to("/dev/zero")
        case "huge":
            with path.open("wb") as file:
                file.truncate(1 << 40)


# --- choosing changes ---------------------------------------------------------------------------


def _walk(node: Any, path: Path_) -> Iterator[Path_]:
    """Paths of all values, but of many alike (a vocabulary) only of some."""
    yield path
    children: list[tuple[str | int, Any]] = []
    if isinstance(node, Object):
        children = list(node)
    elif type(node) is list:
        children = list(enumerate(node))
    if len(children) > 24:
        children = [*children[:3], children[len(children) // 2], children[-1]]
    for key, child in children:
        yield from _walk(child, (*path, key))


_SPOILS = st.one_of(
    st.builds(Spoil, st.just("flip"), st.integers(0, 1000), st.integers(0, 7)),
    st.builds(Spoil, st.just("cut"), st.integers(0, 999)),
    st.builds(Spoil, st.just("insert"), st.integers(0, 1000), st.sampled_from(sorted(BYTES))),
    st.builds(Spoil, st.just("whole"), st.just(0), st.sampled_from(sorted(BYTES))),
    st.builds(Spoil, st.just("before"), st.just(0), st.sampled_from(sorted(BYTES))),
)
_KEYS = ("", "format", "version", "auto_map", "__class__", "\ud800", "\0", "a" * 300, "../x", "<<")


def edits(document: Any, values: dict[str, str]) -> st.SearchStrategy[Edit]:
    """One change of a document."""
    found = list(_walk(document, ()))
    places, inner = st.sampled_from(found), st.sampled_from([p for p in found if p] or found)
    value, key = st.sampled_from(sorted(values)), st.sampled_from(_KEYS)
    replace = st.builds(Edit, st.just("replace"), places, value)
    return st.one_of(
        replace,
        replace,
        replace,
        st.builds(Edit, st.just("delete"), inner),
        st.builds(Edit, st.just("again"), inner, value),
        st.builds(Edit, st.just("add"), places, key),
        st.builds(Edit, st.just("rename"), inner, key),
        st.builds(Edit, st.just("swap"), inner, inner),
        st.builds(Edit, st.just("nudge"), inner, st.sampled_from([-1, 1, 8, -8, 2**32])),
    )


def changes(path: Path, form: Format | None) -> st.SearchStrategy[tuple[Change, ...]]:
    """One to three changes of a file, or another thing in the place of a folder."""
    kind = st.sampled_from(KINDS).map(lambda kind: (Kind(kind),))
    if path.is_dir():
        return kind
    return st.one_of(*[content_changes(path.read_bytes(), form)] * 7, kind)


def content_changes(raw: bytes, form: Format | None) -> st.SearchStrategy[tuple[Edit | Spoil, ...]]:
    """One to three changes of some bytes."""
    spoil = st.lists(_SPOILS, min_size=1, max_size=2).map(tuple)
    if form is None:
        return spoil
    edit = st.lists(edits(form.parse(raw), form.values), min_size=1, max_size=3).map(tuple)
    return st.one_of(*[edit] * 6, spoil)
