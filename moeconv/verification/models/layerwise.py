"""A model taken layer by layer: the interface that MaxText and transformers both have here."""

from dataclasses import dataclass
from typing import Protocol

from moeconv.tensor.axes import Array
from moeconv.verification.models.maxtext_head import Head


@dataclass(frozen=True)
class LayerTrace:
    """What one decoder layer computes; B rows, T positions, D hidden size, E experts; float32.

    Attributes:
        attention: [B, T, D], after the output projection, before it is added to the residual.
        router: [B, T, E], the scores by which experts are ranked; None in a dense layer.
        experts: [B, T, D], the feed-forward half (experts or a dense MLP) before it is added.
        output: [B, T, D], the layer's hidden states.
    """

    attention: Array
    router: Array | None
    experts: Array
    output: Array


class LayerwiseModel(Protocol):
    """One of the two models. Layers are asked for in order; one at a time is in memory."""

    name: str
    num_layers: int

    def embed(self, tokens: Array) -> Array:
        """Hidden states [B, T, D] of integer `tokens` [B, T]."""
        ...

    def layer(self, number: int, hidden: Array) -> LayerTrace:
        """Runs layer `number` (from 0) on hidden states [B, T, D], causally, positions from 0."""
        ...

    def norm(self, hidden: Array) -> Array:
        """The final norm of [B, T, D]."""
        ...

    def logits(self, normed: Array, head: Head) -> Array:
        """Logits [B, T, V] of what `norm` gave; `head` matters to MaxText's tied head only."""
        ...

    def release(self) -> None:
        """Frees embedding, final norm and head until they are used again."""
        ...
