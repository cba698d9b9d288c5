"""Models of every family, in any tree, item, storage and fusion: equal bytes.

The expected bytes are those of the same model as MaxText's trainer saves it: `params.params` in
`items`, one OCDBT store, nothing fused, whole arrays. `test_every_family` goes through the forms in
turn, so that each run has every family and every form; `test_any_input` draws them.
"""

import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import synthetic
from checkpoints import ROWS
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
    ("inner_state", "params", "params", "decoder", "x"): np.ones(3, np.float32),
    ("outer_opt_state", "0", "trace", "decoder", "x"): np.ones(3, np.float32),
}
UNUSED = ("vision_encoder", "audio_encoder", "mtp_block")
# Where a variable that is no `nnx.Param` may be, beside `params.params`.
COLLECTIONS = ["params", "MoEBiasVar", "nnx_aux"]
NAMES = [*ITEMS, "weights", ""]
PLACES = ["run", "checkpoints", "step", "item", "actor"]
BLOCKS = sorted(synthetic.BLOCKS)


@dataclass(frozen=True)
class Form:
    """How a model is kept."""

    scanned: bool
    tied: bool
    layers: int
    root: tuple[str, ...]
    value: bool
    listed: bool
    collection: str
    parts: int
    ocdbt: bool
    zarr3: bool
    fused: dict[str, bool]
    noise: bool
    split: dict[str, int]
    item: str
    place: str


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


def check(block, form):
    """Writes a model in a form, and converts it."""
    axes = synthetic.parameter_axes(block, layers=form.layers, tied=form.tied, scanned=form.scanned)
    aside = variables(block) if form.collection in ("MoEBiasVar", "nnx_aux") else []
    plain = as_leaf(*form.root, value=form.value, listed=form.listed)

    def rename(path):
        if any(".".join(path).endswith(name) for name in aside):
            own = form.collection == "nnx_aux"
            return (*(("nnx_aux", "model") if own else ("params", form.collection)), *path)
        return plain(path)

    def change(arrays):
        for name in arrays:
            if any(name.endswith(each) for each in aside) and "L" in axes[name]:
                values = np.moveaxis(arrays[name], axes[name].index("L"), 0)
                arrays[name] = np.ascontiguousarray(values)
                del axes[name]
        fuse(arrays, axes, **form.fused)

    noise = dict(NOISE) if form.noise else {}
    if form.noise and len(form.root) == 2:
        noise["nnx_aux", "model", "decoder", "rngs", "params", "key"] = np.ones(2, np.uint32)
    if form.noise and form.root:
        noise |= {(*form.root, name, "x"): np.ones((2, 3), np.float32) for name in UNUSED}
    place = Path(tempfile.mkdtemp(dir=folder()))
    made = synthetic.write(
        place / "run",
        block,
        scanned=form.scanned,
        tied=form.tied,
        sizes={"L": form.layers, "E": 8},
        split=form.split,
        change=change,
        item=form.item,
        rename=rename,
        parts=form.parts,
        ocdbt=form.ocdbt,
        zarr3=form.zarr3,
        beside=noise,
    )
    places = {
        "run": made.run,
        "checkpoints": made.run / "checkpoints",
        "step": made.step_dir,
        "item": made.items,
        "actor": made.run,
    }
    if form.place == "actor":
        (made.run / "checkpoints" / "actor").mkdir()
        made.step_dir.rename(made.run / "checkpoints" / "actor" / made.step_dir.name)
    found, opened = converted(made, place / "out", places[form.place])
    assert found == usual(block, form.scanned, form.tied, form.layers)
    if form.noise and form.root:
        assert {name.partition(".")[0] for name in opened.dropped} >= set(UNUSED)
    shutil.rmtree(place)


def test_these_are_all_families():
    """Rows that are not written here are other models of the same decoder block."""
    assert {row.block for row in ROWS.values()} == set(BLOCKS)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_family(block):
    """The numbers of the forms have no common factor, so that all of them meet."""
    n = BLOCKS.index(block)
    aside = bool(variables(block))
    root = ROOTS[0] if aside else ROOTS[n % len(ROOTS)]
    parts = (0, 2)[n % 3 == 1]
    form = Form(
        scanned=n % 2 == 0,
        tied=n % 4 < 2,
        layers=8 if n % 14 == 0 else 4,
        root=root,
        value=n % 3 != 0,
        listed=n % 2 == 1,
        collection=COLLECTIONS[1 + n % 2] if aside else "params" if len(root) == 2 else "",
        parts=parts,
        ocdbt=bool(parts) or n % 3 == 0,
        zarr3=n % 5 < 3,
        fused={"moe": n % 2 == 0, "mlp": n % 3 < 2, "qkv": n % 4 < 2},
        noise=n % 4 != 3,
        split={"D": 1 + n % 2, "E": 1 + n % 3, "H": 2 - n % 2},
        item=NAMES[n % len(NAMES)],
        place=PLACES[n % len(PLACES)] if n >= len(PLACES) else PLACES[-1 - n],
    )
    check(block, form)


@settings(
    max_examples=3,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_any_input(data):
    block = data.draw(st.sampled_from(BLOCKS), "block")
    root = data.draw(st.sampled_from(ROOTS), "root")
    parts = data.draw(st.sampled_from([0, 0, 1, 3]), "parts")
    event(f"{block}, {'.'.join(root) or 'top'}")
    flag = st.booleans()
    form = Form(
        scanned=data.draw(flag, "scanned"),
        tied=data.draw(flag, "tied"),
        layers=data.draw(st.sampled_from([4, 8]), "layers"),
        root=root,
        value=data.draw(flag, "value"),
        listed=data.draw(flag, "listed"),
        collection=(
            data.draw(st.sampled_from(COLLECTIONS), "collection") if len(root) == 2 else ""
        ),
        parts=parts,
        ocdbt=bool(parts) or data.draw(flag, "ocdbt"),
        zarr3=data.draw(flag, "zarr3"),
        fused={what: data.draw(flag, what) for what in ("moe", "mlp", "qkv")},
        noise=data.draw(flag, "noise"),
        split={letter: data.draw(st.integers(1, 3), letter) for letter in "DEHM"},
        item=data.draw(st.sampled_from(NAMES), "item"),
        place=data.draw(st.sampled_from(PLACES), "place"),
    )
    check(block, form)
