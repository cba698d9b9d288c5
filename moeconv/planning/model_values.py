"""A model's description, read back from the JSON of a manifest or a plan."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from moeconv.arch.description import ModelDescription
from moeconv.families import blocks

# More than any size or id of a model; two of them multiplied are still a number of 64 bits.
_LARGEST = 2**31
_DESCRIPTION = TypeAdapter(ModelDescription)


def model_of(values: Mapping[str, Any]) -> ModelDescription:
    """The model that has these values (`ModelDescription.values`).

    Raises:
        ValueError: One is missing, there is one too many, or one is none that a model has.
    """
    model = _DESCRIPTION.validate_json(json.dumps(dict(values)), strict=True)
    kinds = set(model.layer_kinds)
    block = blocks().get(model.decoder_block)
    wanted: list[Any] = [kinds, block and not kinds - set(block.layers)]
    wanted.append(not values.keys() - model.values().keys())
    # Sizes and ids are multiplied, and go into 64 bits.
    wanted += [abs(value) < _LARGEST for value in values.values() if isinstance(value, int)]
    if model.dense_layers:
        wanted.append(model.intermediate_size)
    if model.moe_layers:
        wanted += [model.moe_intermediate_size, model.num_experts, model.num_experts_per_tok]
    if not all(wanted):
        raise ValueError("it describes no model")
    return model
