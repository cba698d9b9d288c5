"""What Gemma 4 is on both sides: parameters, where MaxText keeps them, and rules.

Sources: MaxText models/gemma4.py; transformers models/gemma4/modeling_gemma4.py.
"""

import math
from dataclasses import replace

from moeconv.arch.parameters import LayerKind, Layers, Parameter
from moeconv.arch.stacks import Module, Segment, Stacking, nested
from moeconv.families._shared import MLP_PARAMETERS, TRUNK, mlp, moe_parameters
from moeconv.mapping.rules import EVERY_LAYER, MOE_LAYERS, Factor, Rule, When

# models/gemma4.py `GEMMA4_ATTENTION_PATTERN`: a scanned block is one of it.
PATTERN = (*("sliding_attention",) * 5, "full_attention")
LOCAL, GLOBAL = frozenset({"sliding"}), frozenset({"global", "shared"})
# With a window, global, and global with the keys as values: the axes of their heads.
HEADS = {"sliding": ("K", "h"), "global": ("J", "j"), "shared": ("J", "j")}
ROUTED, BESIDE = "mlp.moe_block.MoeBlock_0", "mlp.moe_block.shared_experts"


STACKINGS = (
    Stacking("unscanned", (Segment((Module("layers_{}", attentions=(*[LOCAL] * 5, GLOBAL)),)),)),
    nested("scanned_blocks", LOCAL, GLOBAL),
)


# fmt: off
def _attention(kind: str, k: str, h: str) -> tuple[Parameter, ...]:
    value = Parameter.of("self_attention.value.kernel", f"D {k} {h}")
    return (
        Parameter.of("pre_self_attention_norm.scale",   "D"),
        Parameter.of("self_attention.query.kernel",     f"D H {h}"),
        Parameter.of("self_attention.key.kernel",       f"D {k} {h}"),
        *([] if kind == "shared" else [value]),
        Parameter.of("self_attention.out.kernel",       f"H {h} D"),
        Parameter.of("self_attention.query_norm.scale", h),
        Parameter.of("self_attention.key_norm.scale",   h),
        Parameter.of("post_self_attention_norm.scale",  "D"),
        Parameter.of("pre_ffw_norm.scale",              "D"),
        Parameter.of("post_ffw_norm.scale",             "D"),
        Parameter.of("layer_scalar",                    "u"),
    )


HALVES = {
    "dense": MLP_PARAMETERS,
    "moe": (
        *(replace(p, name=p.name.replace("mlp", BESIDE)) for p in MLP_PARAMETERS),
        *moe_parameters(ROUTED),
        Parameter.of(f"{ROUTED}.per_expert_scale",             "E"),
        Parameter.of("mlp.pre_forward_scale_2",                "D"),
        Parameter.of("mlp.pre_feedforward_layernorm_2.scale",  "D"),
        Parameter.of("mlp.post_feedforward_layernorm_1.scale", "D"),
        Parameter.of("mlp.post_feedforward_layernorm_2.scale", "D"),
    ),
}
# fmt: on
LAYERS = {
    LayerKind(f"{kind} {half}"): (*_attention(kind, *HEADS[kind]), *HALVES[half])
    for kind in HEADS
    for half in HALVES
}

# --- rules ----------------------------------------------------------------------------------------

TABLE_SCALE = Factor(
    "1/sqrt(hidden_size)",
    "MaxText's embedding is that many times as large; transformers multiplies what it looks up "
    "(modeling_gemma4.py `Gemma4TextScaledWordEmbedding`)",
    lambda m: 1.0 / math.sqrt(m.hidden_size),
)
HEAD_SCALE = Factor(
    "sqrt(hidden_size)",
    "with tied logits and without `normalize_embedding_logits` MaxText's head is the larger table",
    lambda m: (
        math.sqrt(m.hidden_size)
        if m.tie_word_embeddings and not m.normalize_embedding_logits
        else None
    ),
)
PLACE, ATTN = "model.layers.{L}", "model.layers.{L}.self_attn"


# fmt: off
def _attention_rules(kind: str, k: str, h: str) -> tuple[Rule, ...]:
    kinds, kv = Layers(attention=kind), f"D {k} {h} -> ({k} {h}) D"
    own = Layers(attention=kind, variant="")  # keys and values
    value = Rule("self_attention.value.kernel", f"{ATTN}.v_proj.weight", kv, layers=own)
    return (
        Rule("self_attention.query.kernel", f"{ATTN}.q_proj.weight", f"D H {h} -> (H {h}) D",
             layers=kinds),
        Rule("self_attention.key.kernel",   f"{ATTN}.k_proj.weight", kv, layers=own),
        *([] if kind == "shared" else [value]),
        Rule("self_attention.out.kernel",   f"{ATTN}.o_proj.weight", f"H {h} D -> D (H {h})",
             layers=kinds),
        Rule("self_attention.query_norm.scale", f"{ATTN}.q_norm.weight", f"{h} -> {h}",
             layers=kinds),
        Rule("self_attention.key_norm.scale",   f"{ATTN}.k_norm.weight", f"{h} -> {h}",
             layers=own),
    )


