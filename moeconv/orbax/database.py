"""Where the keys of an item are: in one OCDBT store, in the parts of its processes, or in files.

Each process of a run writes an OCDBT store of its own, `ocdbt.process_N`, and Orbax merges them
when the save is complete (orbax-checkpoint `type_handlers.py`, `merge_ocdbt_per_process_files`). A
save whose parts were never merged has all arrays, each chunk in the part of one process.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import tensorstore as ts

from moeconv.errors import NotACheckpointError
from moeconv.orbax.store import Folder

MANIFEST = "manifest.ocdbt"
# Its process is a number, or Pathways' one controller; replicated arrays may be in a part of their
# own (orbax-checkpoint `serialization/ocdbt_process_spec.py`, `pathways_handler_registry.py`).
_PART = re.compile(r"ocdbt\.process_(?P<replica>replica_)?(?P<id>[A-Za-z0-9]{1,100})\Z")
_CONTROLLER = "ocdbt.process_pwcontroller"
_METADATA = ("zarr.json", ".zarray", ".zattrs")
# How many numbers in a row are looked for in vain where a store lists nothing.
_AHEAD = 16
# Names of absent parts that are listed.
_SHOWN = 5


class Database:
    """The OCDBT store of an item.

    Attributes:
        parts: Names of the parts, where they were never merged; else empty.
    """

    def __init__(self, items: Folder, context: Any) -> None:
        """Finds out whether it is one store.

        Raises:
            NotACheckpointError: There is none, or a part cannot be looked for.
        """
        self._items, self._context = items, context
        merged = items.has(MANIFEST)
        self.parts = () if merged else tuple(parts_of(items))
        if not merged and not self.parts:
            raise NotACheckpointError(
                f"{items} has no {MANIFEST} and no ocdbt.process_ folder with one, in which its "
                "_METADATA says that arrays are stored; copy all of it, or use another step"
            )

    def kvstore(self, name: str) -> dict[str, Any]:
        """Spec of the key-value store below an array's name.

        Raises:
            NotACheckpointError: No part has any of it, or two have the same chunk of it.
        """
        if not self.parts:
            return {"driver": "ocdbt", "base": self._items.kvstore(), "path": f"{name}/"}
        if name not in self._held:  # tensorstore ends the process over a stack of nothing
            missing = gaps(self.parts)
            raise NotACheckpointError(
                f"{self._items}: {name} is in none of the {len(self.parts)} ocdbt.process_ folders "
                f"there{f' ({missing})' if missing else ''}; copy the others (each process of a "
                "run may have written to a disk of its own), or use another step"
            )
        layers = [
            {"exact": key, "base": {**_ocdbt(self._items / part), "path": key}}
            for key, part in self._held.get(name, {}).items()
        ]
        return {"driver": "kvstack", "layers": layers, "path": f"{name}/"}

    def keys(self) -> list[str]:
        """All keys, `<array>/<metadata or chunk>`.

        Raises:
            ValueError, OSError, …: tensorstore's, as it cannot be read.
            NotACheckpointError: Two parts have the same chunk.
        """
        if not self.parts:
            return _keys(_ocdbt(self._items), self._context)
        return [key for keys in self._held.values() for key in keys]

    def read(self, key: str) -> Any:
        """The value of a key: a tensorstore future."""
        name, _, file = key.rpartition("/")
        return ts.KvStore.open(self.kvstore(name), context=self._context).result().read(file)

    @cached_property
    def _held(self) -> dict[str, dict[str, str]]:
        """The part of each key, by array."""
        found: dict[str, dict[str, str]] = {}
        for part in self.parts:
            for key in _keys(_ocdbt(self._items / part), self._context):
                name, file = array_of(key)
                keys = found.setdefault(name, {})
                if key in keys and file not in _METADATA:
                    raise NotACheckpointError(
                        f"{self._items}: {keys[key]} and {part} both have {key}, so they are not "
                        "of one save"
                    )
                keys.setdefault(key, part)
        return found


def parts_of(items: Folder) -> Iterator[str]:
    """Names of the processes' parts, in their order; numbers may be missing.

    A store that lists nothing, as a web server, is asked for each number, and a part is passed over
    that comes more than `_AHEAD` behind the one before it.

    Raises:
        StorageError: A remote store does not answer.
    """
    try:
        names = [name for name in items.children() if _PART.match(name)]
    except NotACheckpointError:
        if items.local is not None:
            raise
        yield from _asked(items)
        return
    yield from sorted(names, key=lambda name: (len(name), name))


def _asked(items: Folder) -> Iterator[str]:
    for kind in ("", "replica_"):
        number = last = 0
        while number < last + _AHEAD:
            if (items / (name := f"ocdbt.process_{kind}{number}")).has(MANIFEST):
                yield name
                last = number + 1
            number += 1
    if (items / _CONTROLLER).has(MANIFEST):
        yield _CONTROLLER


def gaps(parts: Sequence[str]) -> str:
    """The first parts whose numbers are missing among those that are there; empty if none is.

    A process that wrote nothing leaves no part, so some may be missing from a whole save.
    """
    numbers = {match["id"] for part in parts if (match := _PART.match(part))}
    last = max((int(n) for n in numbers if n.isascii() and n.isdigit()), default=0)
    missing = (f"ocdbt.process_{n}" for n in range(last) if str(n) not in numbers)
    names = list(itertools.islice(missing, _SHOWN))
    if not names:
        return ""
    verb = "is" if len(names) == 1 else "are"
    return f"{', '.join(names)} {verb} not there, while number {last} is"


def array_of(key: str) -> tuple[str, str]:
    """The array of a key, and the rest: no array's name has a slash."""
    name, _, rest = key.partition("/")
    return name, rest


def is_chunk(rest: str) -> bool:
    """True if a key's rest is a chunk, not metadata."""
    return rest not in _METADATA


def _ocdbt(folder: Folder) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": folder.kvstore()}


def _keys(spec: dict[str, Any], context: Any) -> list[str]:
    store = ts.KvStore.open(spec, context=context).result()
    return [key.decode(errors="replace") for key in store.list().result()]
