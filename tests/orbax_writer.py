"""Checkpoints in Orbax's layout, written with tensorstore: any shapes, any chunks, in milliseconds.

For properties that need arbitrary chunking. What MaxText itself writes is in `maxtext_lab`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorstore as ts

KeyPath = tuple[str, ...]


def write(
    step: Path,
    arrays: Mapping[KeyPath, np.ndarray],
    chunks: Mapping[KeyPath, tuple[int, ...]] | None = None,
    *,
    ocdbt: bool = True,
) -> Path:
    """Writes `<step>/items` with the arrays below `params.params`; returns the step."""
    items = step / "items"
    items.mkdir(parents=True)
    context = ts.Context()
    metadata = {}
    for path, array in arrays.items():
        full = ("params", "params", *path)
        name = ".".join(full)
        kvstore = (
            {"driver": "ocdbt", "base": f"file://{items}/", "path": f"{name}/"}
            if ocdbt
            else f"file://{items}/{name}/"
        )
        chunk = (chunks or {}).get(path, array.shape)
        store = ts.open(
            {"driver": "zarr3", "kvstore": kvstore},
            create=True,
            dtype=array.dtype,
            shape=array.shape,
            chunk_layout=ts.ChunkLayout(chunk_shape=chunk),
            codec=ts.CodecSpec({"driver": "zarr3", "codecs": [{"name": "zstd"}]}),
            context=context,
        ).result()
        store.with_transaction(None)[...].write(array).result()
        metadata[str(full)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in full],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    content = {
        "tree_metadata": metadata,
        "use_ocdbt": ocdbt,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": False,
    }
    (items / "_METADATA").write_text(json.dumps(content))
    return step
