"""Random models of random families, in any tree, item, storage and fusion: equal bytes.

The expected bytes are those of the same model as MaxText's trainer saves it: `params.params` in
`items`, one OCDBT store, nothing fused, whole arrays.
"""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import synthetic
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from inputs_lab import as_leaf, converted
from test_fused import fuse

from moeconv.families import blocks
from moeconv.orbax.locate import ITEMS

ROOTS = [("params", "params"), ("params",), ("base",), ("model",), ()]
NOISE = {
    ("step",): np.ones((), np.int32),
    ("opt_state", "0", "mu", "params", "decoder", "x"): np.ones(3, np.float32),
    ("opt_state", "acc_grads", "decoder", "x"): np.ones(3, np.float32),
    ("optimizer", "opt_state", "1", "count", "value"): np.ones((), np.int32),
}
# Where a variable that is no `nnx.Param` may be, beside `params.params`.
COLLECTIONS = ["params", "MoEBiasVar", "nnx_aux"]


@cache
def folder():
    return Path(tempfile.mkdtemp())


@cache
def usual(block, scanned, tied, layers):
    place = folder() / f"{block}-{scanned}-{tied}-{layers}"
    made = synthetic.write(
        place / "run", block, scanned=scanned, tied=tied, sizes={"L": layers, "E": 8}
    )
    return converted(made, place / "out")[0]


def variables(block):
    """Names, without the layer, of parameters that may be in a collection of their own."""
    return [p.name for p in blocks()[block].parameters().values() if p.variable]


@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_any_input(data):
    block = data.draw(st.sampled_from(sorted(synthetic.BLOCKS)), "block")
    scanned, tied = data.draw(st.booleans(), "scanned"), data.draw(st.booleans(), "tied")
    layers = data.draw(st.sampled_from([4, 8]), "layers")
    root = data.draw(st.sampled_from(ROOTS), "root")
    value, listed = data.draw(st.booleans(), "value"), data.draw(st.booleans(), "listed")
    collection = data.draw(st.sampled_from(COLLECTIONS), "collection") if len(root) == 2 else ""
    parts = data.draw(st.sampled_from([0, 0, 1, 3]), "parts")
    ocdbt = bool(parts) or data.draw(st.booleans(), "ocdbt")
    fused = {what: data.draw(st.booleans(), what) for what in ("moe", "mlp", "qkv")}
    axes = synthetic.parameter_axes(block, layers=layers, tied=tied, scanned=scanned)
    aside = variables(block) if collection in ("MoEBiasVar", "nnx_aux") else []
    plain = as_leaf(*root, value=value, listed=listed)
    event(f"{block}, {'.'.join(root) or 'top'}")

    def rename(path):
        if any(".".join(path).endswith(name) for name in aside):
            beside = ("nnx_aux", "model") if collection == "nnx_aux" else ("params", collection)
            return (*beside, *path)
        return plain(path)

    def change(arrays):
        for name in arrays:
            if any(name.endswith(each) for each in aside) and "L" in axes[name]:
                values = np.moveaxis(arrays[name], axes[name].index("L"), 0)
                arrays[name] = np.ascontiguousarray(values)
                del axes[name]
        fuse(arrays, axes, **fused)

    noise = dict(NOISE) if data.draw(st.booleans(), "noise") else {}
    if noise and root:
        noise[(*root, "vision_encoder", "x")] = np.ones((2, 3), np.float32)
    place = Path(tempfile.mkdtemp(dir=folder()))
    made = synthetic.write(
        place / "run",
        block,
        scanned=scanned,
        tied=tied,
        sizes={"L": layers, "E": 8},
        split={letter: data.draw(st.integers(1, 3), letter) for letter in "DEHM"},
        change=change,
        item=data.draw(st.sampled_from([*ITEMS, "weights", ""]), "item"),
        rename=rename,
        parts=parts,
        ocdbt=ocdbt,
        zarr3=data.draw(st.booleans(), "zarr3"),
        beside=noise,
    )
    spec = data.draw(st.sampled_from([made.run, made.step_dir, made.items]), "spec")
    assert converted(made, place / "out", spec)[0] == usual(block, scanned, tied, layers)
    shutil.rmtree(place)
