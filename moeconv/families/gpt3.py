"""GPT-3: LayerNorm with biases, learned positions, a plain GELU MLP, biases everywhere.

MaxText 0.2.5 and transformers' GPT-2 compute the same function (models/gpt3.py,
layers/linears.py `MlpBlock`, layers/nnx_decoders.py `_apply_embedding`; models/gpt2/
modeling_gpt2.py) where the heads together are as wide as the model. GPT-2 keeps its kernels as
MaxText does, [in, out] (pytorch_utils.py `Conv1D`). Nothing rotates: RoPE's settings are not read.
"""

from moeconv.arch.blocks import Block
from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import EMBEDDING, FINAL_NORM, OUTPUT_HEAD, LayerKind, Layers, Parameter
from moeconv.families._shared import CONFIG, IDLE, LOGIT_SCALE, QUANTISES
from moeconv.mapping.rules import (
    EVERY_LAYER,
    TIED_BUT_UNTIE,
    UNTIED,
    Factor,
    Options,
    Probe,
    Rule,
    Target,
    constant,
    from_field,
)

POSITIONS = Parameter.of("decoder.position_embedder.embedding", "P D")
FINAL_BIAS = Parameter.of("decoder.decoder_norm.bias", "D")


# fmt: off
def _layer(*projections: Parameter) -> tuple[Parameter, ...]:
    return (
        Parameter.of("pre_self_attention_norm.scale", "D"),
        Parameter.of("pre_self_attention_norm.bias",  "D"),
        *projections,
        Parameter.of("self_attention.out.kernel",     "H h D"),
        Parameter.of("self_attention.out.bias",       "D"),
        Parameter.of("mlp.mlp_layer_norm.scale",      "D"),
        Parameter.of("mlp.mlp_layer_norm.bias",       "D"),
        Parameter.of("mlp.wi.kernel",                 "D F"),
        Parameter.of("mlp.wi.bias",                   "F"),
        Parameter.of("mlp.wo.kernel",                 "F D"),
        Parameter.of("mlp.wo.bias",                   "D"),
    )
# fmt: on


# What models/gpt3.py `Gpt3MultiHeadAttention` has apart without `fused_qkv`; with it one behind the
# other, whole, whatever the mesh is.
SPLIT = ("query", "key", "value")
BLOCK = Block(
    name="gpt3",
    since="0.1.0",
    note="every layer is dense, with LayerNorm, learned positions and biases",
    layers={
        LayerKind("fused dense"): _layer(
            Parameter.of("self_attention.qkv_proj.kernel", "D x H h"),
            Parameter.of("self_attention.qkv_proj.bias", "x H h"),
        ),
        LayerKind("split dense"): _layer(
            *(Parameter.of(f"self_attention.{name}.kernel", "D H h") for name in SPLIT),
            *(Parameter.of(f"self_attention.{name}.bias", "H h") for name in SPLIT),
        ),
    },
    targets=("gpt2",),
    outer=(EMBEDDING, POSITIONS, FINAL_NORM, FINAL_BIAS, OUTPUT_HEAD),
    query_scale_in_kernel=False,  # it divides the queries by sqrt(head_dim)
    expert_width="mlp_dim",
    ropes=("default",),
    demands={"mlp_activations": (("gelu",),)},
    shown={"fused_qkv": "fused"},
    shapes={"trainable_position_size": lambda known: known["num_positions"]},
    idle=IDLE - {"chunk_attn_window_size"},
    warns=QUANTISES,
    config=lambda model, cycle: {"mlp_activations": ["gelu"]},
    norm="LayerNorm",
)

_STORED = "MaxText keeps what is added to 1 (models/gpt3.py `Gpt3LayerNorm`)"
NORM = Factor("scale + 1", _STORED, lambda m: 1.0, offset=1.0)


def _fold(model: ModelDescription) -> float:
    return LOGIT_SCALE.value(model) or 1.0


FINAL = Factor(
    "scale + 1, times 1/sqrt(hidden_size) with tied and normalised logits",
    f"{_STORED}; {LOGIT_SCALE.reason}",
    _fold,
    offset=_fold,
)
PLACE = "transformer.h.{L}"


# fmt: off
def _norm(source: str, target: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{source}.scale", f"{target}.weight", "D -> D", scale=NORM, layers=EVERY_LAYER),
        Rule(f"{source}.bias",  f"{target}.bias",   "D -> D", layers=EVERY_LAYER),
    )


