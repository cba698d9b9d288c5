"""Gemma 2: four norms a layer, a window in every other one, caps on scores and logits.

One module of MaxText holds two layers, one with a window and one without (models/gemma2.py
`Gemma2DecoderLayer`); its `num_decoder_layers` counts modules. MaxText 0.2.5 and transformers
compute the same function (models/gemma2/modeling_gemma2.py), of any size. No name of a model
changes it. What the config must say, MaxText leaves off by default.
"""

from collections.abc import Mapping
from typing import Any

from moeconv.arch.blocks import Block
from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import LayerKind, Layers
from moeconv.arch.stacks import Module, Segment, Stacking
from moeconv.families import _gemma as gemma
from moeconv.families._consumers import dropped_of_gemma, scores_of_gemma
from moeconv.families._shared import IDLE, QUANTISES, setting
from moeconv.mapping.reading import Reading, typed
from moeconv.mapping.rules import ConfigKey, Options, Target, constant, from_field

PATTERN = ("sliding_attention", "full_attention")


def _layer_type(position: int, settings: Mapping[str, Any]) -> str:
    return PATTERN[position % len(PATTERN)]


def _config(model: ModelDescription, cycle: int) -> dict[str, Any]:
    """MaxText counts pairs."""
    return {**gemma.GELU, "base_num_decoder_layers": model.num_hidden_layers // len(PATTERN)}


def _pairs(name: str, pattern: str, *, stacked: bool = False) -> Stacking:
    local, other = (Module(pattern, stacked=stacked, suffix=s) for s in ("_local", "_global"))
    return Stacking(name, (Segment((local, other)),))


BLOCK = Block(
    name="gemma2",
    since="0.1.0",
    note="every layer is dense, with norms before and behind attention and MLP; every other has a "
    "window",
    layers={LayerKind("four_norms dense"): (*gemma.PARAMETERS, *gemma.POST_NORMS)},
    targets=("gemma2",),
    stackings=(_pairs("unscanned", "layers_{}"), _pairs("pairs", "layers", stacked=True)),
    ropes=("default",),
    settings=(gemma.WINDOW, gemma.cap("attn_logits_soft_cap"), gemma.cap("final_logits_soft_cap")),
    layer_types=_layer_type,
    demands={"mlp_activations": (gemma.ACTIVATIONS,)},
    shown={"use_post_attn_norm": "four_norms", "use_post_ffw_norm": "four_norms"},
    idle=IDLE | {"use_qk_norm"},
    warns=QUANTISES,
    config=_config,
)


def _caveats(model: ModelDescription, options: Options) -> list[str]:
    lines = [
        *gemma.caveats(model, options),
        *dropped_of_gemma(model),
        *scores_of_gemma(model, model.head_dim, layers=46),
    ]
    if not (model.settings["attn_logits_soft_cap"] and gemma.final_cap(model)):
        lines.append("llama.cpp converts a Gemma 2 only with both soft caps")
    return lines


TARGET = Target(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    summary="For models of MaxText's gemma2 block.",
    kinds=Layers(mlp="dense", attention="four_norms"),
    requires=gemma.requires,
    reading=Reading(
        {"layer_types": typed(2, *PATTERN)},
        gemma.reading_fields,
        lambda c: {
            "attn_logits_soft_cap": c["attn_logit_softcapping"] or 0.0,
            "final_logits_soft_cap": c["final_logit_softcapping"] or 0.0,
        },
        ignored=frozenset({"hidden_act", "cache_implementation"}),
    ),
    rules=gemma.FOUR_NORMS,
    caveats=_caveats,
    config=(
        constant("architectures", ["Gemma2ForCausalLM"]),
        constant("model_type", "gemma2"),
        *gemma.COMMON,
        from_field("query_pre_attn_scalar", "head_dim"),
        setting("sliding_window", "sliding_window_size"),
        gemma.LAYER_TYPES,
        ConfigKey(
            "attn_logit_softcapping",
            lambda m, o: m.settings["attn_logits_soft_cap"] or None,
            "`attn_logits_soft_cap`",
        ),
        gemma.FINAL_CAP,
    ),
)
