"""Qwen3, dense: QK norm over each head, before RoPE; the query is scaled explicitly.

Without `use_qk_norm` MaxText's block is a Llama (models/qwen3.py `AttentionWithNorm`).
"""

from moeconv.arch.blocks import Block
from moeconv.arch.parameters import DENSE, LayerKind, Layers, Parameter
from moeconv.families._shared import (
    ATTENTION,
    ATTENTION_PARAMETERS,
    CONFIG,
    IDLE,
    MLP,
    MLP_PARAMETERS,
    NO_WINDOW,
    QUANTISES,
    READING,
    TRUNK,
)
from moeconv.mapping.rules import Rule, Target, constant, from_field

NORMED = Layers(attention="qk_norm")
# layers/attentions.py `Attention.__init__`: one norm of all heads, over head_dim.
QK_NORM = (
    Parameter.of("self_attention.query_norm.scale", "h"),
    Parameter.of("self_attention.key_norm.scale", "h"),
)

BLOCK = Block(
    name="qwen3",
    since="0.1.0",
    note="every layer is dense, with a norm of queries and keys",
    layers={
        LayerKind("qk_norm dense"): (*ATTENTION_PARAMETERS, *QK_NORM, *MLP_PARAMETERS),
        DENSE: (*ATTENTION_PARAMETERS, *MLP_PARAMETERS),
    },
    targets=("qwen3", "llama"),
    query_scale_in_kernel=False,
    expert_width="mlp_dim",
    shown={"use_qk_norm": "qk_norm"},
    idle=IDLE | {"mrope_section"},
    warns=QUANTISES,
)

# fmt: off
QK_NORM_RULES = (
    Rule("self_attention.query_norm.scale", "model.layers.{L}.self_attn.q_norm.weight",
         "h -> h", rotary=True, layers=NORMED),
    Rule("self_attention.key_norm.scale",   "model.layers.{L}.self_attn.k_norm.weight",
         "h -> h", rotary=True, layers=NORMED),
)
# fmt: on

TARGET = Target(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    summary="For models of MaxText's qwen3 block; transformers ≥ 4.51.",
    kinds=Layers(mlp="dense", attention="qk_norm"),
    since="4.51.0",
    reading=READING,
    rules=(*TRUNK, *ATTENTION, *QK_NORM_RULES, *MLP),
    config=(
        constant("architectures", ["Qwen3ForCausalLM"]),
        constant("model_type", "qwen3"),
        *CONFIG,
        from_field("intermediate_size"),
        constant("attention_bias", False),
        *NO_WINDOW,
    ),
)