def _kept(source: str, target: str, axis: str = "D", layers: Layers = EVERY_LAYER) -> Rule:
    return Rule(source, f"{PLACE}.{target}", f"{axis} -> {axis}", layers=layers)


# What makes of a token, and of its embedding, an input of each layer.
FURTHER = (
    Parameter.of("decoder.per_layer_embedder.embed_tokens_per_layer",            "U A"),
    Parameter.of("decoder.per_layer_embedder.per_layer_model_projection.kernel", "D A"),
    Parameter.of("decoder.per_layer_embedder.per_layer_projection_norm.scale",   "p"),
)
INPUT = (
    Parameter.of("per_layer_input_gate.kernel",     "D p"),
    Parameter.of("per_layer_projection.kernel",     "p D"),
    Parameter.of("post_per_layer_input_norm.scale", "D"),
)
_HAS = When("layers have inputs of their own", lambda m, o: bool(m.hidden_size_per_layer_input))
_TABLE_OF_ALL, _PROJECTION, _NORM_OF_ALL = (each.name for each in FURTHER)
FURTHER_RULES = (
    Rule(_TABLE_OF_ALL, "model.embed_tokens_per_layer.weight",     "U A -> U A", when=_HAS),
    Rule(_PROJECTION,   "model.per_layer_model_projection.weight", "D A -> A D", when=_HAS),
    Rule(_NORM_OF_ALL,  "model.per_layer_projection_norm.weight",  "p -> p",     when=_HAS),
    Rule("per_layer_input_gate.kernel", f"{PLACE}.per_layer_input_gate.weight", "D p -> p D",
         layers=EVERY_LAYER, when=_HAS),
    Rule("per_layer_projection.kernel", f"{PLACE}.per_layer_projection.weight", "p D -> D p",
         layers=EVERY_LAYER, when=_HAS),
    Rule("post_per_layer_input_norm.scale", f"{PLACE}.post_per_layer_input_norm.weight", "D -> D",
         layers=EVERY_LAYER, when=_HAS),
)


_TABLE, _NORM, _HEAD, _UNTIED = TRUNK
RULES = (
    replace(_TABLE, scale=TABLE_SCALE),
    replace(_NORM, scale=HEAD_SCALE),
    _HEAD,
    replace(_UNTIED, scale=TABLE_SCALE),
    *(rule for kind, axes in HEADS.items() for rule in _attention_rules(kind, *axes)),
    _kept("pre_self_attention_norm.scale",  "input_layernorm.weight"),
    _kept("post_self_attention_norm.scale", "post_attention_layernorm.weight"),
    _kept("pre_ffw_norm.scale",             "pre_feedforward_layernorm.weight"),
    _kept("post_ffw_norm.scale",            "post_feedforward_layernorm.weight"),
    _kept("layer_scalar",                   "layer_scalar", "u"),
    *mlp("mlp", f"{PLACE}.mlp", "F", Layers(mlp="dense", variant="")),
    *mlp("mlp", f"{PLACE}.mlp", "f", Layers(mlp="dense", variant="reuse")),
    *FURTHER_RULES,
    *mlp(BESIDE, f"{PLACE}.mlp", "F", MOE_LAYERS),
    Rule(f"{ROUTED}.gate.kernel", f"{PLACE}.router.proj.weight", "D E -> E D", layers=MOE_LAYERS),
    _kept("mlp.pre_forward_scale_2",    "router.scale",            "D", MOE_LAYERS),
    _kept(f"{ROUTED}.per_expert_scale", "router.per_expert_scale", "E", MOE_LAYERS),
    # Gate first, then up (modeling_gemma4.py `Gemma4TextExperts.forward`).
    Rule((f"{ROUTED}.wi_0", f"{ROUTED}.wi_1"), f"{PLACE}.experts.gate_up_proj",
         "E D M -> E (g M) D", layers=MOE_LAYERS),
    Rule(f"{ROUTED}.wo", f"{PLACE}.experts.down_proj", "E M D -> E D M", layers=MOE_LAYERS),
    *(_kept(f"mlp.{name}.scale", f"{name}.weight", "D", MOE_LAYERS)
      for name in ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2",
                   "post_feedforward_layernorm_2")),
)
# fmt: on
