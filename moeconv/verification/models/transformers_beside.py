"""What a layer of transformers' model is given beside hidden states, where there is more to give.

Of tokens and embeddings, by the tensors of which each layer has a part (`Probe.parts`), and of the
layers before it, from what the run of the last one returned (`Probe.beside`).
"""

from typing import Any

from moeconv.mapping.rules import Probe
from moeconv.verification.models.transformers_tensors import Entries, StoredTensors


class Beside:
    """The inputs of the layers of one run, which are asked for in order."""

    def __init__(self, probe: Probe, stored: StoredTensors, layers: int) -> None:
        """Nothing is run yet.

        Args:
            probe: Of the architecture.
            stored: All tensors of the model.
            layers: How many it has.
        """
        self._probe, self._stored, self._layers = probe, stored, layers
        self._tokens: tuple[Any, Any] | None = None
        self._last: Any = None
        self.names = frozenset(name for name in probe.parts if name in set(stored))

    def start(self, ids: Any, embedded: Any) -> None:
        """Another run begins: of `ids` [B, T], embedded [B, T, D]."""
        self._tokens, self._last = (ids, embedded), None

    def tensors(self, number: int) -> dict[str, Any]:
        """The parts of layer `number`."""
        found = {}
        readers = self._stored.readers({name: name for name in self.names})
        for name, axis in self._probe.parts.items():
            if name not in self.names:
                continue
            entries: Entries | None = None
            if axis is not None:
                each = self._stored.shape(name)[axis] // self._layers
                part = slice(number * each, (number + 1) * each)
                entries = (*[slice(None)] * axis, part)
            found[name] = readers[name](entries)
        return found

    def inputs(self, model: Any, rows: int) -> dict[str, Any]:
        """Further arguments of the model of one layer.

        Args:
            model: It; changed by the probe so that it takes them as they are.
            rows: Of its hidden states: those of the run, or several times these.
        """
        if self._tokens is None:
            return self._probe.beside(model, None, None, None)
        ids, embedded = (
            each.repeat(rows // len(each), *[1] * (each.ndim - 1)) for each in self._tokens
        )
        return self._probe.beside(model, ids, embedded, self._last)

    def keep(self, output: Any) -> None:
        """Keeps what the model of a layer returned, for the next."""
        self._last = output
