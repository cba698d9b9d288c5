"""Checkpoints in Orbax's layout, written with tensorstore: any shapes, any chunks, in milliseconds.

For properties that need arbitrary chunking, and for damage. What MaxText itself writes is in
`maxtext_lab`; `execution/test_written.py` holds the two against each other.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

KeyPath = tuple[str, ...]

_HANDLER = "orbax.checkpoint.experimental.v1._src.PyTreeHandler"
# Orbax's: metadata of arrays lies in the tree, only chunks in data files.
_OCDBT = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000}


def write(
    step: Path,
    arrays: Mapping[KeyPath, np.ndarray],
    chunks: Mapping[KeyPath, tuple[int, ...]] | None = None,
    *,
    ocdbt: bool = True,
    zarr3: bool = True,
    zeros: bool = True,
    scan_layers: bool | None = None,
    beside: Mapping[KeyPath, np.ndarray] | None = None,
    item: str = "items",
    rename: Callable[[KeyPath], KeyPath] = lambda path: ("params", "params", *path),
    parts: int = 0,
    custom: Mapping[str, object] | None = None,
) -> Path:
    """Writes a complete step with the arrays below `params.params`; returns the step.

    Args:
        step: The step's directory.
        arrays: Parameters.
        zeros: Whether chunks of zeros are stored, as Orbax does today and did not once.
        chunks: Chunk shapes; whole arrays by default.
        ocdbt: One OCDBT store, else a folder an array.
        zarr3: zarr v3, else v2.
        scan_layers: What `custom_metadata` says.
        beside: Leaves outside of `params`.
        item: Name of the item; empty for the step's directory itself.
        rename: The key path of a leaf in the tree.
        parts: Chunks are spread over OCDBT stores of so many processes, which are not merged.
        custom: More of `custom_metadata`.
    """
    items = step / item
    items.mkdir(parents=True)
    leaves = {rename(path): array for path, array in arrays.items()}
    shapes = {rename(path): chunk for path, chunk in (chunks or {}).items()}
    leaves.update(beside or {})
    # Of one context, so that a store is one database, which commits all arrays at once. Otherwise
    # each opening has one of its own, which writes the whole tree anew: thousands of files.
    context, transaction = ts.Context(), ts.Transaction()
    writes = []
    for path, array in leaves.items():
        name = ".".join(path)
        kvstore: object = {"driver": "file", "path": f"{items}/{name}/"}
        if ocdbt:
            base = {"driver": "file", "path": f"{items}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/", "config": _OCDBT}
        chunk = list(shapes.get(path, array.shape))
        spec = {
            "driver": "zarr3" if zarr3 else "zarr",
            "kvstore": kvstore,
            "metadata": _zarr3(array, chunk) if zarr3 else _zarr2(array, chunk),
            "store_data_equal_to_fill_value": zeros,
        }
        where = {"transaction": transaction if ocdbt else None, "context": context}
        if parts:
            writes += _write_parts(items, name, spec, array, chunk, parts, where)
            continue
        store = ts.open(spec, create=True, open=True, **where).result()
        writes.append(store.write(array))
    for written in writes:
        written.result()
    transaction.commit_sync()
    content = {
        "tree_metadata": {str(path): _entry(path, array) for path, array in leaves.items()},
        "use_ocdbt": ocdbt,
        "use_zarr3": zarr3,
        "store_array_data_equal_to_fill_value": zeros,
        "custom_metadata": None,
    }
    (items / "_METADATA").write_text(json.dumps(content))
    content = {
        "item_handlers": {item: _HANDLER} if item else _HANDLER,
        "init_timestamp_nsecs": 1,
        "commit_timestamp_nsecs": 2,
        "custom_metadata": {
            **({} if scan_layers is None else {"scan_layers": scan_layers}),
            **(custom or {}),
        },
    }
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(content))
    (step / "commit_success.txt").write_text(f"Checkpoint commit was successful to {step}")
    return step


def _write_parts(
    items: Path,
    name: str,
    spec: Mapping[str, Any],
    array: np.ndarray,
    chunk: list[int],
    parts: int,
    where: Mapping[str, Any],
) -> list[ts.WriteFutures]:
    """Chunk N of an array goes to the store of process N modulo their number."""
    writes = []
    grid = [-(-n // c) for n, c in zip(array.shape, chunk, strict=True)]
    for part in range(parts):
        base = {"driver": "file", "path": f"{items}/ocdbt.process_{part}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/", "config": _OCDBT}
        store = ts.open({**spec, "kvstore": kvstore}, create=True, open=True, **where).result()
        for number, index in enumerate(np.ndindex(*grid)):
            if number % parts == part:
                box = tuple(
                    slice(i * c, min((i + 1) * c, n))
                    for i, c, n in zip(index, chunk, array.shape, strict=True)
                )
                writes.append(store[box].write(array[box]))
    return writes


def _entry(path: KeyPath, array: np.ndarray) -> dict[str, object]:
    return {
        "key_metadata": [{"key": key, "key_type": 2} for key in path],
        "value_metadata": {
            "value_type": "jax.Array",
            "skip_deserialize": False,
            "write_shape": list(array.shape),
        },
    }


def _zarr3(array: np.ndarray, chunk: list[int]) -> dict[str, object]:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    shard = {
        "chunk_shape": chunk,
        "codecs": [little, {"name": "zstd", "configuration": {"level": 3}}],
        "index_codecs": [little, {"name": "crc32c"}],
    }
    return {
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [{"name": "sharding_indexed", "configuration": shard}],
    }


def _zarr2(array: np.ndarray, chunk: list[int]) -> dict[str, object]:
    return {
        "shape": list(array.shape),
        "dtype": "bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.str,
        "chunks": chunk,
        "compressor": {"id": "zstd", "level": 1},
        "dimension_separator": ".",
        "fill_value": None,
    }
