"""Qwen3-MoE: Qwen3's attention, and experts in every layer.

MaxText's weights of the chosen experts sum to 1 whatever `norm_topk_prob` says, as its softmax is
over their logits alone (layers/moe.py `get_topk`); so the target always says true.
"""

from dataclasses import replace

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.parameters import LayerKind, Layers
from moeconv.families._shared import (
    ATTENTION,
    ATTENTION_PARAMETERS,
    CONFIG,
    DROPS_TOKENS,
    IDLE,
    IDLE_MOE,
    NO_WINDOW,
    QUANTISES,
    READING,
    TRUNK,
    experts,
    fused_experts,
    moe_parameters,
    untied_by_sglang,
)
from moeconv.families.qwen3 import QK_NORM, QK_NORM_RULES
from moeconv.mapping.rules import Target, constant, from_field

BLOCK = Block(
    name="qwen3_moe",
    since="0.1.0",
    note="every layer is a Mixture of Experts, with a norm of queries and keys",
    layers={
        LayerKind("qk_norm moe"): (
            *ATTENTION_PARAMETERS,
            *QK_NORM,
            *moe_parameters("moe_block"),
        ),
    },
    targets=("qwen3_moe",),
    query_scale_in_kernel=False,
    shown={"use_qk_norm": "qk_norm"},
    honours={"norm_topk_prob": (True,)},  # as it always does
    idle=IDLE | IDLE_MOE | {"mrope_section"},
    warns={**DROPS_TOKENS, **QUANTISES},
    taps=Taps(mlp={"moe": "moe_block"}),
)

TARGET = Target(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    summary="For models of MaxText's qwen3_moe block; transformers ≥ 4.51.",
    kinds=Layers(mlp="moe", attention="qk_norm"),
    since="4.51.0",
    caveats=untied_by_sglang,
    # No layer is dense.
    reading=replace(READING, ignored=frozenset({"intermediate_size"})),
    spelled=fused_experts("moe_block"),
    rules=(
        *TRUNK,
        *ATTENTION,
        *QK_NORM_RULES,
        *experts("moe_block", "mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    config=(
        constant("architectures", ["Qwen3MoeForCausalLM"]),
        constant("model_type", "qwen3_moe"),
        *CONFIG,
        from_field("intermediate_size", "moe_intermediate_size"),
        from_field("moe_intermediate_size"),
        from_field("num_experts"),
        from_field("num_experts_per_tok"),
        constant("norm_topk_prob", True),
        constant("decoder_sparse_step", 1),
        constant("mlp_only_layers", []),
        constant("attention_bias", False),
        constant("output_router_logits", False),
        constant("router_aux_loss_coef", 0.0),
        *NO_WINDOW,
    ),
)
