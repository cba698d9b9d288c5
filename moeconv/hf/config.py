"""config.json and generation_config.json, written whole.

transformers 5's `save_pretrained` drops `rope_theta`, and transformers 4, mlx-lm and llama.cpp then
load a default one silently; so both spellings of RoPE and of the dtype are written here.
"""

from collections.abc import Mapping
from typing import Any

from moeconv.arch.description import ModelDescription
from moeconv.mapping.rules import Options, Target
from moeconv.untrusted import strict_json


def model_config(
    family: Target, model: ModelDescription, dtype: str, options: Options
) -> dict[str, Any]:
    """The family's config table for one model, plus what every config has."""
    config = {
        key.key: key.value(model, options)
        for key in family.config
        if key.when.holds(model, options)
    }
    if isinstance(config.get("eos_token_id"), tuple):
        config["eos_token_id"] = list(config["eos_token_id"])  # as reading it back gives
    return {
        **config,
        "torch_dtype": dtype,
        "dtype": dtype,
        # What loads the file compares it with its own.
        "transformers_version": family.since,
    }


def generation_config(
    family: Target, model: ModelDescription, own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Token ids for `generate`; greedy unless the tokenizer's own file asks for sampling.

    Args:
        family: What is written.
        model: Its token ids are written, several as a list.
        own: What the tokenizer's own generation_config.json says
            (`moeconv.hf.tokenizer.generation.read_generation`).
    """
    ids = {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.pad_token_id,
    }
    known = {key: value for key, value in ids.items() if value is not None}
    return {
        "_from_model_config": False,
        "do_sample": False,
        **(own or {}),
        **known,
        "transformers_version": family.since,
    }


def to_json(content: Any) -> bytes:
    """JSON as Hugging Face lays it out; the same content gives the same bytes.

    Raises:
        ValueError: JSON cannot hold it.
    """
    return strict_json.dumps(content)
