"""Whole models as checkpoints of any size and with any damage, in milliseconds, without MaxText."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax_writer
import yaml
from checkpoints import ROWS
from checkpoints.row import Settings

from moeconv.arch.layout import Layout, build_layout
from moeconv.arch.parameters import LayerKind
from moeconv.arch.stacks import CYCLED
from moeconv.families import blocks

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

# L layers; the others are those of arch/parameters.py.
SIZES: Mapping[str, int] = {
    "L": 4, "V": 64, "D": 16, "F": 24, "M": 24, "E": 4, "H": 4, "K": 2, "h": 4,
    "S": 48, "n": 16, "m": 8, "q": 11, "c": 10, "v": 5, "r": 10 + 4, "k": 6 + 4, "b": 6 + 5,
    "I": 3, "i": 6,
    "O": 4 * 4, "Q": 2 * 4, "u": 1, "w": 4, "d": 3, "W": 12, "t": 3, "y": 8,
    "C": 2 * 10 + 12, "Z": 2 * 10 + 2 * 12, "J": 1, "j": 6,
    "P": 72, "x": 3, "f": 48, "p": 7, "A": 10 * 7, "U": 67,
}  # fmt: skip

# What shapes cannot tell, as in a user's YAML.
TOLD: Mapping[str, object] = {
    "num_experts_per_tok": 2,
    "rope_max_timescale": 500_000,
    "max_target_length": 64,
}
# The rows of the table that are written here, by their block.
_ROWS = {row.block: row for row in ROWS.values() if row.told is not None}
BLOCKS: Mapping[str, Settings] = {block: row.told or {} for block, row in _ROWS.items()}
ONE_WIDTH = frozenset(block for block, row in _ROWS.items() if row.one_width)
WHOLE_SHARES = frozenset(block for block, row in _ROWS.items() if row.whole_shares)
ONE_KV = frozenset(block for block, row in _ROWS.items() if row.one_kv)
FULL_HEADS = frozenset(block for block, row in _ROWS.items() if row.full_heads)
FOLLOWING: Mapping[str, tuple[str, str]] = {
    block: row.following for block, row in _ROWS.items() if row.following
}
PATTERNS: Mapping[str, tuple[str, ...]] = {
    block: row.pattern for block, row in _ROWS.items() if row.pattern
}
LAST: Mapping[str, tuple[str, str]] = {block: row.last for block, row in _ROWS.items() if row.last}


@dataclass(frozen=True)
class Synthetic:
    """A checkpoint on disk, and what is in it."""

    run: Path
    step_dir: Path
    config: Mapping[str, object]
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    axes: Mapping[str, str] = field(repr=False)

    item: str = "items"

    @property
    def items(self) -> Path:
        return self.step_dir / self.item

    def config_file(self, folder: Path | None = None, **changes: object) -> Path:
        """The run's YAML; `changes` replace or, with None, remove keys."""
        told = {k: v for k, v in {**self.config, **changes}.items() if v is not None}
        path = (folder or self.run) / "config.yml"
        path.write_text(yaml.safe_dump(told))
        return path


def cycle_of(block: str, layers: int) -> list[LayerKind]:
    """The layers of a block that is repeated: one of each kind of MLP, or the first kind alone."""
    page = blocks()[block]
    if block in FOLLOWING:
        first, other = map(LayerKind, FOLLOWING[block])
        return [first, *[other] * (layers - 1)]
    if block in PATTERNS:
        return [LayerKind(kind) for kind in PATTERNS[block]]
    if block in LAST:
        other, last = map(LayerKind, LAST[block])
        return [other, other, last] if keeps_rest(block) else [other, last]
    kinds = list(page.layers)
    if CYCLED in page.stackings:
        return [kind for kind in kinds if kind.attention == kinds[0].attention]
    return kinds[:1]


def can_scan(block: str) -> bool:
    """True if MaxText can stack the block's layers."""
    return any(way.scanned for way in blocks()[block].stackings)


def keeps_rest(block: str) -> bool:
    """True if layers that do not fill a block have a stack of their own."""
    ways = (way for way in blocks()[block].stackings if way.scanned)
    return can_scan(block) and next(ways).segments[-1].optional


