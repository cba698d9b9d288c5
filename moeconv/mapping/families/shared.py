"""What all targets share: attention, norms, embeddings, the common part of config.json."""

from typing import Any

from moeconv.arch.description import ModelDescription
from moeconv.mapping.rules import (
    EVERY_LAYER,
    LOGIT_SCALE,
    QUERY_SCALE,
    TIED_BUT_UNTIE,
    UNTIED,
    ConfigKey,
    Options,
    Rule,
    When,
    constant,
    from_field,
)

# fmt: off
TRUNK = (
    Rule("token_embedder.embedding",  "model.embed_tokens.weight", "V D -> V D"),
    Rule("decoder.decoder_norm.scale", "model.norm.weight",        "D -> D", scale=LOGIT_SCALE),
    Rule("decoder.logits_dense.kernel", "lm_head.weight",          "D V -> V D", when=UNTIED),
    Rule("token_embedder.embedding",  "lm_head.weight",            "V D -> V D",
         when=TIED_BUT_UNTIE, again=True),
)

ATTENTION = (
    Rule("pre_self_attention_layer_norm.scale",  "model.layers.{L}.input_layernorm.weight",
         "D -> D", layers=EVERY_LAYER),
    Rule("self_attention.query.kernel", "model.layers.{L}.self_attn.q_proj.weight",
         "D H h -> (H h) D", scale=QUERY_SCALE, rotary=True, layers=EVERY_LAYER),
    Rule("self_attention.key.kernel",   "model.layers.{L}.self_attn.k_proj.weight",
         "D K h -> (K h) D", rotary=True, layers=EVERY_LAYER),
    Rule("self_attention.value.kernel", "model.layers.{L}.self_attn.v_proj.weight",
         "D K h -> (K h) D", layers=EVERY_LAYER),
    Rule("self_attention.out.kernel",   "model.layers.{L}.self_attn.o_proj.weight",
         "H h D -> D (H h)", layers=EVERY_LAYER),
    Rule("post_self_attention_layer_norm.scale", "model.layers.{L}.post_attention_layernorm.weight",
         "D -> D", layers=EVERY_LAYER),
)
# fmt: on


def rope_parameters(model: ModelDescription) -> dict[str, Any]:
    """`rope_parameters` of transformers 5: the type, its numbers and theta in one place.

    The scaling numbers of Llama 3.1 are constants in MaxText
    (layers/embeddings.py `LLaMARotaryEmbedding._apply_scaling_factor`).
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_type == "llama3.1" and model.rope_use_scale:
        rope = {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return {**rope, "rope_theta": model.rope_theta}


def rope_scaling(model: ModelDescription) -> dict[str, Any] | None:
    """`rope_scaling` of transformers 4, llama.cpp and mlx-lm: None when nothing is scaled."""
    rope = rope_parameters(model)
    del rope["rope_theta"]
    return None if rope["rope_type"] == "default" else rope


def has_scaled_rope(model: ModelDescription) -> bool:
    """Whether the rotary frequencies are scaled as in Llama 3.1."""
    return rope_scaling(model) is not None


def tied(model: ModelDescription, options: Options) -> bool:
    """`tie_word_embeddings` of the output."""
    return model.tie_word_embeddings and not options.untie


SCALED_ROPE = When("RoPE is scaled", lambda m, o: has_scaled_rope(m))

CONFIG: tuple[ConfigKey, ...] = (
    from_field("vocab_size"),
    from_field("hidden_size"),
    from_field("num_hidden_layers"),
    from_field("num_attention_heads"),
    from_field("num_key_value_heads"),
    from_field("head_dim"),
    constant("hidden_act", "silu"),
    from_field("max_position_embeddings"),
    from_field("rms_norm_eps"),
    from_field("rope_theta"),
    ConfigKey("rope_scaling", lambda m, o: rope_scaling(m), "RoPE type, for transformers 4"),
    ConfigKey("rope_parameters", lambda m, o: rope_parameters(m), "RoPE type and theta, for 5"),
    ConfigKey("tie_word_embeddings", tied, "`tie_word_embeddings`, false with `--untie`"),
    from_field("bos_token_id"),
    from_field("eos_token_id"),
    from_field("pad_token_id"),
    constant("attention_dropout", 0.0),
    constant("initializer_range", 0.02),
    constant("use_cache", True),
)
