"""Mistral: a dense decoder as Llama's; MaxText's block never slides a window over its attention."""

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
    name="mistral",
    since="0.1.0",
    note="every layer is dense",
    layers={DENSE: (*ATTENTION_PARAMETERS, *MLP_PARAMETERS)},
    targets=("mistral", "llama"),
    expert_width="mlp_dim",
    idle=IDLE | {"use_qk_norm"},
    warns=QUANTISES,
)

TARGET = Target(
    name="mistral",
    architecture="MistralForCausalLM",
    summary="For models of MaxText's mistral block; loads everywhere.",
    kinds=Layers(mlp="dense", attention="full"),
    reading=READING,
    rules=(*TRUNK, *ATTENTION, *MLP),
    config=(
        constant("architectures", ["MistralForCausalLM"]),
        constant("model_type", "mistral"),
        *CONFIG,
        from_field("intermediate_size"),
        constant("sliding_window", None, "always null: transformers' default is a window of 4,096"),
    ),
)
