"""What rounding alone does: the reference with its weights moved as much as the output rounds them.

The bounds are those that the rule table declares. Nothing is guessed: the moved model is run, and
its distance from the exact one is the scale against which a rounded output is judged.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from moeconv.mapping.axes import Array
from moeconv.mapping.edges import Edge
from moeconv.mapping.ops import SIGNIFICAND_BITS, Scale

_BLOCK = 1 << 22
_SMALLEST_NORMAL = {"bfloat16": 2.0**-126, "float16": 2.0**-14}


@dataclass(frozen=True)
class Rounding:
    """Rounding of `value * factor` to a dtype narrower than float32."""

    dtype: str
    factor: float

    def move(self, values: Array) -> Array:
        """Moves float32 values at random within half a unit in the last place of the dtype.

        Equal arrays are moved alike, as copies are rounded alike; zeros stay.
        """
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        rng = np.random.default_rng(zlib.crc32(flat))
        moved = np.empty_like(flat)
        step = np.float32(2.0 ** (1 - SIGNIFICAND_BITS[self.dtype]))
        smallest = np.float32(_SMALLEST_NORMAL[self.dtype])
        for start in range(0, flat.size, _BLOCK):
            scaled = flat[start : start + _BLOCK] * np.float32(self.factor)
            # The power of two below each value: its exponent bits alone.
            power = (scaled.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
            spacing = np.maximum(power, smallest) * step
            noise = rng.random(scaled.size, dtype=np.float32) - np.float32(0.5)
            noise[scaled == 0] = 0
            moved[start : start + _BLOCK] = (scaled + noise * spacing) / np.float32(self.factor)
        return moved.reshape(values.shape)


def roundings(edges: Iterable[Edge]) -> Mapping[str, Rounding]:
    """How each source array is rounded on its way, by its dotted name; exact ones are left out.

    An array that feeds several tensors (a tied table written out as a head) counts with the
    coarsest.
    """
    found: dict[str, tuple[float, Rounding]] = {}
    for edge in edges:
        bound = edge.bound()
        if edge.source is None or bound == 0.0 or edge.dtype == "float32":
            continue
        factor = next((op.factor for op in edge.ops if isinstance(op, Scale)), 1.0)
        name = edge.source.name
        if name not in found or bound > found[name][0]:
            found[name] = bound, Rounding(edge.dtype, factor)
    return {name: rounding for name, (_, rounding) in found.items()}
