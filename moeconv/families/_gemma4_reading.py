"""How the config.json of a Gemma 4 is read, for the way from Hugging Face to MaxText."""

from typing import Any

from moeconv.errors import UnsupportedError
from moeconv.families._gemma4 import PATTERN
from moeconv.mapping.reading import Config, Reading, multimodal, ropes_of, typed


def _read_ropes(config: Config) -> dict[str, Any]:
    """Of each kind of layer; a part that is all of a head is none."""
    found = ropes_of(config, PATTERN[-1], PATTERN[0])
    for rope in found.values():
        if rope.get("partial_rotary_factor", 1.0) == 1.0:
            rope |= {"rope_type": "default"}
            rope.pop("partial_rotary_factor", None)
    return found


def _global_sizes(config: Config) -> dict[str, Any]:
    """Sizes of layers without a window, which transformers 5.23 keeps by the number of the layer.

    configuration_gemma4.py `Gemma4TextConfig.__post_init__`.
    """
    own = config.get("per_layer_config")
    if not own:
        shared = config["attention_k_eq_v"]
        heads = config.get("num_global_key_value_heads") if shared else None
        return {"head_dim": config.get("global_head_dim") or 512, "num_key_value_heads": heads}
    types = config["layer_types"]
    numbers = [n for n, kind in enumerate(types) if kind == PATTERN[-1]]
    first: dict[str, Any] = own[str(numbers[0])]
    if own != {str(n): first for n in numbers}:
        raise UnsupportedError("per_layer_config gives its layers more sizes than two")
    return first


def _reading_fields(config: Config) -> dict[str, Any]:
    half = "moe" if config["enable_moe_block"] else "dense"
    whole = "shared" if config["attention_k_eq_v"] else "global"
    sizes = _global_sizes(config)
    kinds = {PATTERN[0]: f"sliding {half}", PATTERN[-1]: f"{whole} {half}"}
    heads = sizes.get("num_key_value_heads") or config["num_key_value_heads"]
    experts = {} if half == "moe" else dict.fromkeys(_OF_EXPERTS)
    return {
        "rope_type": "default",
        "rope_theta": _read_ropes(config)[PATTERN[-1]]["rope_theta"],
        "rope_use_scale": False,
        "normalize_embedding_logits": config["tie_word_embeddings"],
        "layer_kinds": [kinds[each] for each in config["layer_types"]],
        "global_head_dim": sizes.get("head_dim", config["head_dim"]),
        "num_global_key_value_heads": heads,
        **experts,
    }


def _reading_settings(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, rope in zip(("global", "local"), _read_ropes(config).values(), strict=True):
        found[f"{place}_rope_max_timescale"] = rope["rope_theta"]
        found[f"{place}_rope_proportion"] = rope.get("partial_rotary_factor", 1.0)
    return {
        **found,
        "final_logits_soft_cap": config["final_logit_softcapping"] or 0.0,
        "norm_topk_prob": True,
        "model_name": "gemma4-26b" if config["enable_moe_block"] else "gemma4-31b",
    }


_OF_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
# What a config without RoPE means.
_ROPES = {
    PATTERN[0]: {"rope_type": "default", "rope_theta": 10_000.0},
    PATTERN[-1]: {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
}

READING = Reading(
    {
        "layer_types": typed(len(PATTERN), PATTERN[0], PATTERN[-1]),
        "rope_parameters": lambda c: _ROPES,
    },
    _reading_fields,
    _reading_settings,
    _read_ropes,
    multimodal=(
        multimodal(
            "Gemma4ForConditionalGeneration",
            ("vision_tower", "vision tower"),
            ("audio_tower", "audio tower"),
            ("embed_vision", "projector of images"),
            ("embed_audio", "projector of sound"),
            # modeling_gemma4.py `create_causal_mask_mapping`: of the tokens of an image.
            unread={"use_bidirectional_attention": "vision"},
        ),
    ),
    # Without layers that have inputs of their own; the sizes are read (`_global_sizes`).
    ignored=frozenset(
        {
            "vocab_size_per_layer_input",
            "per_layer_config",
            "global_head_dim",
            "num_global_key_value_heads",
            "cache_implementation",
        }
    ),
    unmade=frozenset({"gemma4_small"}),
)
