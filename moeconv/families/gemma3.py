"""Gemma 3 (text): five layers with a window and a theta of their own, then one without; QK norm.

MaxText builds the block under three names only, which choose the scale of the scores: 1/sqrt of
head_dim (4b, 12b) or of the width that each head has of the whole (27b; models/gemma3.py
`get_query_pre_attn_scalar`). Names that begin so also keep `rope_linear_scaling_factor` away from
layers with a window (layers/attentions.py `init_rotary_embedding`), as transformers does. MaxText
0.2.5 and transformers then compute the same function (models/gemma3/modeling_gemma3.py), of any
size; but transformers caps no scores, whatever its config says (`Gemma3Attention.forward`).
"""

from collections.abc import Mapping
from typing import Any

from moeconv.arch.blocks import Block
from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import ConfigField, positive_float, positive_int
from moeconv.arch.parameters import LayerKind, Layers, Parameter
from moeconv.arch.stacks import UNSCANNED, Module, Segment, Stacking
from moeconv.families import _gemma as gemma
from moeconv.families._consumers import scores_of_gemma
from moeconv.families._gemma3_reading import BY_HEAD_DIM, BY_WIDTH, FULL, PATTERN, READING, SLIDING
from moeconv.families._shared import IDLE, QUANTISES, setting
from moeconv.mapping.rules import ConfigKey, Target, constant

REMAINDER = Stacking(
    "remainder",
    (
        Segment((Module("layers.layers_{}", stacked=True),), optional=True),
        Segment((Module("layers_remainder.layers_{}"),), optional=True),
    ),
)


def _layer_type(position: int, settings: Mapping[str, Any]) -> str:
    return PATTERN[position % len(PATTERN)]


def _name(value: Any) -> str:
    if value not in (*BY_HEAD_DIM, BY_WIDTH):
        raise ValueError
    return str(value)


def _local_theta(value: Any) -> float:
    """MaxText's -1 is that of the other layers."""
    return -1.0 if value == -1 else positive_float(value)


BLOCK = Block(
    name="gemma3",
    since="0.1.0",
    note="every layer is dense, with norms before and behind attention and MLP and of queries and "
    "keys; five of six have a window",
    layers={
        LayerKind("qk_norm dense"): (
            *gemma.PARAMETERS,
            *gemma.POST_NORMS,
            Parameter.of("self_attention.query_norm.scale", "h"),
            Parameter.of("self_attention.key_norm.scale", "h"),
        )
    },
    targets=("gemma3",),
    stackings=(UNSCANNED, REMAINDER),
    query_scale_in_kernel=False,  # it passes `query_pre_attn_scalar`
    ropes=("default",),
    settings=(
        ConfigField("model_name", "model_name", _name, "gemma3-4b, gemma3-12b or gemma3-27b"),
        # It comes between the sizes that the 27b's scale is made of and those of the model.
        ConfigField(
            "global_parameter_scale", "global_parameter_scale", positive_int, "a whole number ≥ 1"
        ),
        gemma.WINDOW,
        ConfigField(
            "local_rope_max_timescale",
            "local_rope_max_timescale",
            _local_theta,
            "-1 or a number > 0",
        ),
        ConfigField(
            "rope_linear_scaling_factor", "rope_linear_scaling_factor", positive_float, "> 0"
        ),
        gemma.cap("final_logits_soft_cap"),
    ),
    layer_types=_layer_type,
    demands={"mlp_activations": (gemma.ACTIVATIONS,)},
    shown={"use_post_attn_norm": "qk_norm", "use_post_ffw_norm": "qk_norm"},
    honours={"vision_encoder_block": ("gemma3",)},  # unused without use_multimodal
    idle=IDLE | {"use_qk_norm"},
    warns=QUANTISES,
    config=lambda model, cycle: gemma.GELU,
)


def _ropes(model: ModelDescription) -> dict[str, Any]:
    """One for each kind of layer, of which a model need not have both."""
    factor, local = (
        model.settings[k] for k in ("rope_linear_scaling_factor", "local_rope_max_timescale")
    )
    scaled = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    return {
        FULL: {**scaled, "rope_theta": model.rope_theta},
        SLIDING: {
            "rope_type": "default",
            "rope_theta": local if local > 0 else model.rope_theta,
        },
    }


def _rope_scaling(model: ModelDescription) -> dict[str, Any] | None:
    scaled = {key: value for key, value in _ropes(model)[FULL].items() if key != "rope_theta"}
    return None if scaled["rope_type"] == "default" else scaled


def _scalar(model: ModelDescription) -> int:
    by_width = model.settings["model_name"] == BY_WIDTH
    return model.hidden_size // model.num_attention_heads if by_width else model.head_dim


def _requires(model: ModelDescription) -> str | None:
    scale = model.settings["global_parameter_scale"]
    if model.settings["model_name"] == BY_WIDTH and scale != 1:
        return (
            f"global_parameter_scale={scale}; MaxText's {BY_WIDTH} divides scores by what width "
            "and heads were before that"
        )
    return gemma.requires(model)


TARGET = Target(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    summary="For models of MaxText's gemma3 block, text only; transformers ≥ 4.50.",
    kinds=Layers(mlp="dense", attention="qk_norm"),
    since="4.50.0",
    requires=_requires,
    reading=READING,
    rules=(
        *gemma.FOUR_NORMS,
        gemma.norm("self_attention.query_norm.scale", "self_attn.q_norm.weight", "h"),
        gemma.norm("self_attention.key_norm.scale", "self_attn.k_norm.weight", "h"),
    ),
    caveats=lambda model, options: [
        *gemma.caveats(model, options),
        *scores_of_gemma(model, _scalar(model), layers=62),
    ],
    config=(
        constant("architectures", ["Gemma3ForCausalLM"]),
        constant("model_type", "gemma3_text"),
        *(key for key in gemma.COMMON if key.key not in ("rope_scaling", "rope_parameters")),
        ConfigKey("rope_scaling", lambda m, o: _rope_scaling(m), "`rope_linear_scaling_factor`"),
        ConfigKey("rope_parameters", lambda m, o: _ropes(m), "RoPE of both kinds of layer, for 5"),
        ConfigKey(
            "rope_local_base_freq",
            lambda m, o: _ropes(m)[SLIDING]["rope_theta"],
            "`local_rope_max_timescale`, `rope_theta` where that is -1",
        ),
        ConfigKey("query_pre_attn_scalar", lambda m, o: _scalar(m), "by `model_name`"),
        setting("sliding_window", "sliding_window_size"),
        constant("sliding_window_pattern", len(PATTERN)),
        gemma.LAYER_TYPES,
        constant("attn_logit_softcapping", None),
        gemma.FINAL_CAP,
        constant("use_bidirectional_attention", False),
    ),
)
