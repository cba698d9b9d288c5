"""Sentencepiece's compiled normalisation rules, and whether a `tokenizer.json` can hold them.

A rule maps one to a few characters to a text; at each position of a text the longest rule applies
(`Normalizer::NormalizePrefix`, sentencepiece's `src/normalizer.cc`). `tokenizers`' own reader of
the same bytes, `Precompiled`, looks a whole grapheme up by its *shortest* rule, and so drops
combining marks. It is exact for single characters that stand alone; joining several is left to
NFC, within the sequences that have a rule.
"""

import struct
import unicodedata
from collections.abc import Mapping

# A rule has a few characters of up to four bytes; sentencepiece's own have at most four.
_MAX_KEY = 64
# Of the largest, 'nmt_nfkc_cf', there are half a million; a damaged trie may have loops.
_MAX_NODES = 4_000_000


def read_rules(data: bytes) -> dict[str, str]:
    """All rules of a `precompiled_charsmap`.

    The layout is that of `Normalizer::DecodePrecompiledCharsMap`: the size of a trie (uint32), a
    Darts double-array trie of uint32 units, and texts that end with a zero byte, each named by
    the offset that is a key's value. Unit and offset bits are those of darts.h,
    `DoubleArrayUnit`.

    Raises:
        ValueError: It is damaged.
    """
    if len(data) < 4:
        raise ValueError("its normalisation rules end too early")
    (size,) = struct.unpack_from("<I", data)
    if size % 1024 or not 1024 <= size < len(data) - 4 or data[-1]:
        raise ValueError("its normalisation rules are damaged")
    units = struct.unpack_from(f"<{size // 4}I", data, 4)
    texts = data[4 + size :]
    children: dict[int, list[int]] = {}
    for at, unit in enumerate(units):
        if not unit >> 31 and unit & 0xFF:  # a value, or the end of a key
            children.setdefault(at ^ (unit & 0xFF), []).append(at)
    rules: dict[str, str] = {}
    open_nodes, seen = [(_base(units, 0), b"")], 0
    while open_nodes:
        base, prefix = open_nodes.pop()
        seen += 1
        for at in children.get(base, ()):
            unit = units[at]
            key, below = prefix + bytes([unit & 0xFF]), _base(units, at)
            if len(key) > _MAX_KEY or seen > _MAX_NODES or below >= len(units):
                raise ValueError("its normalisation rules are damaged")
            if unit >> 8 & 1:
                start = units[below] & 0x7FFFFFFF
                if start >= len(texts):
                    raise ValueError("its normalisation rules are damaged")
                rules[key.decode()] = texts[start : texts.index(b"\0", start)].decode()
            open_nodes.append((below, key))
    return rules


def _base(units: tuple[int, ...], at: int) -> int:
    """What a child's place is the exclusive or of, with its label."""
    unit = units[at]
    return at ^ (unit >> 10 << ((unit & 0x200) >> 6))


def replaced(text: str, rules: Mapping[str, str]) -> str:
    """A text with each character replaced by its rule."""
    return "".join(rules.get(character, character) for character in text)


def joined(rules: Mapping[str, str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """What the rules of several characters join, once those of single ones were applied.

    Characters that this Python's Unicode does not have are left out: neither has the NFC of
    `tokenizers` them.

    Returns:
        Sequences of 2 to 4 sets of characters (each set a sorted text), of which NFC makes what the
        rules make of one character from each set; and letters with combining marks, of which the
        rules make something else than NFC (`nmt_nfkc_cf` has them: Greek iotas below, dotted I).

    Raises:
        ValueError: The rules join something else in another way than NFC, or leave alone a
            character that NFC changes.
    """
    keys: set[tuple[str, ...]] = set()
    others: list[str] = []
    for key, value in rules.items():
        if len(key) == 1 or any(unicodedata.category(letter) == "Cn" for letter in key):
            continue
        plain = replaced(key, rules)
        if len(plain) == len(key) and unicodedata.normalize("NFC", plain) == value:
            keys.add(tuple(plain))
        elif all(unicodedata.category(letter).startswith("M") for letter in key[1:]):
            others.append(key)
        else:
            raise ValueError(f"its normalisation rules make {value!r} of {key!r}")
    for number in (*range(0xD800), *range(0xE000, 0x110000)) if keys else ():
        letter = chr(number)
        if letter not in rules and unicodedata.normalize("NFC", letter) != letter:
            raise ValueError(f"its normalisation rules leave {letter!r} alone")
    return _in_sets(keys), sorted(others)


def _in_sets(keys: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Puts together keys that differ at one place only, place by place."""
    for place in range(max(map(len, keys), default=0)):
        alike: dict[tuple[str, ...], list[str]] = {}
        for key in keys:
            rest = (*key[:place], "", *key[place + 1 :]) if place < len(key) else key
            alike.setdefault(rest, []).append(key[place] if place < len(key) else "")
        keys = {
            tuple(part or "".join(sorted("".join(here))) for part in rest)
            for rest, here in alike.items()
        }
    return sorted(keys)
