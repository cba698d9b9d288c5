"""A model's description, read back from the JSON of a manifest or a plan."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from pydantic import TypeAdapter

from moeconv.arch.blocks import Block, settings_of
from moeconv.arch.description import ModelDescription
from moeconv.families import blocks

# More than any size or id of a model; two of them multiplied are still a number of 64 bits.
_LARGEST = 2**31
_DESCRIPTION = TypeAdapter(ModelDescription)
_FIELDS = {field.name for field in fields(ModelDescription)} - {"sources", "settings"}


def model_of(values: Mapping[str, Any]) -> ModelDescription:
    """The model that has these values (`ModelDescription.values`).

    Raises:
        ValueError: One is missing, there is one too many, or one is none that a model has.
    """
    own = {name: values[name] for name in values.keys() & _FIELDS}
    model = _DESCRIPTION.validate_json(json.dumps(own), strict=True)
    kinds = set(model.layer_kinds)
    block = blocks().get(model.decoder_block)
    wanted: list[Any] = [kinds, block and not kinds - set(block.layers)]
    if block:
        settings = {name: values[name] for name in values.keys() - _FIELDS}
        model = replace(model, settings=_settings(settings, model, block))
    # Sizes and ids are multiplied, and go into 64 bits.
    wanted += [abs(value) < _LARGEST for value in values.values() if isinstance(value, int)]
    if model.dense_layers:
        wanted.append(model.intermediate_size)
    if model.moe_layers:
        wanted += [model.moe_intermediate_size, model.num_experts, model.num_experts_per_tok]
    if not all(wanted):
        raise ValueError("it describes no model")
    return model


def _settings(found: Mapping[str, Any], model: ModelDescription, block: Block) -> dict[str, Any]:
    """The settings that a file has, which must be those of such a model.

    Raises:
        ValueError: One is missing or too many, or has a value that it cannot have.
    """
    wanted = {spec.name: spec for spec in settings_of(block, vars(model))}
    types = found.get("layer_types")
    if block.layer_types is not None:
        if not isinstance(types, list) or len(types) != model.num_hidden_layers:
            raise ValueError("layer_types is not one for each layer")
        if not all(isinstance(each, str) for each in types):
            raise ValueError("layer_types holds what is no text")
    names = {*wanted, *(["layer_types"] if block.layer_types is not None else [])}
    if names != found.keys():
        raise ValueError(f"the settings are {sorted(found)}, not {sorted(names)}")
    settings: dict[str, Any] = {}
    for name, spec in wanted.items():
        try:
            settings[name] = spec.parse(found[name])
        except (TypeError, OverflowError):
            raise ValueError(f"{name} should be {spec.expects}") from None
        if isinstance(found[name], str) and not isinstance(settings[name], str):
            raise ValueError(f"{name} should be {spec.expects}")
    return settings if types is None else {**settings, "layer_types": tuple(types)}
