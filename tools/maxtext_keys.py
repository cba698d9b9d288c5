"""The classes of MaxText's settings, in moeconv/arch/data/maxtext_keys.json, one key a line.

A person classifies a key; this module keeps what was said and finds what was not:

    function  changes what a model computes from given weights and tokens, in some decoder block
    size      a dimension, or the layout of the parameters, which their tree shows
    derived   MaxText computes it from other keys
    training  loss, optimizer, schedule, data, dropout, initial values
    machine   devices, kernels, memory, serving: changes nothing but rounding
    io        paths, logs, checkpoints, tokenizer files

What may be either is `function`. Such a key has `neutral`, the values under which it leaves a model
a plain decoder (as a rule MaxText's default), and `what` another value does, continuing
"KEY=VALUE …". It is `visible` if every other value shows in the parameter tree of the blocks that
honour it. `until` is the last release that had a key which the newest lacks.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "moeconv" / "arch" / "data" / "maxtext_keys.json"
CLASSES = frozenset({"function", "size", "derived", "training", "machine", "io"})

Entries = dict[str, dict[str, Any]]


def read() -> Entries:
    """The classified keys."""
    entries: Entries = json.loads(PATH.read_text(encoding="utf-8"))
    return entries


def text(entries: Mapping[str, Any]) -> str:
    """The file that holds `entries`: sorted, one key a line."""
    lines = (f"{json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def faults(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the entries, a sentence each."""
    found = []
    for key, entry in entries.items():
        function = entry.get("class") == "function"
        wanted = {"class", "neutral", "what"} if function else {"class"}
        free = {"until", "visible"} if function else {"until"}
        if entry.get("class") not in CLASSES:
            found.append(f"{key}: {entry.get('class')!r} is no class")
        elif set(entry) - free != wanted:
            found.append(f"{key}: has {', '.join(entry)}, not {', '.join(sorted(wanted))}")
        elif "neutral" in entry and not (isinstance(entry["neutral"], list) and entry["neutral"]):
            found.append(f"{key}: neutral is no list of values")
        elif "what" in entry and not entry["what"]:
            found.append(f"{key}: what another value does is not said")
    return found


def renewed(entries: Mapping[str, Any], installed: Iterable[str], before: str) -> Entries:
    """The entries for a new release: each keeps its class.

    Args:
        entries: The classified keys of all releases so far.
        installed: The keys of the new release.
        before: The release before it, the last to have what is gone.

    Raises:
        SystemExit: Names the keys that nobody has classified.
    """
    names = set(installed)
    if unclassified := sorted(names - set(entries)):
        raise SystemExit(
            f"MaxText has keys that are not classified: {', '.join(unclassified)}. "
            f"Add them to {PATH.name}; tools/maxtext_keys.py says how."
        )
    result: Entries = {}
    for key, entry in entries.items():
        kept = {name: value for name, value in entry.items() if name != "until"}
        gone = {} if key in names else {"until": entry.get("until", before)}
        result[key] = kept | gone
    return result
