"""How the config.json of a Gemma 3 is read, on the way from Hugging Face to MaxText."""

from typing import Any

from moeconv.mapping.reading import Config, Reading, multimodal, rope_fields, ropes_of, typed

SLIDING, FULL = "sliding_attention", "full_attention"
# models/gemma3.py `GEMMA3_ATTENTION_PATTERN`; the layers behind the scanned blocks begin it anew.
PATTERN = (*[SLIDING] * 5, FULL)
BY_HEAD_DIM, BY_WIDTH = ("gemma3-4b", "gemma3-12b"), "gemma3-27b"


def _reading_fields(config: Config) -> dict[str, Any]:
    full = ropes_of(config, FULL, SLIDING)[FULL]
    tied = config["tie_word_embeddings"]
    theta = {"rope_type": "default", "rope_theta": full["rope_theta"]}
    return {**rope_fields(theta), "normalize_embedding_logits": tied}


def _reading_settings(config: Config) -> dict[str, Any]:
    ropes = ropes_of(config, FULL, SLIDING)
    scaled = ropes[FULL]["rope_type"] == "linear"
    by_head = config["query_pre_attn_scalar"] == config["head_dim"]
    return {
        "model_name": BY_HEAD_DIM[0] if by_head else BY_WIDTH,
        "global_parameter_scale": 1,
        "local_rope_max_timescale": ropes[SLIDING]["rope_theta"],
        "rope_linear_scaling_factor": ropes[FULL]["factor"] if scaled else 1.0,
        "final_logits_soft_cap": config["final_logit_softcapping"] or 0.0,
    }


READING = Reading(
    {
        "layer_types": typed(len(PATTERN), SLIDING, FULL),
        "sliding_window_pattern": lambda c: len(PATTERN),
        "use_bidirectional_attention": lambda c: False,
    },
    _reading_fields,
    _reading_settings,
    lambda c: ropes_of(c, FULL, SLIDING),
    multimodal=(
        multimodal(
            "Gemma3ForConditionalGeneration",
            ("vision_tower", "vision tower"),
            ("multi_modal_projector", "projector of images"),
        ),
    ),
    ignored=frozenset({"_sliding_window_pattern", "cache_implementation", "hidden_act"}),
)
