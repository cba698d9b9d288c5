"""What pages share: parameters and rules of attention, norms, MLPs and experts; common config keys.

Sources (MaxText 0.2.5): models/llama2.py, models/mixtral.py, models/envy.py (attribute names),
layers/attentions.py `init_query_w`, `init_kv_w`, `init_out_w`, layers/linears.py `MlpBlock`,
layers/moe.py `RoutedMoE`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from moeconv import families
from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import Known
from moeconv.arch.parameters import Layers, Parameter
from moeconv.mapping.reading import Config, Reading, rope_fields, rope_of, yarn_settings
from moeconv.mapping.rules import (
    DENSE_LAYERS,
    EVERY_LAYER,
    MOE_LAYERS,
    TIED_BUT_UNTIE,
    UNTIED,
    ConfigKey,
    Factor,
    Options,
    Rule,
    When,
    constant,
    from_field,
)

# --- MaxText's parameters -------------------------------------------------------------------------


# fmt: off
def attention_parameters(module: str) -> tuple[Parameter, ...]:
    """Attention, in the module of that name, and the norms before it and before the MLP."""
    return (
        Parameter.of("pre_self_attention_layer_norm.scale",  "D"),
        Parameter.of(f"{module}.query.kernel",               "D H h"),
        Parameter.of(f"{module}.key.kernel",                 "D K h"),
        Parameter.of(f"{module}.value.kernel",               "D K h"),
        Parameter.of(f"{module}.out.kernel",                 "H h D"),
        Parameter.of("post_self_attention_layer_norm.scale", "D"),
    )


ATTENTION_PARAMETERS = attention_parameters("self_attention")
MLP_PARAMETERS = (
    Parameter.of("mlp.wi_0.kernel", "D F"),
    Parameter.of("mlp.wi_1.kernel", "D F"),
    Parameter.of("mlp.wo.kernel",   "F D"),
)


NORM_PARAMETERS = (ATTENTION_PARAMETERS[0], ATTENTION_PARAMETERS[-1])


def moe_parameters(module: str) -> tuple[Parameter, ...]:
    """Router and experts, in the module of that name."""
    return (
        Parameter.of(f"{module}.gate.kernel", "D E"),
        Parameter.of(f"{module}.wi_0",        "E D M"),
        Parameter.of(f"{module}.wi_1",        "E D M"),
        Parameter.of(f"{module}.wo",          "E M D"),
    )


def shared_parameters(module: str) -> tuple[Parameter, ...]:
    """The shared experts, which MaxText and transformers make one MLP of."""
    return (
        Parameter.of(f"{module}.wi_0.kernel", "D S"),
        Parameter.of(f"{module}.wi_1.kernel", "D S"),
        Parameter.of(f"{module}.wo.kernel",   "S D"),
    )


def shared_experts(known: Known) -> int:
    """How many shared experts a model with this description has."""
    return (known["shared_intermediate_size"] or 0) // (known["moe_intermediate_size"] or 1)


# --- MaxText's settings ---------------------------------------------------------------------------

# Read by the code of every block here, and without effect while other settings are neutral:
# layers/attention_op.py `_resolve_attention_type`, layers/attentions.py `Attention.__init__`.
IDLE = frozenset(
    {"chunk_attn_window_size", "causal_block_size", "mtp_reuse_input_embedding"}
)
# The same of experts: layers/moe.py `get_topk` (its softmax is over the chosen alone).
IDLE_MOE = frozenset({"norm_topk_prob", "model_call_mode"})
# Honoured, and what they do to a model in training is not carried over.
DROPS_TOKENS = {
    "capacity_factor": "drops tokens over an expert's capacity (with sparse_matmul=false), also in "
    "MaxText's evaluation; Hugging Face models never drop one",
    "ragged_buffer_factor": "drops tokens over an expert's buffer; Hugging Face models never drop "
    "one",
}
QUANTISES = {
    "quantization": "computes matmuls in low precision while training; the converted model "
    "computes them in full precision",
}

# --- factors --------------------------------------------------------------------------------------
# fmt: on

QUERY_SCALE = Factor(
    "sqrt(head_dim)",
    "the decoder block folds 1/sqrt(head_dim) into the query kernel (MaxText layers/attentions.py "
    "`init_query_w`), Hugging Face divides the scores instead",
    lambda m: (
        math.sqrt(m.head_dim) if families.blocks()[m.decoder_block].query_scale_in_kernel else None
    ),
)

LOGIT_SCALE = Factor(
    "1/sqrt(hidden_size)",
    "with tied logits and `normalize_embedding_logits` MaxText divides the logits by "
    "sqrt(hidden_size) (layers/nnx_decoders.py `apply_output_head`), Hugging Face does not; the "
    "final norm feeds only the output head, so the factor moves into its weight",
    lambda m: (
        1.0 / math.sqrt(m.hidden_size)
        if m.tie_word_embeddings and m.normalize_embedding_logits
        else None
    ),
)

# --- rules ----------------------------------------------------------------------------------------

# fmt: off
TRUNK = (
    Rule("token_embedder.embedding",  "model.embed_tokens.weight", "V D -> V D"),
    Rule("decoder.decoder_norm.scale", "model.norm.weight",        "D -> D", scale=LOGIT_SCALE),
    Rule("decoder.logits_dense.kernel", "lm_head.weight",          "D V -> V D", when=UNTIED),
    Rule("token_embedder.embedding",  "lm_head.weight",            "V D -> V D",
         when=TIED_BUT_UNTIE, shared=True),
)


def attention(module: str) -> tuple[Rule, ...]:
    """Attention in the module of that name, and the norms before it and before the MLP."""
    place = "model.layers.{L}"
    return (
        Rule("pre_self_attention_layer_norm.scale", f"{place}.input_layernorm.weight",
             "D -> D", layers=EVERY_LAYER),
        Rule(f"{module}.query.kernel", f"{place}.self_attn.q_proj.weight",
             "D H h -> (H h) D", scale=QUERY_SCALE, rotary=True, layers=EVERY_LAYER),
        Rule(f"{module}.key.kernel",   f"{place}.self_attn.k_proj.weight",
             "D K h -> (K h) D", rotary=True, layers=EVERY_LAYER),
        Rule(f"{module}.value.kernel", f"{place}.self_attn.v_proj.weight",
             "D K h -> (K h) D", layers=EVERY_LAYER),
        Rule(f"{module}.out.kernel",   f"{place}.self_attn.o_proj.weight",
             "H h D -> D (H h)", layers=EVERY_LAYER),
        Rule("post_self_attention_layer_norm.scale", f"{place}.post_attention_layernorm.weight",
             "D -> D", layers=EVERY_LAYER),
    )


ATTENTION = attention("self_attention")
NORMS = (ATTENTION[0], ATTENTION[-1])


def mlp(module: str, place: str, width: str, layers: Layers) -> tuple[Rule, ...]:
    """A gated MLP.

    Args:
        module: MaxText's.
        place: The target's.
        width: The axis of its width.
        layers: Those that have it.
    """
    up, down = f"D {width} -> {width} D", f"{width} D -> D {width}"
    return (
        Rule(f"{module}.wi_0.kernel", f"{place}.gate_proj.weight", up,   layers=layers),
        Rule(f"{module}.wi_1.kernel", f"{place}.up_proj.weight",   up,   layers=layers),
        Rule(f"{module}.wo.kernel",   f"{place}.down_proj.weight", down, layers=layers),
    )


MLP = mlp("mlp", "model.layers.{L}.mlp", "F", DENSE_LAYERS)


def fused_experts(module: str) -> tuple[Rule, ...]:
    """Experts as modules of transformers 5 hold them, and save them unless it undoes that.

    Source: transformers core_model_loading.py `revert_weight_conversion`, modeling_mixtral.py
    `MixtralExperts`.

    Args:
        module: MaxText's, of `moe_parameters`.
    """
    place = "model.layers.{L}.mlp.experts"
    return (
        Rule((f"{module}.wi_0", f"{module}.wi_1"), f"{place}.gate_up_proj",
             "E D M -> E (g M) D", layers=MOE_LAYERS),
        Rule(f"{module}.wo", f"{place}.down_proj", "E M D -> E D M", layers=MOE_LAYERS),
    )


def experts(module: str, block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Router and experts.

    Args:
        module: MaxText's, of `moe_parameters`.
        block: The target's, below the layer.
        gate: Names of its projections.
        up: Likewise.
        down: Likewise.
    """
    place = "model.layers.{L}." + block
    return (
        Rule(f"{module}.gate.kernel", f"{place}.gate.weight", "D E -> E D", layers=MOE_LAYERS),
        Rule(f"{module}.wi_0", f"{place}.experts.{{E}}.{gate}.weight",
             "D M -> M D", layers=MOE_LAYERS),
        Rule(f"{module}.wi_1", f"{place}.experts.{{E}}.{up}.weight",
             "D M -> M D", layers=MOE_LAYERS),
        Rule(f"{module}.wo", f"{place}.experts.{{E}}.{down}.weight",
             "M D -> D M", layers=MOE_LAYERS),
    )
