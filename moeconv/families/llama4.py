"""Llama 4 (text): chunks of attention, layers without RoPE, a shared expert, one routed expert.

MaxText 0.2.5 and transformers compute the same function (models/llama4.py, layers/attentions.py,
layers/moe.py; models/llama4/modeling_llama4.py), of any size. No name of a model changes it. What
departs from the published Scout is MaxText's RoPE: its scaling is that of Llama 3.1 (factor 8, high
frequencies from 4), where Meta's config.json has a factor of 16 from 1. A model is converted as
MaxText computes it. The settings of attention do not show in the parameters.
"""

from collections.abc import Mapping
from typing import Any

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import ConfigField, positive_int, truth
from moeconv.arch.parameters import DENSE, MOE, Layers
from moeconv.arch.stacks import CYCLED, UNSCANNED
from moeconv.families._consumers import fixed_of_llama4
from moeconv.families._shared import (
    ATTENTION,
    ATTENTION_PARAMETERS,
    CONFIG,
    DERIVED,
    DROPS_TOKENS,
    IDLE,
    MLP_PARAMETERS,
    QUANTISES,
    TRUNK,
    mlp,
    moe_parameters,
    rope_reading,
    setting,
    shared_experts,
    shared_parameters,
)
from moeconv.mapping.reading import Config, Reading, multimodal
from moeconv.mapping.rules import (
    DENSE_LAYERS,
    MOE_LAYERS,
    ConfigKey,
    Options,
    Probe,
    Rule,
    Target,
    constant,
    from_field,
)

ROUTED, SHARED = "Llama4MoEBlock_0.MoeBlock_0", "Llama4MoEBlock_0.shared_experts"
FULL, CHUNKED = "full_attention", "chunked_attention"


def _interval(value: Any) -> int:
    """MaxText's -1 and 0 are none."""
    number = int(value)
    if isinstance(value, bool) or number != value or number < -1:
        raise ValueError
    return number


def _layer_type(position: int, settings: Mapping[str, Any]) -> str:
    """models/llama4.py `determine_is_nope_layer`: a layer without RoPE sees everything."""
    interval = settings["nope_layer_interval"]
    return FULL if interval > 0 and (position + 1) % interval == 0 else CHUNKED


def _config(model: ModelDescription, cycle: int) -> dict[str, Any]:
    """Where the experts are."""
    return {
        "interleave_moe_layer_step": _step(model),
        "inhomogeneous_layer_cycle_interval": cycle,
    }


BLOCK = Block(
    name="llama4",
    since="0.1.0",
    note="dense and Mixture-of-Experts layers interleaved, with a shared expert; layers of chunked "
    "attention and layers without RoPE",
    layers={
        DENSE: (*ATTENTION_PARAMETERS, *MLP_PARAMETERS),
        MOE: (
            *ATTENTION_PARAMETERS,
            *moe_parameters(ROUTED),
            *shared_parameters(SHARED),
        ),
    },
    targets=("llama4",),
    stackings=(UNSCANNED, CYCLED),
    query_scale_in_kernel=False,  # it passes `query_pre_attn_scalar`
    settings=(
        ConfigField("nope_layer_interval", "nope_layer_interval", _interval, "a whole number ≥ -1"),
        ConfigField(
            "chunk_attn_window_size", "chunk_attn_window_size", positive_int, "a whole number ≥ 1"
        ),
        ConfigField("use_qk_norm", "use_qk_norm", truth, "true or false"),
        ConfigField("temperature_tuning", "temperature_tuning", truth, "true or false"),
    ),
    layer_types=_layer_type,
    shapes={"shared_experts": shared_experts},
    # `norm_topk_prob` would make the one weight 1 before the sigmoid (layers/moe.py `get_topk`).
    idle=(IDLE - {"chunk_attn_window_size"}) | {"model_call_mode"},
    # layers/moe.py `dense_matmul` has no weights to drop tokens by.
    warns={**{k: v for k, v in DROPS_TOKENS.items() if k != "capacity_factor"}, **QUANTISES},
    config=_config,
    taps=Taps(mlp={"dense": "mlp", "moe": "Llama4MoEBlock_0"}, router="MoeBlock_0.gate"),
)

# fmt: off
PLACE = "model.layers.{L}.feed_forward"
RULES = (
    *mlp("mlp", PLACE, "F", DENSE_LAYERS),
    *mlp(SHARED, f"{PLACE}.shared_expert", "S", MOE_LAYERS),
    Rule(f"{ROUTED}.gate.kernel", f"{PLACE}.router.weight", "D E -> E D", layers=MOE_LAYERS),
    # Gate first, then up (modeling_llama4.py `Llama4TextExperts.forward`).
    Rule((f"{ROUTED}.wi_0", f"{ROUTED}.wi_1"), f"{PLACE}.experts.gate_up_proj",
         "E D M -> E D (g M)", layers=MOE_LAYERS),
    Rule(f"{ROUTED}.wo", f"{PLACE}.experts.down_proj", "E M D -> E M D", layers=MOE_LAYERS),
)
# fmt: on


