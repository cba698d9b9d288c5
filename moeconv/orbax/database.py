"""Where the keys of an item are: in one OCDBT store, in the parts of its processes, or in files.

Each process of a run writes an OCDBT store of its own, `ocdbt.process_N`, and Orbax merges them
when the save is complete (orbax-checkpoint `type_handlers.py`, `merge_ocdbt_per_process_files`). A
save whose parts were never merged has all arrays, each chunk in the part of one process.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import tensorstore as ts

from moeconv.errors import NotACheckpointError
from moeconv.orbax.store import Folder

MANIFEST = "manifest.ocdbt"
_PART = re.compile(r"ocdbt\.process_[0-9]{1,9}\Z")
_METADATA = ("zarr.json", ".zarray", ".zattrs")


class Database:
    """The OCDBT store of an item.

    Attributes:
        parts: Names of the parts, where they were never merged; else empty.
    """

    def __init__(self, items: Folder, context: Any) -> None:
        """Finds out whether it is one store.

        Raises:
            NotACheckpointError: A part cannot be looked for.
        """
        self._items, self._context = items, context
        self.parts = () if items.has(MANIFEST) else tuple(parts_of(items))

    def kvstore(self, name: str) -> dict[str, Any]:
        """Spec of the key-value store below an array's name.

        Raises:
            NotACheckpointError: Two parts have the same chunk of it.
        """
        if not self.parts:
            return {"driver": "ocdbt", "base": self._items.kvstore(), "path": f"{name}/"}
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
    """Names of the processes' parts, in their order."""
    if items.local is not None:
        names = [name for name in items.children() if _PART.match(name)]
        yield from sorted(names, key=lambda name: int(name.rpartition("_")[2]))
        return
    number = 0
    while (items / (name := f"ocdbt.process_{number}")).has(MANIFEST):
        yield name
        number += 1


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
