"""How the config.json of a Llama 4 is read, on the way from Hugging Face to MaxText."""

from typing import Any

from moeconv.arch.parameters import DENSE, MOE
from moeconv.families._shared import DERIVED, rope_reading
from moeconv.mapping.reading import Config, Reading, multimodal

FULL, CHUNKED = "full_attention", "chunked_attention"


def _no_rope(config: Config) -> list[int]:
    interval = config.get("no_rope_layer_interval") or 4
    return [int((n + 1) % interval != 0) for n in range(config["num_hidden_layers"])]


def _reading_fields(config: Config) -> dict[str, Any]:
    routed = set(config["moe_layers"])
    kinds = [MOE if n in routed else DENSE for n in range(config["num_hidden_layers"])]
    width = config["intermediate_size"]
    return {
        **rope_reading(config),
        "layer_kinds": kinds,
        "intermediate_size": config["intermediate_size_mlp"] if DENSE in kinds else None,
        "moe_intermediate_size": width,
        "shared_intermediate_size": width,
    }


def _reading_settings(config: Config) -> dict[str, Any]:
    without = [n for n, rotated in enumerate(config["no_rope_layers"], 1) if not rotated]
    return {
        "nope_layer_interval": without[0] if without else -1,
        "use_qk_norm": bool(config["use_qk_norm"]),
        "temperature_tuning": bool(config["attn_temperature_tuning"]),
    }


READING = Reading(
    {
        **DERIVED,
        "no_rope_layers": _no_rope,
        "moe_layers": lambda c: list(
            range(
                c["interleave_moe_layer_step"] - 1,
                c["num_hidden_layers"],
                c["interleave_moe_layer_step"],
            )
        ),
        "layer_types": lambda c: [CHUNKED if r else FULL for r in c["no_rope_layers"]],
    },
    _reading_fields,
    _reading_settings,
    multimodal=(
        multimodal(
            "Llama4ForConditionalGeneration",
            ("vision_model", "vision model"),
            ("multi_modal_projector", "projector of images"),
        ),
    ),
    ignored=frozenset({"cache_implementation", "for_llm_compressor", "no_rope_layer_interval"}),
)
