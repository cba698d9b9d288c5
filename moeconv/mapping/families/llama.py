"""Llama: the target of dense models."""

from moeconv.arch.parameters import LayerKind
from moeconv.mapping.families.shared import ATTENTION, CONFIG, TRUNK
from moeconv.mapping.rules import DENSE_LAYERS, Family, Rule, constant, from_field

# fmt: off
MLP = (
    Rule("mlp.wi_0.kernel", "model.layers.{L}.mlp.gate_proj.weight",
         "D F -> F D", layers=DENSE_LAYERS),
    Rule("mlp.wi_1.kernel", "model.layers.{L}.mlp.up_proj.weight",
         "D F -> F D", layers=DENSE_LAYERS),
    Rule("mlp.wo.kernel",   "model.layers.{L}.mlp.down_proj.weight",
         "F D -> D F", layers=DENSE_LAYERS),
)
# fmt: on

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    summary="For dense models; loads everywhere.",
    rotary="half",
    kinds=frozenset({LayerKind.DENSE}),
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