_FUSED, _SPLIT = Layers(attention="fused"), Layers(attention="split")
RULES = (
    Rule(EMBEDDING.name,  "transformer.wte.weight",  "V D -> V D"),
    Rule(POSITIONS.name,  "transformer.wpe.weight",  "P D -> P D"),
    Rule(FINAL_NORM.name, "transformer.ln_f.weight", "D -> D", scale=FINAL),
    Rule(FINAL_BIAS.name, "transformer.ln_f.bias",   "D -> D", scale=LOGIT_SCALE),
    Rule(OUTPUT_HEAD.name, "lm_head.weight", "D V -> V D", when=UNTIED),
    Rule(EMBEDDING.name,   "lm_head.weight", "V D -> V D", when=TIED_BUT_UNTIE, shared=True),
    *_norm("pre_self_attention_norm", f"{PLACE}.ln_1"),
    Rule("self_attention.qkv_proj.kernel", f"{PLACE}.attn.c_attn.weight",
         "D x H h -> D (x H h)", layers=_FUSED),
    Rule("self_attention.qkv_proj.bias",   f"{PLACE}.attn.c_attn.bias",
         "x H h -> (x H h)", layers=_FUSED),
    Rule(tuple(f"self_attention.{name}.kernel" for name in SPLIT), f"{PLACE}.attn.c_attn.weight",
         "D H h -> D (g H h)", layers=_SPLIT),
    Rule(tuple(f"self_attention.{name}.bias" for name in SPLIT),   f"{PLACE}.attn.c_attn.bias",
         "H h -> (g H h)", layers=_SPLIT),
    Rule("self_attention.out.kernel", f"{PLACE}.attn.c_proj.weight", "H h D -> (H h) D",
         layers=EVERY_LAYER),
    Rule("self_attention.out.bias",   f"{PLACE}.attn.c_proj.bias",   "D -> D", layers=EVERY_LAYER),
    *_norm("mlp.mlp_layer_norm", f"{PLACE}.ln_2"),
    Rule("mlp.wi.kernel", f"{PLACE}.mlp.c_fc.weight",   "D F -> D F", layers=EVERY_LAYER),
    Rule("mlp.wi.bias",   f"{PLACE}.mlp.c_fc.bias",     "F -> F",     layers=EVERY_LAYER),
    Rule("mlp.wo.kernel", f"{PLACE}.mlp.c_proj.weight", "F D -> F D", layers=EVERY_LAYER),
    Rule("mlp.wo.bias",   f"{PLACE}.mlp.c_proj.bias",   "D -> D",     layers=EVERY_LAYER),
)
# fmt: on


def _requires(model: ModelDescription) -> str | None:
    heads, size = model.num_attention_heads, model.head_dim
    if heads * size != model.hidden_size:
        return (
            f"its {heads} heads of {size} are {heads * size} wide together, a GPT-2's are as wide "
            f"as the model, {model.hidden_size}"
        )
    if model.max_position_embeddings > (model.num_positions or 0):
        return (
            f"max_target_length is {model.max_position_embeddings}, and only {model.num_positions} "
            "positions are learned; a GPT-2 has none behind them"
        )
    return None


def _caveats(model: ModelDescription, options: Options) -> list[str]:
    lines = [
        "mlx-lm reads the tensors of a GPT-2 by names without `transformer.` only, and does not "
        "load this one"
    ]
    if model.intermediate_size != 4 * model.hidden_size:
        lines.append(
            "its MLP is not four times as wide as the model, for which llama.cpp's converter takes "
            "that of every GPT-2"
        )
    return lines


_AS_ALL = {"vocab_size", "tie_word_embeddings", "initializer_range", "use_cache"}
_AS_ALL |= {f"{name}_token_id" for name in ("bos", "eos", "pad")}
TARGET = Target(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    summary="For models of MaxText's gpt3 block.",
    kinds=Layers(mlp="dense"),
    requires=_requires,
    rules=RULES,
    caveats=_caveats,
    probe=Probe(
        layers="transformer.h",
        embedding="transformer.wte",
        positions="transformer.wpe",
        norm="transformer.ln_f",
        attention=("attn",),
    ),
    config=(
        constant("architectures", ["GPT2LMHeadModel"]),
        constant("model_type", "gpt2"),
        *(each for each in CONFIG if each.key in _AS_ALL),
        from_field("n_embd", "hidden_size"),
        from_field("n_layer", "num_hidden_layers"),
        from_field("n_head", "num_attention_heads"),
        from_field("n_inner", "intermediate_size"),
        from_field("n_positions", "num_positions"),
        from_field("n_ctx", "num_positions"),
        constant("activation_function", "gelu_new"),  # jax.nn.gelu is the tanh form by default
        from_field("layer_norm_epsilon", "rms_norm_eps"),
        constant("scale_attn_weights", True),
        constant("scale_attn_by_inverse_layer_idx", False),
        constant("reorder_and_upcast_attn", False),
        constant("add_cross_attention", False),
        *(constant(name, 0.0) for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")),
    ),
)
