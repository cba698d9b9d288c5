"""What Qwen3-Next and Qwen3.5 share: layers of a gated delta net and of gated attention, experts.

MaxText has one code for both (models/qwen3.py `Qwen3NextGatedDeltaNet`, `Qwen3NextFullAttention`,
`Qwen3NextSparseMoeBlock`; models/qwen3_5.py). Norms are kept as what is added to 1, but for the one
within the delta net, and its projections in groups, one for each head of keys; transformers'
Qwen3-Next keeps both so.
"""

from dataclasses import replace
from typing import Any

from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import ConfigField, Known, positive_float, positive_int
from moeconv.arch.parameters import LayerKind, Layers, Parameter
from moeconv.arch.stacks import Module, Segment, Stacking
from moeconv.families._shared import LOGIT_SCALE, TRUNK, experts, mlp, moe_parameters
from moeconv.mapping.rules import EVERY_LAYER, Rule, When

LINEAR, GATED = Layers(attention="linear"), Layers(attention="gated")
SHARED, UNSHARED = Layers(variant="shared"), Layers(variant="")

# fmt: off
_NORMS = (
    Parameter.of("input_layernorm.scale",          "D"),
    Parameter.of("post_attention_layernorm.scale", "D"),
)
_ATTENTION = {
    "linear": (Parameter.of("attention.in_proj_qkvz.kernel", "D Z"),
               Parameter.of("attention.in_proj_ba.kernel",   "D y"),
               Parameter.of("attention.conv1d.kernel",       "t u C"),
               Parameter.of("attention.A_log",               "w"),
               Parameter.of("attention.dt_bias",             "w"),
               Parameter.of("attention.norm.rms_norm.scale", "d"),
               Parameter.of("attention.out_proj.kernel",     "W D")),
    "gated":  (Parameter.of("attention.attention.query.kernel",     "D H Q"),
               Parameter.of("attention.attention.key.kernel",       "D K h"),
               Parameter.of("attention.attention.value.kernel",     "D K h"),
               Parameter.of("attention.attention.out.kernel",       "O D"),
               Parameter.of("attention.attention.query_norm.scale", "h"),
               Parameter.of("attention.attention.key_norm.scale",   "h")),
}
_EXPERTS = moe_parameters("mlp.routed_experts")
_FEED_FORWARD = {
    "moe":        _EXPERTS,
    "moe+shared": (*_EXPERTS,  # as wide as a routed one (`Qwen3NextSparseMoeBlock`)
                   Parameter.of("mlp.shared_expert.wi_0.kernel",  "D M"),
                   Parameter.of("mlp.shared_expert.wi_1.kernel",  "D M"),
                   Parameter.of("mlp.shared_expert.wo.kernel",    "M D"),
                   Parameter.of("mlp.shared_expert_gate.kernel",  "D u")),
}
# fmt: on
LAYERS = {
    LayerKind(f"{attention} {mlp}"): (*_NORMS, *parameters, *feed_forward)
    for mlp, feed_forward in _FEED_FORWARD.items()
    for attention, parameters in _ATTENTION.items()
}

# --- MaxText's settings ---------------------------------------------------------------------------

SETTINGS = (
    ConfigField("linear_num_key_heads", "gdn_num_key_heads", positive_int, "a whole number ≥ 1"),
    ConfigField("linear_key_head_dim", "gdn_key_head_dim", positive_int, "a whole number ≥ 1"),
    ConfigField("partial_rotary_factor", "partial_rotary_factor", positive_float, "a number > 0"),
)


def interval(known: Known) -> int | None:
    """Layers up to the first with attention, that included: those of a block."""
    kinds = known["layer_kinds"]
    return next((n for n, kind in enumerate(kinds, 1) if kind in GATED), None)


SHAPES = {
    "gdn_num_value_heads": lambda known: known["linear_num_value_heads"],
    "gdn_value_head_dim": lambda known: known["linear_value_head_dim"],
    "gdn_conv_kernel_dim": lambda known: known["linear_conv_kernel_dim"],
    "inhomogeneous_layer_cycle_interval": interval,
}


