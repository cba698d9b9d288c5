"""Gemma (the first): dense layers, two norms each, full attention, a tanh-GELU.

MaxText 0.2.5 and transformers compute the same function (models/gemma.py;
models/gemma/modeling_gemma.py), of any size. No name of a model changes it.
"""

from moeconv.arch.blocks import Block
from moeconv.arch.parameters import DENSE, Layers
from moeconv.families import _gemma as gemma
from moeconv.families._consumers import dropped_of_gemma
from moeconv.families._shared import IDLE, QUANTISES
from moeconv.mapping.reading import Reading
from moeconv.mapping.rules import Target, constant

BLOCK = Block(
    name="gemma",
    since="0.1.0",
    note="every layer is dense",
    layers={DENSE: gemma.PARAMETERS},
    targets=("gemma",),
    ropes=("default",),
    demands={"mlp_activations": (gemma.ACTIVATIONS,)},
    idle=IDLE | {"use_qk_norm"},
    warns=QUANTISES,
    config=lambda model, cycle: gemma.GELU,
)

TARGET = Target(
    name="gemma",
    architecture="GemmaForCausalLM",
    summary="For models of MaxText's gemma block.",
    kinds=Layers(mlp="dense", attention="full"),
    requires=gemma.requires,
    reading=Reading(
        {
            # modeling_gemma.py before transformers 5 takes it for a config that says gelu.
            "hidden_activation": lambda c: "gelu_pytorch_tanh",
        },
        gemma.reading_fields,
        ignored=frozenset({"hidden_act"}),
    ),
    rules=gemma.TWO_NORMS,
    caveats=lambda model, options: [
        *gemma.caveats(model, options),
        *dropped_of_gemma(model),
    ],
    config=(
        constant("architectures", ["GemmaForCausalLM"]),
        constant("model_type", "gemma"),
        *gemma.COMMON,
        constant("hidden_act", "gelu_pytorch_tanh"),
    ),
)
