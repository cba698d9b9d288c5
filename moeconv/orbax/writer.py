"""A checkpoint in Orbax's layout, as it is written: specs of arrays, and the files around them.

    STEP/commit_success.txt         the marker of a finished save, on stores without renames
    STEP/_CHECKPOINT_METADATA       handlers, times, and MaxText's own `custom_metadata`
    STEP/items/_METADATA            the tree: every leaf with its key path
    STEP/items/manifest.ocdbt, d/   with OCDBT all arrays in one database, else NAME/ for each array

What is written is what Orbax 0.11 writes (type_handlers.py `ArrayHandler`, ocdbt_utils.py): zarr v3
arrays of one inner chunk a shard, or zarr v2, compressed with zstd.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeconv.orbax.trees import KeyPath
from moeconv.tensor.dtypes import DTYPES
from moeconv.untrusted import strict_json

_HANDLER = "orbax.checkpoint.experimental.v1._src.PyTreeHandler"
# Metadata of arrays are kept in the tree, chunks in data files (Orbax's numbers); a node is small,
# as every commit writes those that it changes anew.
_OCDBT = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 1 << 20}


@dataclass(frozen=True)
class WrittenArray:
    """One leaf.

    Attributes:
        path: Its key path in the whole tree.
        shape: Its shape.
        dtype: A key of `DTYPES`.
        chunk: Shape of what is stored at once.
    """

    path: KeyPath
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of its folder, or its keys in the database."""
        return ".".join(self.path)


def array_spec(items: Path, array: WrittenArray, *, zarr3: bool, ocdbt: bool) -> dict[str, Any]:
    """What tensorstore creates, or opens, an array by."""
    base: dict[str, Any] = {"driver": "file", "path": f"{items}/"}
    if ocdbt:
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{array.name}/", "config": _OCDBT}
    else:
        kvstore = {**base, "path": f"{items}/{array.name}/"}
    return {
        "driver": "zarr3" if zarr3 else "zarr",
        "kvstore": kvstore,
        "metadata": _zarr3(array) if zarr3 else _zarr2(array),
        "store_data_equal_to_fill_value": True,
    }


def _zarr3(array: WrittenArray) -> dict[str, Any]:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    shard = {
        "chunk_shape": list(array.chunk),
        "codecs": [little, {"name": "zstd", "configuration": {"level": 1}}],
        "index_codecs": [little, {"name": "crc32c"}],
    }
    return {
        "shape": list(array.shape),
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.chunk)}},
        "codecs": [{"name": "sharding_indexed", "configuration": shard}],
    }


def _zarr2(array: WrittenArray) -> dict[str, Any]:
    return {
        "shape": list(array.shape),
        "dtype": "bfloat16" if array.dtype == "bfloat16" else DTYPES[array.dtype].str,
        "chunks": list(array.chunk),
        "compressor": {"id": "zstd", "level": 1},
        "dimension_separator": ".",
        "fill_value": None,
    }


def tree_metadata(arrays: Mapping[str, WrittenArray], *, zarr3: bool, ocdbt: bool) -> bytes:
    """Content of `_METADATA`."""
    return strict_json.dumps(
        {
            "tree_metadata": {str(array.path): _leaf(array) for array in arrays.values()},
            "use_ocdbt": ocdbt,
            "use_zarr3": zarr3,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
    )


def _leaf(array: WrittenArray) -> dict[str, Any]:
    # 2 is a key of a dict (orbax metadata/tree.py `KeyType`).
    return {
        "key_metadata": [{"key": key, "key_type": 2} for key in array.path],
        "value_metadata": {
            "value_type": "jax.Array",
            "skip_deserialize": False,
            "write_shape": list(array.chunk),
        },
    }


def step_metadata(*, scan_layers: bool) -> bytes:
    """Content of `_CHECKPOINT_METADATA`.

    The times are constants, so that the same model gives the same bytes. `scan_layers` is MaxText's
    own (common/checkpointing.py `save_checkpoint`).
    """
    return strict_json.dumps(
        {
            "item_handlers": {"items": _HANDLER},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": 1,
            "commit_timestamp_nsecs": 2,
            "custom_metadata": {"scan_layers": scan_layers},
        }
    )


COMMITTED = b"Checkpoint commit was successful."