def config(model: ModelDescription, cycle: int) -> dict[str, Any]:
    """MaxText before 0.2.5 builds a shared expert whatever `shared_experts` says."""
    return {"shared_experts": int(model.layer_kinds[0] in SHARED)}


# Qwen3.5, and Qwen3-Next before MaxText 0.2.5 (`Qwen3NextScannableBlock`).
LAYERED = Stacking("cycled", (Segment((Module("layers.layer_{}", stacked=True),)),))

# --- rules ----------------------------------------------------------------------------------------

# No weight near 1/sqrt(hidden_size) - 1 says in 16 bits what a norm near 1/sqrt(hidden_size) is, so
# that factor goes into a head of its own.
APART = When(
    "tied, with normalised logits or --untie",
    lambda m, o: m.tie_word_embeddings and (o.untie or m.normalize_embedding_logits),
)
# fmt: off
PLACE = "model.layers.{L}"
_SHARED_EXPERT = f"{PLACE}.mlp.shared_expert"
RULES = (
    *(replace(rule, scale=None) for rule in TRUNK[:3]),
    replace(TRUNK[3], scale=LOGIT_SCALE, when=APART),
    Rule("input_layernorm.scale", f"{PLACE}.input_layernorm.weight", "D -> D", layers=EVERY_LAYER),
    Rule("attention.in_proj_qkvz.kernel", f"{PLACE}.linear_attn.in_proj_qkvz.weight",
         "D Z -> Z D", layers=LINEAR),
    Rule("attention.in_proj_ba.kernel",   f"{PLACE}.linear_attn.in_proj_ba.weight",
         "D y -> y D", layers=LINEAR),
    Rule("attention.conv1d.kernel",       f"{PLACE}.linear_attn.conv1d.weight",
         "t u C -> C u t", layers=LINEAR),
    Rule("attention.A_log",               f"{PLACE}.linear_attn.A_log",   "w -> w", layers=LINEAR),
    Rule("attention.dt_bias",             f"{PLACE}.linear_attn.dt_bias", "w -> w", layers=LINEAR),
    Rule("attention.norm.rms_norm.scale", f"{PLACE}.linear_attn.norm.weight",
         "d -> d", layers=LINEAR),
    Rule("attention.out_proj.kernel",     f"{PLACE}.linear_attn.out_proj.weight",
         "W D -> D W", layers=LINEAR),
    # Of each head the query, then its gate, on both sides.
    Rule("attention.attention.query.kernel", f"{PLACE}.self_attn.q_proj.weight",
         "D H Q -> (H Q) D", layers=GATED),
    Rule("attention.attention.key.kernel",   f"{PLACE}.self_attn.k_proj.weight",
         "D K h -> (K h) D", layers=GATED),
    Rule("attention.attention.value.kernel", f"{PLACE}.self_attn.v_proj.weight",
         "D K h -> (K h) D", layers=GATED),
    Rule("attention.attention.out.kernel",   f"{PLACE}.self_attn.o_proj.weight",
         "O D -> D O", layers=GATED),
    Rule("attention.attention.query_norm.scale", f"{PLACE}.self_attn.q_norm.weight",
         "h -> h", layers=GATED),
    Rule("attention.attention.key_norm.scale",   f"{PLACE}.self_attn.k_norm.weight",
         "h -> h", layers=GATED),
    Rule("post_attention_layernorm.scale", f"{PLACE}.post_attention_layernorm.weight",
         "D -> D", layers=EVERY_LAYER),
    *experts("mlp.routed_experts", "mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    *mlp("mlp.shared_expert", _SHARED_EXPERT, "M", SHARED),
    Rule("mlp.shared_expert_gate.kernel", f"{_SHARED_EXPERT}_gate.weight", "D u -> u D",
         layers=SHARED),
    *(Rule(None, f"{_SHARED_EXPERT}{name}.weight", place, layers=UNSHARED)
      for name, place in ((".gate_proj", "1 D -> 1 D"), (".up_proj", "1 D -> 1 D"),
                          (".down_proj", "D 1 -> D 1"), ("_gate", "1 D -> 1 D"))),
)
# fmt: on