def layout_of(
    block: str,
    *,
    layers: int,
    tied: bool = True,
    scanned: bool = True,
    axis: int = 1,
    sizes: Mapping[str, int] = SIZES,
    kinds: Sequence[LayerKind] | None = None,
) -> Layout:
    """The arrays that MaxText gives a model; `layers` of them, in blocks of `kinds`.

    Of a pattern there are as many more as fill it.
    """
    page = blocks()[block]
    scanned = scanned and can_scan(block)
    kinds = cycle_of(block, layers) if kinds is None else list(kinds)
    if block in PATTERNS:
        layers += -layers % len(kinds)
    depth = layers // len(kinds)
    ways = [way for way in page.stackings if way.scanned == scanned]
    way = ways[0] if len(kinds) > 1 or len(ways) == 1 else ways[-1]
    if not scanned:  # several differ in where a kind of attention may be
        way = next(w for w in ways if all(
            module.may_have(kind, number)
            for kind, (number, module) in zip(kinds, w.modules(kinds), strict=False)
        ))  # fmt: skip
    rest = layers % len(kinds) if keeps_rest(block) else 0
    shape = [(len(kinds), depth) if scanned else (depth * len(kinds) + rest, 1)]
    kinds = kinds * depth + kinds[:rest]
    if scanned and way.paired > 1:
        shape = [(way.paired, depth // way.paired)]
    if way.name == "remainder":
        shape = [(1, layers - 1), (1, 1)] if layers > 1 else [(0, 0), (1, 1)]
    elif way.segments[-1].optional:
        shape.append((1, rest))
    elif len(way.segments) > 1:
        counts = [sum(k in each.modules[0].kinds for k in kinds) for each in way.segments]
        shape = [(1, count) if scanned else (count, 1) for count in counts]
    return build_layout(page, way, kinds, sizes, blocks=shape, scan_axis=axis, tied=tied)


def parameter_axes(block: str, *, layers: int, tied: bool, scanned: bool) -> dict[str, str]:
    """Name and axes of every array of a model."""
    layout = layout_of(block, layers=layers, tied=tied, scanned=scanned)
    return {array.name: "".join(array.axes) for array in layout.arrays}


def write(
    run: Path,
    block: str = "mixtral",
    *,
    sizes: Mapping[str, int] | None = None,
    tied: bool = True,
    scanned: bool = True,
    split: Mapping[str, int] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    step: int = 0,
    change: Callable[[dict[str, np.ndarray]], None] = lambda arrays: None,
    **storage: Any,
) -> Synthetic:
    """Writes `<run>/checkpoints/<step>/items`.

    Args:
        run: The run's directory.
        block: `decoder_block`.
        sizes: Over `SIZES`.
        tied: No output head of its own.
        scanned: Layers stacked on axis 1, where MaxText can.
        split: Number of chunks along an axis, by its letter; one by default.
        dtype: Of all arrays.
        seed: Chooses the values.
        step: The step's number.
        change: Damages the arrays (by dotted name) before they are written.
        storage: See `orbax_writer.write`.
    """
    sizes = {**SIZES, **(sizes or {})}
    scanned = scanned and can_scan(block)
    if block in ONE_WIDTH:
        sizes["S"] = sizes["M"]
    if block in ONE_KV:
        sizes["J"] = sizes["K"]
    layout = layout_of(block, layers=sizes["L"], tied=tied, scanned=scanned, sizes=sizes)
    apart = {array.name: array.axes for array in layout.arrays}
    axes = {name: "".join(each) for name, each in apart.items()}
    arrays = {}
    for name, shape in ((array.name, array.shape) for array in layout.arrays):
        # Of its own, so that no other array changes these values.
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(shape, dtype=np.float32)
        values *= 0.1
        arrays[name] = (values + (1 if name.endswith("scale") else 0)).astype(DTYPES[dtype])
    change(arrays)
    chunks = {
        tuple(name.split(".")): tuple(
            -(-n // (split or {}).get(a, 1)) for a, n in zip(apart[name], value.shape, strict=False)
        )
        for name, value in arrays.items()
        if name in apart and len(apart[name]) == value.ndim
    }
    step_dir = orbax_writer.write(
        run / "checkpoints" / str(step),
        {tuple(name.split(".")): value for name, value in arrays.items()},
        chunks,
        scan_layers=scanned,
        **storage,
    )
    item = storage.get("item", "items")
    return Synthetic(run, step_dir, {**TOLD, **BLOCKS[block]}, arrays, axes, item)
