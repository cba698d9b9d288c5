"""Gemma 4 (text): five layers with a window, then one that sees everything, of sizes of its own.

MaxText 0.2.5 and transformers compute the same function (models/gemma4.py, layers/moe.py
`RoutedAndSharedMoE`, `get_topk`; models/gemma4/modeling_gemma4.py) under conditions that
`requires` holds. Norms are stored as they are, the embedding times sqrt(hidden_size)
(checkpoint_conversion/utils/param_mapping.py `GEMMA4_MAXTEXT_TO_HF_PARAM_HOOK_FN`).
"""

from collections.abc import Mapping
from typing import Any

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.fields import ConfigField, has_moe, truth
from moeconv.arch.parameters import Layers
from moeconv.families._gemma4 import LAYERS, PATTERN, ROUTED, RULES, STACKINGS
from moeconv.families._gemma4_model import PROBE, SETTINGS, SHAPES, requires, reusing, ropes, shares
from moeconv.families._gemma4_reading import READING
from moeconv.families._shared import CONFIG, DROPS_TOKENS, IDLE, QUANTISES, setting
from moeconv.mapping.rules import ConfigKey, Target, constant, from_field


def _layer_type(position: int, settings: Mapping[str, Any]) -> str:
    return PATTERN[position % len(PATTERN)]


BLOCK = Block(
    name="gemma4",
    since="0.2.4",
    note="five layers with a window, then a global one of other sizes; all dense, or all with "
    "experts beside the MLP",
    layers=LAYERS,
    targets=("gemma4",),
    stackings=STACKINGS,
    query_scale_in_kernel=False,  # its `query_pre_attn_scalar` is 1
    ropes=("default",),
    settings=(
        *SETTINGS,
        ConfigField("norm_topk_prob", "norm_topk_prob", truth, "true or false", has_moe),
    ),
    layer_types=_layer_type,
    demands={"mlp_activations": (("gelu", "linear"),), "v_norm_with_scale": (False,)},
    shapes={
        **SHAPES,
        "shared_experts": lambda known: 1 if known["num_experts"] else None,
        "share_kv_projections": lambda known: shares(known["layer_kinds"]),
    },
    idle=IDLE | {"model_call_mode", "use_qk_norm"},
    warns={**DROPS_TOKENS, **QUANTISES},
    taps=Taps(
        mlp=dict.fromkeys(("dense", "moe"), "post_ffw_norm"),
        router=f"{ROUTED}.gate",
        router_in_layer=True,
    ),
)


_OTHERWISE = {"hidden_act", "rope_theta", "rope_scaling", "rope_parameters"}
TARGET = Target(
    name="gemma4",
    architecture="Gemma4ForCausalLM",
    summary="For models of MaxText's gemma4 and gemma4_small blocks; transformers ≥ 5.5.",
    kinds=Layers(),
    since="5.5.0",
    requires=requires,
    reading=READING,
    rules=RULES,
    probe=PROBE,
    config=(
        constant("architectures", ["Gemma4ForCausalLM"]),
        constant("model_type", "gemma4_text"),
        *(key for key in CONFIG if key.key not in _OTHERWISE),
        constant("hidden_activation", "gelu_pytorch_tanh"),
        ConfigKey("rope_parameters", lambda m, o: ropes(m), "RoPE of both kinds of layer"),
        from_field("intermediate_size"),
        ConfigKey(
            "global_head_dim",
            lambda m, o: m.global_head_dim or m.head_dim,
            "`global_head_dim`, of MaxText's 0 `head_dim`",
        ),
        ConfigKey(
            "num_global_key_value_heads",
            lambda m, o: m.num_global_key_value_heads if shares(m.layer_kinds) else None,
            "`num_global_key_value_heads` where global layers have no values of their own",
        ),
        ConfigKey("attention_k_eq_v", lambda m, o: shares(m.layer_kinds), "`share_kv_projections`"),
        setting("sliding_window", "sliding_window_size"),
        ConfigKey(
            "layer_types", lambda m, o: list(m.settings["layer_types"]), "in turn, by position"
        ),
        ConfigKey(
            "final_logit_softcapping",
            lambda m, o: m.settings.get("final_logits_soft_cap") or None,
            "`final_logits_soft_cap` of tied logits (layers/nnx_decoders.py `apply_output_head`)",
        ),
        ConfigKey("enable_moe_block", lambda m, o: bool(m.num_experts), "with experts"),
        from_field("num_experts"),
        from_field("top_k_experts", "num_experts_per_tok"),
        from_field("moe_intermediate_size"),
        ConfigKey(
            "hidden_size_per_layer_input",
            lambda m, o: m.hidden_size_per_layer_input or 0,
            "`hidden_size_per_layer_input`, 0 for none",
        ),
        ConfigKey(
            "vocab_size_per_layer_input",
            lambda m, o: m.vocab_size_per_layer_input or m.vocab_size,
            "`vocab_size_per_layer_input`",
        ),
        ConfigKey(
            "num_kv_shared_layers",
            lambda m, o: reusing(m.layer_kinds),
            "layers without keys and values of their own",
        ),
        ConfigKey(
            "use_double_wide_mlp",
            lambda m, o: m.reuse_intermediate_size not in (None, m.intermediate_size),
            "these have an MLP twice as wide",
        ),
        constant("use_bidirectional_attention", None),
        constant("attention_bias", False),
    ),
)
