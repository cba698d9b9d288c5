"""GPT-OSS: a window in every other layer, attention sinks, biases everywhere, a clipped activation.

MaxText 0.2.5 and transformers compute the same function (models/gpt_oss.py, layers/moe.py
`apply_ffn_activation`; models/gpt_oss/modeling_gpt_oss.py), of any size. No name of a model changes
it. What the config must say, MaxText leaves off by default: the sinks and biases show in the
parameters; the window, the limit and `mlp_activations` do not.
"""

from collections.abc import Mapping
from typing import Any

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import ConfigField, positive_float, positive_int
from moeconv.arch.parameters import LayerKind, Layers, Parameter
from moeconv.arch.stacks import CYCLED, UNSCANNED
from moeconv.families._consumers import fixed_of_gpt_oss
from moeconv.families._gpt_oss_reading import PATTERN, READING
from moeconv.families._shared import (
    CONFIG,
    DROPS_TOKENS,
    IDLE,
    IDLE_MOE,
    QUANTISES,
    TRUNK,
    attention,
    attention_parameters,
    moe_parameters,
    setting,
    untied_by_sglang,
)
from moeconv.mapping.rules import (
    EVERY_LAYER,
    MOE_LAYERS,
    ConfigKey,
    Options,
    Probe,
    Rule,
    Target,
    constant,
    from_field,
)


def _layer_type(position: int, settings: Mapping[str, Any]) -> str:
    return PATTERN[position % len(PATTERN)]


def _config(model: ModelDescription, cycle: int) -> dict[str, Any]:
    """What its kind of layer has; a sigmoid of 1.702 times the gate is this block's own."""
    return {
        "inhomogeneous_layer_cycle_interval": cycle,
        "mlp_activations": ["sigmoid", "linear"],
        "mlp_bias": True,
    }


# fmt: off
PARAMETERS = (
    *attention_parameters("GptOssAttention"),
    Parameter.of("GptOssAttention.query.bias", "H h"),
    Parameter.of("GptOssAttention.key.bias",   "K h"),
    Parameter.of("GptOssAttention.value.bias", "K h"),
    Parameter.of("GptOssAttention.out.bias",   "D"),
    Parameter.of("GptOssAttention.sinks",      "H"),
    *moe_parameters("GptOssMlp"),
    Parameter.of("GptOssMlp.gate.bias", "E"),
    Parameter.of("GptOssMlp.wi_0_bias", "E M"),
    Parameter.of("GptOssMlp.wi_1_bias", "E M"),
    Parameter.of("GptOssMlp.wo_bias",   "E D"),
)
# fmt: on

BLOCK = Block(
    name="gpt_oss",
    since="0.1.0",
    note="every layer is a Mixture of Experts, with sinks and biases; every other has a window",
    layers={LayerKind("sinks moe"): PARAMETERS},
    targets=("gpt_oss",),
    stackings=(UNSCANNED, CYCLED),
    query_scale_in_kernel=False,  # it passes `query_pre_attn_scalar`
    expert_width="mlp_dim",  # models/gpt_oss.py
    ropes=("default", "llama3.1", "yarn"),
    settings=(
        ConfigField(
            "sliding_window_size", "sliding_window_size", positive_int, "a whole number ≥ 1"
        ),
        ConfigField(
            "mlp_activations_limit", "mlp_activations_limit", positive_float, "a number > 0"
        ),
    ),
    layer_types=_layer_type,
    demands={"mlp_activations": (("sigmoid", "linear"),)},
    honours={"norm_topk_prob": (True,)},  # as it always does
    shown={
        "attention_bias": "sinks",
        "attention_sink": "sinks",
        "mlp_bias": "sinks",
        "routed_bias": "sinks",
    },
    idle=IDLE | IDLE_MOE | {"use_qk_norm"},
    warns={**DROPS_TOKENS, **QUANTISES},
    config=_config,
    taps=Taps(attention="GptOssAttention", mlp={"moe": "GptOssMlp"}),
)