def _requires(model: ModelDescription) -> str | None:
    if not model.moe_layers:
        return "it has no Mixture-of-Experts layer"
    if model.num_experts_per_tok != 1:
        return (
            f"num_experts_per_tok is {model.num_experts_per_tok}; MaxText's Llama 4 multiplies a "
            "token by the score of one expert"
        )
    if model.shared_intermediate_size != model.moe_intermediate_size:
        return (
            f"its shared experts have {model.shared_intermediate_size} columns together, a routed "
            f"one {model.moe_intermediate_size}; a Llama 4 has one shared expert, as wide as those"
        )
    return None


def _step(model: ModelDescription) -> int:
    return model.moe_layers[0] + 1


def _caveats(model: ModelDescription, options: Options) -> list[str]:
    return [
        "mlx-lm and mistral.rs refuse a Llama 4 without its vision part",
        *fixed_of_llama4(model, _step(model)),
    ]


def _alone(config: Any, n: int, is_moe: bool) -> None:
    config.no_rope_layers = config.no_rope_layers[n : n + 1]
    config.moe_layers = [0] if is_moe else []


def _no_rope(config: Config) -> list[int]:
    interval = config.get("no_rope_layer_interval") or 4
    return [int((n + 1) % interval != 0) for n in range(config["num_hidden_layers"])]


def _reading_fields(config: Config) -> dict[str, Any]:
    routed = set(config["moe_layers"])
    kinds = [MOE if n in routed else DENSE for n in range(config["num_hidden_layers"])]
    width = config["intermediate_size"]
    return {
        **rope_reading(config),
        "layer_kinds": kinds,
        "intermediate_size": config["intermediate_size_mlp"] if DENSE in kinds else None,
        "moe_intermediate_size": width,
        "shared_intermediate_size": width,
    }


def _reading_settings(config: Config) -> dict[str, Any]:
    without = [n for n, rotated in enumerate(config["no_rope_layers"], 1) if not rotated]
    return {
        "nope_layer_interval": without[0] if without else -1,
        "use_qk_norm": bool(config["use_qk_norm"]),
        "temperature_tuning": bool(config["attn_temperature_tuning"]),
    }


TARGET = Target(
    name="llama4",
    architecture="Llama4ForCausalLM",
    summary="For models of MaxText's llama4 block; transformers ≥ 4.51.",
    kinds=Layers(attention="full"),
    rotary="interleaved",  # modeling_llama4.py `apply_rotary_emb`
    since="4.51.0",
    requires=_requires,
    reading=Reading(
        {
            **DERIVED,
            "no_rope_layers": _no_rope,
            "moe_layers": lambda c: list(
                range(
                    c["interleave_moe_layer_step"] - 1,
                    c["num_hidden_layers"],
                    c["interleave_moe_layer_step"],
                )
            ),
            "layer_types": lambda c: [CHUNKED if r else FULL for r in c["no_rope_layers"]],
        },
        _reading_fields,
        _reading_settings,
        multimodal=(
            multimodal(
                "Llama4ForConditionalGeneration",
                ("vision_model", "vision model"),
                ("multi_modal_projector", "projector of images"),
            ),
        ),
        ignored=frozenset({"cache_implementation", "for_llm_compressor", "no_rope_layer_interval"}),
    ),
    rules=(*TRUNK, *ATTENTION, *RULES),
    probe=Probe(
        mlp=("feed_forward",), router="router", scores=lambda mlp, output: output[1], alone=_alone
    ),
    caveats=_caveats,
    config=(
        constant("architectures", ["Llama4ForCausalLM"]),
        constant("model_type", "llama4_text"),
        *CONFIG,
        from_field("intermediate_size", "moe_intermediate_size"),
        ConfigKey(
            "intermediate_size_mlp",
            lambda m, o: m.intermediate_size or m.moe_intermediate_size,
            "`intermediate_size`, of the experts where no layer is dense",
        ),
        from_field("num_local_experts", "num_experts"),
        from_field("num_experts_per_tok"),
        ConfigKey("moe_layers", lambda m, o: list(m.moe_layers), "numbers of the expert layers"),
        ConfigKey("interleave_moe_layer_step", lambda m, o: _step(m), "first expert layer, from 1"),
        setting("use_qk_norm", "use_qk_norm"),
        ConfigKey(
            "no_rope_layers",
            lambda m, o: [int(kind == CHUNKED) for kind in m.settings["layer_types"]],
            "`nope_layer_interval`: 0 in layers without RoPE",
        ),
        ConfigKey("layer_types", lambda m, o: list(m.settings["layer_types"]), "likewise"),
        setting("attention_chunk_size", "chunk_attn_window_size"),
        setting("attn_temperature_tuning", "temperature_tuning"),
        constant("floor_scale", 8192),
        constant("attn_scale", 0.1),
        constant("attention_bias", False),
        constant("output_router_logits", False),
        constant("router_aux_loss_coef", 0.0),
        constant("router_jitter_noise", 0.0),
    ),
)
