"""Models on their way from Hugging Face to MaxText and back, small and without transformers."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorstore as ts
from checkpoints import ROWS
from cli_runner import moeconv

from moeconv.families._table import families
from moeconv.hf.safetensors import read_header
from moeconv.tensor.dtypes import DTYPES

# The blocks of which a model can be written without MaxText, and that are made of the architecture
# that each becomes by default.
BLOCKS = [
    row.decoder_block
    for row in families().rows
    if row.targets
    and row.targets[0].architecture in row.hf_to_maxtext
    and row.decoder_block in {each.block for each in ROWS.values() if each.told is not None}
]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a Hugging Face model, bit for bit."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, (spec, offset) in read_header(file).items():
            dtype = DTYPES[spec.dtype]
            count = spec.nbytes // dtype.itemsize
            values = np.fromfile(file, dtype, count, offset=offset)
            found[name] = values.reshape(spec.shape)
    return found


def arrays(run: Path) -> dict[str, np.ndarray]:
    """Every array of a MaxText run that was converted, by its name in the tree."""
    items = run / "checkpoints" / "0" / "items"
    content = json.loads((items / "_METADATA").read_text())
    found = {}
    for leaf in content["tree_metadata"].values():
        name = ".".join(key["key"] for key in leaf["key_metadata"])
        base = {"driver": "file", "path": f"{items}/"}
        kvstore: object = {"driver": "file", "path": f"{items}/{name}/"}
        if content["use_ocdbt"]:
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        driver = "zarr3" if content["use_zarr3"] else "zarr"
        store = ts.open({"driver": driver, "kvstore": kvstore}, open=True).result()
        found[name] = np.asarray(store.read().result())
    return found


def same(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> bool:
    """True if both have the same names, and the same bits under each."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:5]
    wrong = [
        name
        for name, values in ours.items()
        if (values.dtype, values.shape) != (theirs[name].dtype, theirs[name].shape)
        or values.tobytes() != theirs[name].tobytes()
    ]
    assert wrong == []
    return True


def converted(source: Path, out: Path, *flags: object) -> Path:
    """OUT, of `moeconv convert`, which must succeed."""
    ran = moeconv("convert", source, out, "--quiet", *flags)
    assert ran.code == 0, ran.err
    return out