# fmt: off
PLACE = "model.layers.{L}"
RULES = (
    Rule("GptOssAttention.query.bias", f"{PLACE}.self_attn.q_proj.bias", "H h -> (H h)",
         rotary=True, layers=EVERY_LAYER),
    Rule("GptOssAttention.key.bias",   f"{PLACE}.self_attn.k_proj.bias", "K h -> (K h)",
         rotary=True, layers=EVERY_LAYER),
    Rule("GptOssAttention.value.bias", f"{PLACE}.self_attn.v_proj.bias", "K h -> (K h)",
         layers=EVERY_LAYER),
    Rule("GptOssAttention.out.bias",   f"{PLACE}.self_attn.o_proj.bias", "D -> D",
         layers=EVERY_LAYER),
    Rule("GptOssAttention.sinks",      f"{PLACE}.self_attn.sinks",       "H -> H",
         layers=EVERY_LAYER),
    Rule("GptOssMlp.gate.kernel", f"{PLACE}.mlp.router.weight", "D E -> E D", layers=MOE_LAYERS),
    Rule("GptOssMlp.gate.bias",   f"{PLACE}.mlp.router.bias",   "E -> E",     layers=MOE_LAYERS),
    # Gate and up take turns (modeling_gpt_oss.py `GptOssExperts._apply_gate`).
    Rule(("GptOssMlp.wi_0", "GptOssMlp.wi_1"), f"{PLACE}.mlp.experts.gate_up_proj",
         "E D M -> E D (M g)", layers=MOE_LAYERS),
    Rule(("GptOssMlp.wi_0_bias", "GptOssMlp.wi_1_bias"), f"{PLACE}.mlp.experts.gate_up_proj_bias",
         "E M -> E (M g)", layers=MOE_LAYERS),
    Rule("GptOssMlp.wo",      f"{PLACE}.mlp.experts.down_proj",      "E M D -> E M D",
         layers=MOE_LAYERS),
    Rule("GptOssMlp.wo_bias", f"{PLACE}.mlp.experts.down_proj_bias", "E D -> E D",
         layers=MOE_LAYERS),
)
# MXFP4, as it is published: the weights of each expert are transposed (transformers
# integrations/mxfp4.py `convert_moe_packed_tensors`).
SPELLED = (
    Rule(("GptOssMlp.wi_0", "GptOssMlp.wi_1"), f"{PLACE}.mlp.experts.gate_up_proj_blocks",
         "E D M -> E (M g) D", layers=MOE_LAYERS),
    Rule("GptOssMlp.wo", f"{PLACE}.mlp.experts.down_proj_blocks", "E M D -> E D M",
         layers=MOE_LAYERS),
)
# fmt: on


def _caveats(model: ModelDescription, options: Options) -> list[str]:
    lines = [
        "mlx-lm and mistral.rs take the experts of a GPT-OSS in MXFP4 only, and refuse this one",
        *untied_by_sglang(model, options),
        *fixed_of_gpt_oss(model),
    ]
    limit, types = model.settings["mlp_activations_limit"], model.settings["layer_types"]
    if limit != 7:
        lines.append(
            f"mlp_activations_limit is {limit:g}; transformers 4 and others clip a GPT-OSS at 7, "
            "and compute something else without a word"
        )
    if types != tuple(PATTERN[n % 2] for n in range(model.num_hidden_layers)):
        lines.append(
            "its windows are not in every other layer (the scanned block has an odd number of "
            "layers); vLLM and others place them there, and compute something else without a word"
        )
    return lines


TARGET = Target(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    summary="For models of MaxText's gpt_oss block; transformers ≥ 4.55.",
    kinds=Layers(mlp="moe", attention="sinks"),
    since="4.55.0",
    reading=READING,
    rules=(*TRUNK, *attention("GptOssAttention"), *RULES),
    spelled=SPELLED,
    probe=Probe(router="router"),
    caveats=_caveats,
    config=(
        constant("architectures", ["GptOssForCausalLM"]),
        constant("model_type", "gpt_oss"),
        *CONFIG,
        from_field("intermediate_size", "moe_intermediate_size"),
        from_field("num_local_experts", "num_experts"),
        from_field("num_experts_per_tok"),
        setting("sliding_window", "sliding_window_size"),
        ConfigKey(
            "layer_types", lambda m, o: list(m.settings["layer_types"]), "in turn, by position"
        ),
        setting("swiglu_limit", "mlp_activations_limit"),
        constant("swiglu_alpha", 1.702),
        constant("attention_bias", True),
        constant("output_router_logits", False),
        constant("router_aux_loss_coef", 0.0),
    ),
)
