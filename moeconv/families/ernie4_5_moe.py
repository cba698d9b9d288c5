"""ERNIE 4.5 MoE: the compact target for interleaved models, which writes a dense MLP once.

Its rotary embedding is interleaved, so query and key rows are permuted within each head; its router
selects by softmax plus a correction bias, here zero, and renormalises over the chosen experts as
MaxText does (transformers models/ernie4_5_moe/modeling_ernie4_5_moe.py `Ernie4_5_MoeTopKRouter`).
"""

from typing import Any

from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import DENSE, MOE, Layers
from moeconv.families._shared import (
    ATTENTION,
    CONFIG,
    DERIVED,
    MLP,
    TRUNK,
    experts,
    has_scaled_rope,
    rope_reading,
    yarn_reading,
)
from moeconv.mapping.reading import Config, Reading
from moeconv.mapping.rules import (
    MOE_LAYERS,
    ConfigKey,
    Options,
    Probe,
    Rule,
    Target,
    constant,
    from_field,
)

CORRECTION = Rule(
    None,
    "model.layers.{L}.mlp.moe_statics.e_score_correction_bias",
    "1 E -> 1 E",
    layers=MOE_LAYERS,
    fill=0.0,
)


def _alone(config: Any, n: int, is_moe: bool) -> None:
    """The kind of a layer depends on its number (`Ernie4_5_MoeDecoderLayer.__init__`)."""
    config.moe_layer_interval = 1
    config.moe_layer_start_index = config.moe_layer_end_index = 0 if is_moe else 1


def _interval(model: ModelDescription) -> int:
    """Distance between Mixture-of-Experts layers; 1 when there is one or none."""
    layers = model.moe_layers
    return layers[1] - layers[0] if len(layers) > 1 else layers[0] + 1


def _requires(model: ModelDescription) -> str | None:
    layers = model.moe_layers
    if not layers:
        return "it has no Mixture-of-Experts layer"
    step = _interval(model)
    if layers != tuple(n for n in range(layers[0], layers[-1] + 1) if (n + 1) % step == 0):
        return (
            "ERNIE places experts on every n-th layer, and this model has them on layers "
            f"{', '.join(str(n + 1) for n in layers)}; use --target mixtral"
        )
    if has_scaled_rope(model):
        return "its Llama-3.1 RoPE scaling is not read alike by ERNIE loaders; use --target mixtral"
    return None


def _caveats(model: ModelDescription, options: Options) -> list[str]:
    return [
        "ernie4_5_moe needs transformers ≥ 4.57, vLLM or mlx-lm; llama.cpp and mistral.rs cannot "
        "load it"
    ]


def _reading_fields(config: Config) -> dict[str, Any]:
    first, last = config["moe_layer_start_index"], config["moe_layer_end_index"]
    layers, step = config["num_hidden_layers"], config["moe_layer_interval"]
    last = layers - 1 if last == -1 else last
    kinds = [MOE if first <= n <= last and (n + 1) % step == 0 else DENSE for n in range(layers)]
    return {
        **rope_reading(config),
        "layer_kinds": kinds,
        "intermediate_size": config["intermediate_size"] if DENSE in kinds else None,
    }


_GATE, *_PROJECTIONS = experts(
    "MoeBlock_0", "mlp", gate="gate_proj", up="up_proj", down="down_proj"
)

TARGET = Target(
    name="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    summary="Writes interleaved dense layers once; transformers ≥ 4.57, vLLM and mlx-lm.",
    since="4.57.0",
    rotary="interleaved",
    kinds=Layers(attention="full"),
    requires=_requires,
    caveats=_caveats,
    reading=Reading(
        {
            **DERIVED,
            "moe_norm_min": lambda c: 1e-12,
            "moe_use_aux_free": lambda c: True,
        },
        _reading_fields,
        yarn_reading,
    ),
    rules=(*TRUNK, *ATTENTION, *MLP, _GATE, CORRECTION, *_PROJECTIONS),
    probe=Probe(alone=_alone),
    config=(
        constant("architectures", ["Ernie4_5_MoeForCausalLM"]),
        constant("model_type", "ernie4_5_moe"),
        *CONFIG,
        ConfigKey(
            "intermediate_size",
            lambda m, o: m.intermediate_size or m.moe_intermediate_size,
            "`intermediate_size`",
        ),
        from_field("moe_intermediate_size"),
        from_field("moe_num_experts", "num_experts"),
        from_field("moe_k", "num_experts_per_tok"),
        ConfigKey("moe_layer_interval", lambda m, o: _interval(m), "distance of expert layers"),
        ConfigKey("moe_layer_start_index", lambda m, o: m.moe_layers[0], "first expert layer"),
        ConfigKey("moe_layer_end_index", lambda m, o: m.moe_layers[-1], "last expert layer"),
        constant("moe_num_shared_experts", 0),
        constant("moe_norm_min", 1e-12),
        constant("moe_use_aux_free", True),
        constant("use_bias", False),
        constant("output_router_logits", False),
        constant("router_aux_loss_coef", 0.0),
    ),
)
