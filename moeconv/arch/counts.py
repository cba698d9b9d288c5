"""How many parameters a model has, and how many of them one token passes through."""

import math
from dataclasses import dataclass

from moeconv.arch.blocks import Block
from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import is_blocked


@dataclass(frozen=True)
class Counts:
    """Parameters of a model.

    Attributes:
        total: All of them; a tied table counts once, a dense layer has one MLP.
        active: Those that one token uses: `num_experts_per_tok` of the experts.
        embedding: Those of the token table, which are part of both.
    """

    total: int
    active: int
    embedding: int


def count(model: ModelDescription, block: Block) -> Counts:
    """Counts from the sizes."""
    sizes = model.sizes()
    experts_used = (model.num_experts_per_tok or 0) / (model.num_experts or 1)
    total, active = 0, 0
    outer = block.outer[:-1] if model.tie_word_embeddings else block.outer
    for parameters in (outer, *(block.layers[kind] for kind in model.layer_kinds)):
        for parameter in parameters:
            if any(is_blocked(axis) for axis in parameter.axes):
                continue  # scales are no parameters of the model
            number = math.prod(sizes[axis] for axis in parameter.axes)
            total += number
            is_expert = parameter.axes[0] == "E" and len(parameter.axes) > 1
            active += round(number * experts_used) if is_expert else number
    return Counts(total, active, model.vocab_size * model.hidden_size)