# fmt: on


# --- config.json ----------------------------------------------------------------------------------


def rope_parameters(model: ModelDescription) -> dict[str, Any]:
    """`rope_parameters` of transformers 5: the type, its numbers and theta in one place.

    The scaling numbers of Llama 3.1 are constants in MaxText
    (layers/embeddings.py `LLaMARotaryEmbedding._apply_scaling_factor`). Of YaRN MaxText scales what
    it rotates by 0.1·ln(factor) + 1 or not at all (`YarnRotaryEmbedding`); the first is what
    transformers does where nothing is said (modeling_rope_utils.py `_compute_yarn_parameters`).
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_type == "yarn":
        names = ("beta_fast", "beta_slow", "original_max_position_embeddings")
        rope = {
            "rope_type": "yarn",
            "factor": model.settings["rope_factor"],
            **{name: model.settings[name] for name in names},
            "truncate": model.settings["rope_truncate"],
        }
        if not model.settings["rope_attention_scaling"]:
            rope["attention_factor"] = 1.0
    if model.rope_type == "llama3.1" and model.rope_use_scale:
        rope = {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return {**rope, "rope_theta": model.rope_theta}


def positions(model: ModelDescription) -> int:
    """`max_position_embeddings`: the context, as long as YaRN makes it where there is YaRN."""
    found: int = model.settings.get("rope_positions", model.max_position_embeddings)
    return found


def rope_scaling(model: ModelDescription) -> dict[str, Any] | None:
    """`rope_scaling` of transformers 4, llama.cpp and mlx-lm: None when nothing is scaled."""
    rope = rope_parameters(model)
    del rope["rope_theta"]
    return None if rope["rope_type"] == "default" else rope


def has_scaled_rope(model: ModelDescription) -> bool:
    """True if the rotary frequencies are scaled as in Llama 3.1."""
    return model.rope_type == "llama3.1" and rope_scaling(model) is not None


def setting(key: str, name: str) -> ConfigKey:
    """A key that copies a setting of the model's description."""
    return ConfigKey(key, lambda m, o: m.settings[name], f"`{name}`", setting=name)


