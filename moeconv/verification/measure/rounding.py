"""What rounding alone does: the reference with its weights moved as much as the output rounds them.

The bounds are those that the rule table declares. Nothing is guessed: the moved model is run, and
its distance from the exact one is the scale against which a rounded output is judged.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from moeconv.mapping.edges import Edge
from moeconv.tensor.axes import Array
from moeconv.tensor.values import ValueOp

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Rounding:
    """The rounding of an array's values on their way into a tensor."""

    value: ValueOp

    def move(self, values: Array) -> Array:
        """Moves float32 values at random within half a unit in the last place of the tensor's.

        Equal arrays are moved alike, as copies are rounded alike; zeros stay.
        """
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        rng = np.random.default_rng(zlib.crc32(flat))
        moved = np.empty_like(flat)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            noise = rng.random(block.size, dtype=np.float32) - np.float32(0.5)
            moved[start : start + _BLOCK] = self.value.perturb(block, noise)
        return moved.reshape(values.shape)


def roundings(edges: Iterable[Edge]) -> Mapping[str, Rounding]:
    """How each source array is rounded on its way, by its dotted name; exact ones are left out.

    An array that feeds several tensors (a tied table written out as a head) counts with the
    coarsest.
    """
    found: dict[str, ValueOp] = {}
    for edge in edges:
        if edge.dtype == "float32":
            continue
        for part in edge.parts:
            value, name = part.form.value, part.source
            if value.bound() > (found[name].bound() if name in found else 0.0):
                found[name] = value
    return {name: Rounding(value) for name, value in found.items()}
