"""Qwen3-Next: a gated delta net in most layers, gated attention in the last of each block.

MaxText 0.2.5 and transformers compute the same function (models/qwen3.py `Qwen3NextDecoderLayer`,
layers/attentions.py `Attention`; models/qwen3_next/modeling_qwen3_next.py), of any size. No name of
a model changes it. A shared expert, which MaxText has with `shared_experts` alone, every Qwen3-Next
has: one of zeros is none.
"""

from typing import Any

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import Layers
from moeconv.arch.stacks import UNSCANNED, nested
from moeconv.families._qwen_hybrid import (
    APART,
    LAYERED,
    LAYERS,
    RULES,
    SETTINGS,
    SHAPES,
    SHARED,
    config,
    interval,
)
from moeconv.families._shared import (
    CONFIG,
    DERIVED,
    DROPS_TOKENS,
    IDLE,
    IDLE_MOE,
    QUANTISES,
    fused_experts,
    rope_parameters,
    rope_reading,
    setting,
)
from moeconv.mapping.reading import Config, Reading, rope_of, typed
from moeconv.mapping.rules import ConfigKey, Options, Probe, Target, constant, from_field

BLOCK = Block(
    name="qwen3_next",
    since="0.2.0",
    note="every layer is a Mixture of Experts; linear attention, and gated attention in the last "
    "of each block",
    layers=LAYERS,
    targets=("qwen3_next",),
    stackings=(UNSCANNED, nested("layers"), LAYERED),
    query_scale_in_kernel=False,  # it passes `query_pre_attn_scalar`
    ropes=("default",),
    settings=SETTINGS,
    # With it the norms of queries and keys are of another class, by the same names: `scale`, not
    # `1 + scale` (layers/attentions.py `Attention.__init__`).
    demands={"use_qk_norm": (False,)},
    honours={
        "norm_topk_prob": (True,),  # as it always does
        "shared_experts": (1,),
        "use_mrope": (True,),  # the positions of a text are all the same
    },
    shapes=SHAPES,
    idle=IDLE | IDLE_MOE | {"mrope_section"},
    warns={**DROPS_TOKENS, **QUANTISES},
    config=config,
    taps=Taps(attention="attention", mlp={"moe": "mlp"}, router="routed_experts.gate"),
)


def _requires(model: ModelDescription) -> str | None:
    heads, size = model.settings["linear_num_key_heads"], model.settings["linear_key_head_dim"]
    if heads * size != model.linear_key_size:
        return (
            f"gdn_num_key_heads={heads} and gdn_key_head_dim={size} make {heads * size} columns of "
            f"keys, the convolution has {model.linear_key_size}; give the config of this run"
        )
    if len({kind.variant for kind in model.layer_kinds}) > 1:
        return "some of its layers have a shared expert, some have none"
    return None


def _caveats(model: ModelDescription, options: Options) -> list[str]:
    if options.untie or not APART.holds(model, options):
        return []
    return [
        "the output head is written apart from the embedding, as with --untie: MaxText divides the "
        "logits of a tied head by sqrt(hidden_size), which no weight of the final norm can say in "
        "16 bits"
    ]


def _ropes(model: ModelDescription) -> dict[str, Any]:
    factor = model.settings["partial_rotary_factor"]
    return {**rope_parameters(model), "partial_rotary_factor": factor}


def _layer_types(model: ModelDescription) -> list[str]:
    names = {"linear": "linear_attention", "gated": "full_attention"}
    return [names[kind.attention] for kind in model.layer_kinds]


def _share(config: Config) -> float:
    share: float = rope_of(config).get("partial_rotary_factor", 0.25)
    return share


def _reading_fields(config: Config) -> dict[str, Any]:
    names = {"linear_attention": "linear", "full_attention": "gated"}
    heads, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    return {
        **rope_reading(config),
        "layer_kinds": [f"{names[each]} moe+shared" for each in config["layer_types"]],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "linear_key_size": heads * size,
    }


TARGET = Target(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    summary="For models of MaxText's qwen3_next block; transformers ≥ 4.57.",
    kinds=Layers(mlp="moe"),
    since="4.57.0",
    requires=_requires,
    reading=Reading(
        {
            **DERIVED,
            "layer_types": lambda c: typed(
                c.get("full_attention_interval") or 4, "linear_attention", "full_attention"
            )(c),
            "mlp_only_layers": lambda c: [],
            "partial_rotary_factor": _share,
        },
        _reading_fields,
        lambda c: {"partial_rotary_factor": _share(c)},
        # No layer is dense; which layers have attention, their types say.
        ignored=frozenset({"intermediate_size", "full_attention_interval"}),
    ),
    spelled=fused_experts("mlp.routed_experts"),
    rules=RULES,
    caveats=_caveats,
    probe=Probe(attention=("linear_attn", "self_attn")),
    config=(
        constant("architectures", ["Qwen3NextForCausalLM"]),
        constant("model_type", "qwen3_next"),
        *(key for key in CONFIG if key.key not in ("rope_parameters", "tie_word_embeddings")),
        ConfigKey("rope_parameters", lambda m, o: _ropes(m), "RoPE type, theta and part, for 5"),
        setting("partial_rotary_factor", "partial_rotary_factor"),
        ConfigKey(
            "tie_word_embeddings",
            lambda m, o: m.tie_word_embeddings and not APART.holds(m, o),
            "`tie_word_embeddings`, false with normalised logits and with `--untie`",
        ),
        from_field("intermediate_size", "moe_intermediate_size"),
        from_field("moe_intermediate_size"),
        ConfigKey(
            "shared_expert_intermediate_size",
            lambda m, o: m.moe_intermediate_size if m.layer_kinds[0] in SHARED else 1,
            "`moe_intermediate_size`, 1 where there is no shared expert",
        ),
        from_field("num_experts"),
        from_field("num_experts_per_tok"),
        constant("norm_topk_prob", True),
        constant("decoder_sparse_step", 1),
        constant("mlp_only_layers", []),
        ConfigKey("layer_types", lambda m, o: _layer_types(m), "by the layers' parameters"),
        ConfigKey(
            "full_attention_interval",
            lambda m, o: interval(vars(m)) or m.num_hidden_layers + 1,
            "the first layer with attention, from 1",
        ),
        from_field("linear_conv_kernel_dim"),
        setting("linear_num_key_heads", "linear_num_key_heads"),
        setting("linear_key_head_dim", "linear_key_head_dim"),
        from_field("linear_num_value_heads"),
        from_field("linear_value_head_dim"),
        constant("attention_bias", False),
        constant("output_router_logits", False),
        constant("router_aux_loss_coef", 0.0),
    ),
)
