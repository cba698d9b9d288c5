"""Llama: the target of dense models; MaxText's block is called llama2."""

from moeconv.arch.blocks import Block
from moeconv.arch.parameters import DENSE, Layers
from moeconv.families._shared import (
    ATTENTION,
    ATTENTION_PARAMETERS,
    CONFIG,
    IDLE,
    MLP,
    MLP_PARAMETERS,
    QUANTISES,
    READING,
    TRUNK,
)
from moeconv.mapping.rules import Target, constant, from_field

BLOCK = Block(
    name="llama2",
    since="0.1.0",
    note="every layer is dense",
    layers={DENSE: (*ATTENTION_PARAMETERS, *MLP_PARAMETERS)},
    targets=("llama",),
    expert_width="mlp_dim",
    idle=IDLE | {"use_qk_norm"},
    warns=QUANTISES,
)

TARGET = Target(
    name="llama",
    architecture="LlamaForCausalLM",
    summary="For dense models; loads everywhere.",
    kinds=Layers(mlp="dense", attention="full"),
    reading=READING,
    rules=(*TRUNK, *ATTENTION, *MLP),
    config=(
        constant("architectures", ["LlamaForCausalLM"]),
        constant("model_type", "llama"),
        *CONFIG,
        from_field("intermediate_size"),
        constant("attention_bias", False),
        constant("mlp_bias", False),
        constant("pretraining_tp", 1),
    ),
)
