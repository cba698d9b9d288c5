"""Qwen2: dense, with biases on query, key and value and none on the output (models/qwen2.py).

Without `attention_bias` MaxText's block is a Llama whose query is scaled explicitly.
"""

from dataclasses import replace

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
    rope_reading,
)
from moeconv.mapping.rules import ConfigKey, Rule, Target, When, constant, from_field

BIASED = Layers(attention="biased")
# layers/attentions.py `init_query_w`, `init_kv_w`; `init_out_w` gives a Qwen2 none.
BIASES = (
    Parameter.of("self_attention.query.bias", "H h"),
    Parameter.of("self_attention.key.bias", "K h"),
    Parameter.of("self_attention.value.bias", "K h"),
)

BLOCK = Block(
    name="qwen2",
    since="0.2.1",
    note="every layer is dense, with biases on query, key and value",
    layers={
        LayerKind("biased dense"): (*ATTENTION_PARAMETERS, *BIASES, *MLP_PARAMETERS),
        DENSE: (*ATTENTION_PARAMETERS, *MLP_PARAMETERS),
    },
    targets=("qwen2", "llama"),
    query_scale_in_kernel=False,
    expert_width="mlp_dim",
    shown={"attention_bias": "biased"},
    idle=IDLE | {"mrope_section"},
    warns=QUANTISES,
)

# fmt: off
BIAS_RULES = (
    Rule("self_attention.query.bias", "model.layers.{L}.self_attn.q_proj.bias",
         "H h -> (H h)", rotary=True, layers=BIASED),
    Rule("self_attention.key.bias",   "model.layers.{L}.self_attn.k_proj.bias",
         "K h -> (K h)", rotary=True, layers=BIASED),
    Rule("self_attention.value.bias", "model.layers.{L}.self_attn.v_proj.bias",
         "K h -> (K h)", layers=BIASED),
)
# fmt: on

# `Qwen2Config` has no such field, and the model reads it if it is there (modeling_qwen2.py
# `Qwen2Attention.__init__`).
_HEADS = When(
    "head_dim is not hidden_size / heads",
    lambda m, o: m.head_dim * m.num_attention_heads != m.hidden_size,
)

TARGET = Target(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    summary="For models of MaxText's qwen2 block with attention_bias.",
    kinds=Layers(mlp="dense", attention="biased"),
    reading=replace(READING, fields=lambda c: {**rope_reading(c), "head_dim": c["head_dim"]}),
    rules=(*TRUNK, *ATTENTION, *BIAS_RULES, *MLP),
    config=(
        constant("architectures", ["Qwen2ForCausalLM"]),
        constant("model_type", "qwen2"),
        *(key for key in CONFIG if key.key != "head_dim"),
        ConfigKey("head_dim", lambda m, o: m.head_dim, "`head_dim`", _HEADS),
        from_field("intermediate_size"),
        *NO_WINDOW,
    ),
    caveats=lambda m, o: (
        [
            f"head_dim {m.head_dim} is not hidden_size / heads; loaders other than transformers "
            "may refuse such a Qwen2"
        ]
        if _HEADS.holds(m, o)
        else []
    ),
)
