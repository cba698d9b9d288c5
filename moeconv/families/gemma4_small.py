"""Gemma 4 E2B and E4B (text): an input of each layer, and layers that reuse keys and values.

MaxText 0.2.5 and transformers compute the same function (models/gemma4_small.py,
layers/nnx_decoders.py `_apply_gemma4_small_layers`; models/gemma4/modeling_gemma4.py) under the
conditions of `_gemma4_model.requires`. Layers are never scanned. Which of them have a window hangs
on the name: four of five under `gemma4-e2b`, else five of six.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.parameters import EMBEDDING, FINAL_NORM, OUTPUT_HEAD, LayerKind, Parameter
from moeconv.arch.stacks import Module, Segment, Stacking
from moeconv.families._gemma4 import FURTHER, GLOBAL, INPUT, LAYERS, LOCAL, PATTERN
from moeconv.families._gemma4_model import E2B_PATTERN, SETTINGS, SHAPES, pattern_of, reusing
from moeconv.families._shared import IDLE, QUANTISES

# What a layer has not that attends to the keys and values of another.
_KEYS = {f"self_attention.{name}" for name in ("key.kernel", "value.kernel", "key_norm.scale")}


def _layer_type(position: int, settings: Mapping[str, Any]) -> str:
    pattern = pattern_of(settings["model_name"])
    return pattern[position % len(pattern)]


def _reusing(parameter: Parameter) -> Parameter:
    axes = tuple("f" if axis == "F" else axis for axis in parameter.axes)
    return replace(parameter, axes=axes)


def _layers() -> dict[LayerKind, tuple[Parameter, ...]]:
    found = {}
    for attention in ("sliding", "global"):
        own = LAYERS[LayerKind(f"{attention} dense")]
        reuses = (_reusing(each) for each in own if each.name not in _KEYS)
        found[LayerKind(f"{attention} dense")] = (*own, *INPUT)
        found[LayerKind(f"{attention} dense+reuse")] = (*reuses, *INPUT)
    return found


def _unscanned(name: str, pattern: tuple[str, ...]) -> Stacking:
    turn = tuple(LOCAL if kind == PATTERN[0] else GLOBAL for kind in pattern)
    return Stacking(name, (Segment((Module("layers_{}", attentions=turn),)),))


BLOCK = Block(
    name="gemma4_small",
    since="0.2.3",
    note="every layer is dense, with an input of its own; five of six have a window, or four of "
    "five; the last reuse keys and values",
    layers=_layers(),
    targets=("gemma4",),
    outer=(EMBEDDING, *FURTHER, FINAL_NORM, OUTPUT_HEAD),
    # The sizes of global layers show where they are.
    stackings=(_unscanned("unscanned", PATTERN), _unscanned("unscanned, E2B", E2B_PATTERN)),
    query_scale_in_kernel=False,  # its `query_pre_attn_scalar` is 1
    expert_width="mlp_dim",
    ropes=("default",),
    settings=SETTINGS,
    layer_types=_layer_type,
    demands={"mlp_activations": (("gelu", "linear"),), "v_norm_with_scale": (False,)},
    shapes={
        **SHAPES,
        "hidden_size_per_layer_input": lambda known: known["hidden_size_per_layer_input"],
        "vocab_size_per_layer_input": lambda known: known["vocab_size_per_layer_input"],
        "num_kv_shared_layers": lambda known: reusing(known["layer_kinds"]),
        "use_double_wide_mlp": lambda known: (
            known["reuse_intermediate_size"] != known["intermediate_size"]
            if reusing(known["layer_kinds"])
            else None
        ),
    },
    idle=IDLE | {"use_qk_norm"},
    warns=QUANTISES,
    config=lambda model, cycle: {
        "mlp_activations": ["gelu", "linear"],
        "v_norm_with_scale": False,
    },
    taps=Taps(mlp={"dense": "post_ffw_norm"}, further="per_layer_embedder"),
)