def tied(model: ModelDescription, options: Options) -> bool:
    """`tie_word_embeddings` of the output."""
    return model.tie_word_embeddings and not options.untie


def untied_by_sglang(model: ModelDescription, options: Options) -> list[str]:
    """What is said of a tied model whose class in SGLang always has a head of its own.

    SGLang 0.5.23 (srt/models/mixtral.py, qwen3_moe.py, gpt_oss.py) makes `lm_head` and never looks
    at `tie_word_embeddings`.
    """
    if not tied(model, options):
        return []
    return [
        "SGLang does not tie the head of this architecture to the embedding, and computes "
        "something else without a word; --untie writes the head"
    ]


SCALED_ROPE = When("RoPE is scaled", lambda m, o: has_scaled_rope(m))

CONFIG: tuple[ConfigKey, ...] = (
    from_field("vocab_size"),
    from_field("hidden_size"),
    from_field("num_hidden_layers"),
    from_field("num_attention_heads"),
    from_field("num_key_value_heads"),
    from_field("head_dim"),
    constant("hidden_act", "silu"),
    ConfigKey(
        "max_position_embeddings",
        lambda m, o: positions(m),
        "`max_position_embeddings`, with YaRN MaxText's setting of that name",
        field="max_position_embeddings",
    ),
    from_field("rms_norm_eps"),
    from_field("rope_theta"),
    ConfigKey("rope_scaling", lambda m, o: rope_scaling(m), "RoPE type, for transformers 4"),
    ConfigKey("rope_parameters", lambda m, o: rope_parameters(m), "RoPE type and theta, for 5"),
    ConfigKey(
        "tie_word_embeddings",
        tied,
        "`tie_word_embeddings`, false with `--untie`",
        field="tie_word_embeddings",
    ),
    from_field("bos_token_id"),
    from_field("eos_token_id"),
    from_field("pad_token_id"),
    constant("attention_dropout", 0.0),
    constant("initializer_range", 0.02),
    constant("use_cache", True),
)


def heads(config: Config) -> int:
    """`head_dim` where a config leaves it to transformers."""
    size: int = config["hidden_size"] // config["num_attention_heads"]
    return size


def rope_reading(config: Config) -> dict[str, Any]:
    """Fields of a model with one RoPE, whose halves are rotated."""
    return rope_fields(rope_of(config))


def yarn_reading(config: Config) -> dict[str, Any]:
    """Settings of the same."""
    return yarn_settings(rope_of(config), config, interleave=False)


# What every architecture with one RoPE leaves to transformers, and how that is read.
DERIVED: Mapping[str, Callable[[Config], Any]] = {
    "head_dim": heads,
    "num_key_value_heads": lambda config: config["num_attention_heads"],
}
READING = Reading(DERIVED, rope_reading, yarn_reading)

# No block here slides a window over its attention; Qwen's configs can say that they do.
NO_WINDOW = (
    constant("use_sliding_window", False),
    constant("sliding_window", None),
    from_field("max_window_layers", "num_hidden_layers"),
)
