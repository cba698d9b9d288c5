"""What MaxText's decoder gives a layer beside hidden states, where it has more to give.

Layers of Gemma 4 E2B and E4B have an input of their own, made of tokens and embeddings, and the
last of them the keys and values of earlier ones (MaxText layers/nnx_decoders.py
`_apply_gemma4_small_layers`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeconv.tensor.axes import Array

KEY, VALUE = "shared_key", "shared_value"


class Beside:
    """The inputs of the layers of one run, which are asked for in order; none at first."""

    def __init__(self) -> None:
        self._inputs: Array | None = None
        self._shared: dict[Any, tuple[Array, Array]] = {}

    def start(self, inputs: Array | None) -> None:
        """Another run begins.

        Args:
            inputs: Of every layer, [B, T, L, p]; None where they have none.
        """
        self._inputs = inputs
        self._shared = {}

    def given(self, layer: Any, number: int, rows: int) -> dict[str, Array]:
        """Named arguments of a layer.

        Args:
            layer: MaxText's.
            number: Its number.
            rows: Of the hidden states: those of the run, or several times these.
        """
        found: dict[str, Array] = {}
        if self._inputs is not None:
            own = self._inputs[..., number, :]
            found["per_layer_input"] = np.tile(own, (rows // len(own), 1, 1))
        if getattr(layer, "is_shared", False):
            # The last layer of the same attention that has its own (models/gemma4_small.py
            # `kv_donor_layer_idx`).
            found[KEY], found[VALUE] = self._shared[layer.attention_type]
        return found

    def keep(self, layer: Any, found: Mapping[str, Array]) -> None:
        """Keeps the keys and values of a layer for later ones, if it has given any."""
        if KEY in found:
            self._shared[layer.attention_type] = found[KEY], found[VALUE]


def with_own_keys(layer: Any, hidden: Any, at: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Beside.given` with a layer's own keys and values, if others may use them.

    Args:
        layer: MaxText's, within jit.
        hidden: Its hidden states [B, T, D].
        at: Their positions [B, T].
        given: The arguments.
    """
    if not hasattr(layer, "compute_shared_kv") or layer.is_shared:
        return {**given}
    key, value = layer.compute_shared_kv(hidden, at)
    return {**given, KEY: key, VALUE: value}
