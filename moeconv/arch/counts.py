"""How many parameters a model has, and how many of them one token passes through."""

import math
from dataclasses import dataclass

from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import OUTPUT_HEAD, PARAMETERS, axis_name


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


def count(model: ModelDescription) -> Counts:
    """Counts from the sizes."""
    sizes = {
        "V": model.vocab_size,
        "D": model.hidden_size,
        "H": model.num_attention_heads,
        "K": model.num_key_value_heads,
        "h": model.head_dim,
        "F": model.intermediate_size or 0,
        "F_moe": model.moe_intermediate_size or 0,
        "E": model.num_experts or 0,
    }
    experts_used = (model.num_experts_per_tok or 0) / (model.num_experts or 1)
    total, active = 0, 0
    for parameter in PARAMETERS.values():
        if parameter is OUTPUT_HEAD and model.tie_word_embeddings:
            continue
        times = 1
        if parameter.layers is not None:
            times = sum(kind in parameter.layers for kind in model.layer_kinds)
        number = times * math.prod(sizes[axis_name(parameter, axis)] for axis in parameter.axes)
        total += number
        expert = parameter.axes[0] == "E"
        active += round(number * experts_used) if expert else number
    return Counts(total, active, model.vocab_size * model.hidden_size)
