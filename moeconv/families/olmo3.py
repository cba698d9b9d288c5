"""OLMo 3: norms behind attention and MLP only, QK norm over all heads, three windows of four.

MaxText's QK norm hangs on the name of the model: over all heads together where it begins with
`olmo3`, over each head otherwise (layers/attentions.py `Attention.__init__`), which no stock
architecture computes. With YaRN MaxText rotates every layer so (models/olmo3.py
`Olmo3DecoderLayer`); the published models, transformers 4 and vLLM rotate those with a window
plainly. transformers 5 is given both, and computes what MaxText does.
"""

from collections.abc import Mapping
from typing import Any

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import ConfigField, positive_int
from moeconv.arch.parameters import LayerKind, Layers, Parameter
from moeconv.arch.stacks import CYCLED, UNSCANNED
from moeconv.families._consumers import wanted_of_olmo3
from moeconv.families._shared import (
    CONFIG,
    DERIVED,
    IDLE,
    MLP,
    MLP_PARAMETERS,
    QUANTISES,
    TRUNK,
    attention,
    attention_parameters,
    rope_parameters,
    setting,
)
from moeconv.mapping.reading import Config, Reading, rope_fields, ropes_of, typed, yarn_settings
from moeconv.mapping.rules import (
    EVERY_LAYER,
    ConfigKey,
    Options,
    Rule,
    Target,
    constant,
    from_field,
)

SLIDING, FULL = "sliding_attention", "full_attention"
# models/olmo3.py `OLMO3_ATTENTION_PATTERN`: a scanned block begins it anew.
PATTERN = (SLIDING, SLIDING, SLIDING, FULL)
_BEFORE = "pre_self_attention_layer_norm.scale"


def _layer_type(position: int, settings: Mapping[str, Any]) -> str:
    return PATTERN[position % len(PATTERN)]


def _config(model: ModelDescription, cycle: int) -> dict[str, Any]:
    return {"inhomogeneous_layer_cycle_interval": cycle, "model_name": "olmo3-7b"}


# fmt: off
PARAMETERS = (
    *(p for p in attention_parameters("attention") if p.name != _BEFORE),
    Parameter.of("attention.query_norm.scale", "n"),
    Parameter.of("attention.key_norm.scale",   "m"),
    *MLP_PARAMETERS,
    Parameter.of("post_mlp_layer_norm.scale", "D"),
)
# fmt: on

BLOCK = Block(
    name="olmo3",
    since="0.2.0",
    note="every layer is dense, with norms of all queries and all keys; three of four have a "
    "window",
    layers={LayerKind("qk_norm dense"): PARAMETERS},
    targets=("olmo3",),
    stackings=(UNSCANNED, CYCLED),
    query_scale_in_kernel=False,  # it passes `query_pre_attn_scalar`
    expert_width="mlp_dim",
    ropes=("default", "yarn"),
    settings=(
        ConfigField(
            "sliding_window_size", "sliding_window_size", positive_int, "a whole number ≥ 1"
        ),
    ),
    layer_types=_layer_type,
    shown={"use_qk_norm": "qk_norm"},
    # The norms' shapes show what the name makes of them.
    honours={"model_name": ("olmo3-7b", "olmo3-7b-pt", "olmo3-32b")},
    idle=IDLE,
    warns=QUANTISES,
    config=_config,
    taps=Taps(attention="attention"),
)

# fmt: off
PLACE = "model.layers.{L}"
RULES = (
    # Behind the attention, not before the MLP; the name is the same on both sides.
    *(rule for rule in attention("attention") if rule.source != _BEFORE),
    Rule("attention.query_norm.scale", f"{PLACE}.self_attn.q_norm.weight", "n -> n",
         layers=EVERY_LAYER),
    Rule("attention.key_norm.scale",   f"{PLACE}.self_attn.k_norm.weight", "m -> m",
         layers=EVERY_LAYER),
    *MLP,
    Rule("post_mlp_layer_norm.scale",  f"{PLACE}.post_feedforward_layernorm.weight", "D -> D",
         layers=EVERY_LAYER),
)
# fmt: on


def _requires(model: ModelDescription) -> str | None:
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    if (model.query_norm_size, model.key_norm_size) != (queries, keys):
        return (
            f"its norms of queries and keys have {model.query_norm_size} and "
            f"{model.key_norm_size} entries, not {queries} and {keys}: MaxText normalises each "
            "head apart unless model_name begins with olmo3, an OLMo 3 all heads together"
        )
    if model.rotary != "half":
        return "rope_interleave is true; the norms' entries would have to be put in another order"
    return None


def _ropes(model: ModelDescription) -> dict[str, Any]:
    """One for each kind of layer, of which a model need not have both."""
    return {kind: rope_parameters(model) for kind in (FULL, SLIDING)}


def _caveats(model: ModelDescription, options: Options) -> list[str]:
    lines = wanted_of_olmo3(model, options)
    if model.rope_type == "yarn":
        lines.append(
            "MaxText rotates layers with a window by YaRN too; transformers from 5.0 does so, "
            "transformers 4, vLLM, llama.cpp and mlx-lm do not, and compute something else without "
            "a word"
        )
    return lines


def _read_ropes(config: Config) -> dict[str, Any]:
    return ropes_of(config, FULL, SLIDING)


def _reading_fields(config: Config) -> dict[str, Any]:
    return {
        **rope_fields(_read_ropes(config)[FULL]),
        "query_norm_size": config["num_attention_heads"] * config["head_dim"],
        "key_norm_size": config["num_key_value_heads"] * config["head_dim"],
    }


TARGET = Target(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    summary="For models of MaxText's olmo3 block; transformers ≥ 4.57, with YaRN ≥ 5.0.",
    kinds=Layers(mlp="dense", attention="qk_norm"),
    since="4.57.0",
    requires=_requires,
    reading=Reading(
        {**DERIVED, "layer_types": typed(len(PATTERN), SLIDING, FULL)},
        _reading_fields,
        lambda c: yarn_settings(_read_ropes(c)[FULL], c, interleave=False),
        _read_ropes,
    ),
    rules=(*TRUNK, *RULES),
    caveats=_caveats,
    config=(
        constant("architectures", ["Olmo3ForCausalLM"]),
        constant("model_type", "olmo3"),
        *(key for key in CONFIG if key.key != "rope_parameters"),
        ConfigKey("rope_parameters", lambda m, o: _ropes(m), "RoPE of both kinds of layer, for 5"),
        from_field("intermediate_size"),
        setting("sliding_window", "sliding_window_size"),
        ConfigKey(
            "layer_types", lambda m, o: list(m.settings["layer_types"]), "in turn, by position"
        ),
        constant("attention_bias", False),
    ),
)
