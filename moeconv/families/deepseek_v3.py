"""DeepSeek-V3 and Kimi-K2: latent attention (MLA), dense layers first, then experts beside shared ones.

How MaxText chooses and weighs experts hangs on the name of the model (layers/moe.py `GateLogit`,
`RoutedMoE.get_topk`; `_NAMES` below). Under these names it does as the published DeepSeek-V3: it
chooses by score plus bias, in the best groups, and weighs by the score. Under any other name it
ignores groups and weighs by score plus bias, which no stock architecture does.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import ROUTING, Known, ToldField, has_moe, not_negative
from moeconv.arch.parameters import LayerKind, Layers, Parameter
from moeconv.arch.stacks import Module, Segment, Stacking
from moeconv.families._shared import (
    CONFIG,
    DROPS_TOKENS,
    IDLE,
    IDLE_MOE,
    MLP,
    MLP_PARAMETERS,
    NORM_PARAMETERS,
    NORMS,
    QUANTISES,
    TRUNK,
    experts,
    moe_parameters,
    rope_parameters,
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

# --- MaxText --------------------------------------------------------------------------------------

_MOE = "DeepSeekMoeBlock_0.MoeBlock_0"
_SHARED = "DeepSeekMoeBlock_0.shared_experts"
# layers/attention_mla.py `MLA._init_projections`: the query through a narrow layer, or directly.
_DIRECT, _NARROW = Layers(attention="mla"), Layers(attention="mla_lora")
_BIASED, _PLAIN = Layers(mlp="moe", variant="bias"), Layers(mlp="moe", variant="")

# fmt: off
_QUERY = {
    "mla":      (Parameter.of("self_attention.query.kernel", "D H k"),),
    "mla_lora": (Parameter.of("self_attention.wq_a.kernel",  "D q"),
                 Parameter.of("self_attention.q_norm.scale", "q"),
                 Parameter.of("self_attention.wq_b.kernel",  "q H k")),
}
_KEY_VALUE = (
    Parameter.of("self_attention.wkv_a.kernel",  "D r"),
    Parameter.of("self_attention.kv_norm.scale", "c"),
    Parameter.of("self_attention.wkv_b.kernel",  "c H b"),
    Parameter.of("self_attention.out.kernel",    "H v D"),
)
_EXPERTS = (
    *moe_parameters(_MOE),
    Parameter.of(f"{_SHARED}.wi_0.kernel", "D S"),
    Parameter.of(f"{_SHARED}.wi_1.kernel", "D S"),
    Parameter.of(f"{_SHARED}.wo.kernel",   "S D"),
)
_FEED_FORWARD = {
    "dense":    MLP_PARAMETERS,
    "moe":      _EXPERTS,
    "moe+bias": (*_EXPERTS, Parameter.of(f"{_MOE}.gate.bias", "E")),
}
# fmt: on


def _stacking(name: str, pattern: str, *, stacked: bool) -> Stacking:
    """nnx_decoders.py `_init_scanned_deepseek_standard`, `_init_sequential_deepseek`."""
    dense, moe = (
        Module(f"{mlp}_{pattern}", stacked=stacked, kinds=Layers(mlp=mlp)) for mlp in ("dense", "moe")
    )
    return Stacking(name, (Segment((dense,), optional=True), Segment((moe,))))


_NAMES = ("deepseek3", "deepseek4", "kimi-k2")  # layers/moe.py, in `startswith`
_NAMED = "as DeepSeek-V3"


def _router(model_name: Any) -> str:
    """What a model's name makes of its router; the value itself, where it is one already."""
    return _NAMED if str(model_name).startswith((*_NAMES, _NAMED)) else "by biased scores"


def _shared_experts(known: Known) -> int:
    return (known["shared_intermediate_size"] or 0) // (known["moe_intermediate_size"] or 1)


def is_biased(model: ModelDescription) -> bool:
    """True if the router has a bias."""
    return any(kind.variant == "bias" for kind in model.layer_kinds)


def is_named(model: ModelDescription) -> bool:
    """True if MaxText routes by the rules of DeepSeek-V3, for the model's name."""
    return bool(model.settings["router"] == _NAMED)


def groups(model: ModelDescription) -> tuple[int, int]:
    """How many groups of experts there are, and among how many of them a token's are chosen."""
    number = model.settings["n_routing_groups"]
    if not is_named(model) or number == -1:
        return 1, 1
    return number, model.settings["topk_routing_group"]


def _eligible(scores: NDArray[Any], model: ModelDescription) -> NDArray[Any]:
    """layers/moe.py `expert_group_mask`: groups are ranked by the sum of their two best scores."""
    number, best = groups(model)
    if number == best:
        return np.ones(scores.shape, bool)
    grouped = scores.reshape(*scores.shape[:-1], number, -1)
    ranked = np.argsort(-np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1), axis=-1, kind="stable")
    mask = np.zeros(ranked.shape, bool)
    np.put_along_axis(mask, ranked[..., :best], True, axis=-1)
    return np.repeat(mask, scores.shape[-1] // number, axis=-1)


BLOCK = Block(
    name="deepseek",
    note="latent attention; dense layers first, then experts beside shared ones",
    layers={
        LayerKind(f"{attention} {mlp}"): (*NORM_PARAMETERS, *query, *_KEY_VALUE, *feed_forward)
        for attention, query in _QUERY.items()
        for mlp, feed_forward in _FEED_FORWARD.items()
    },
    targets=("deepseek_v3", "deepseek_v2"),
    stackings=(
        _stacking("unscanned", "layers_{}", stacked=False),
        _stacking("prefixed", "layers", stacked=True),
    ),
    query_scale_in_kernel=False,
    ropes=("yarn",),
    settings=(
        *ROUTING,
        ToldField("router", "model_name", _router, "a name", has_moe,
                  write=lambda value: "deepseek3-671b" if value == _NAMED else "default"),
        ToldField("mscale", "mscale", not_negative, "a number ≥ 0"),
    ),
    shapes={
        "first_num_dense_layers": lambda m: sum(kind.mlp == "dense" for kind in m["layer_kinds"]),
        "shared_experts": _shared_experts,
        "routed_bias": lambda m: any(kind.variant == "bias" for kind in m["layer_kinds"]),
        "q_lora_rank": lambda m: m["q_lora_rank"] or 0,
        **{key: lambda m, key=key: m[key]
           for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    },
    config=lambda model, cycle: {"attention_type": "mla"},
    taps=Taps(mlp={"dense": "mlp", "moe": "DeepSeekMoeBlock_0"}, router="MoeBlock_0.gate",
              eligible=_eligible),
    honours={"attention_type": ("mla",)},
    # Before 0.2.4 the block honoured it, behind the scaling (layers/moe.py `get_topk`).
    demands={"norm_topk_prob": (False,)},
    idle=IDLE | IDLE_MOE - {"norm_topk_prob"},
    warns={**DROPS_TOKENS, **QUANTISES},
)  # fmt: skip

# --- Hugging Face ---------------------------------------------------------------------------------

# fmt: off
MLA = (
    Rule("self_attention.query.kernel",  "model.layers.{L}.self_attn.q_proj.weight",
         "D H k -> (H k) D", layers=_DIRECT),
    Rule("self_attention.wq_a.kernel",   "model.layers.{L}.self_attn.q_a_proj.weight",
         "D q -> q D", layers=_NARROW),
    Rule("self_attention.q_norm.scale",  "model.layers.{L}.self_attn.q_a_layernorm.weight",
         "q -> q", layers=_NARROW),
    Rule("self_attention.wq_b.kernel",   "model.layers.{L}.self_attn.q_b_proj.weight",
         "q H k -> (H k) q", layers=_NARROW),
    Rule("self_attention.wkv_a.kernel",  "model.layers.{L}.self_attn.kv_a_proj_with_mqa.weight",
         "D r -> r D", layers=EVERY_LAYER),
    Rule("self_attention.kv_norm.scale", "model.layers.{L}.self_attn.kv_a_layernorm.weight",
         "c -> c", layers=EVERY_LAYER),
    Rule("self_attention.wkv_b.kernel",  "model.layers.{L}.self_attn.kv_b_proj.weight",
         "c H b -> (H b) c", layers=EVERY_LAYER),
    Rule("self_attention.out.kernel",    "model.layers.{L}.self_attn.o_proj.weight",
         "H v D -> D (H v)", layers=EVERY_LAYER),
)
SHARED = tuple(
    Rule(f"{_SHARED}.{name}.kernel", f"model.layers.{{L}}.mlp.shared_experts.{target}.weight",
         place, layers=MOE_LAYERS)
    for name, target, place in (("wi_0", "gate_proj", "D S -> S D"),
                                ("wi_1", "up_proj",   "D S -> S D"),
                                ("wo",   "down_proj", "S D -> D S"))
)
_CORRECTION = "model.layers.{L}.mlp.gate.e_score_correction_bias"
BIAS = (
    Rule(f"{_MOE}.gate.bias", _CORRECTION, "E -> E", layers=_BIASED),
    Rule(None,                _CORRECTION, "E -> E", layers=_PLAIN, fill=0.0),
)
# fmt: on
RULES = (
    *TRUNK,
    *NORMS,
    *MLA,
    *MLP,
    *experts(_MOE, "mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    *SHARED,
)


def refusal(model: ModelDescription) -> str | None:
    """Why neither DeepSeek-V2 nor V3 holds a model of this block."""
    experts, shared = model.moe_intermediate_size or 0, model.shared_intermediate_size or 0
    if not model.moe_layers:
        return "it has no Mixture-of-Experts layer"
    if not shared or shared % experts:
        return f"its shared experts are {shared} wide, no multiple of an expert's {experts}"
    if model.settings["rope_attention_scaling"] or not model.settings["rope_interleave"]:
        return (
            "latent attention there rotates pairs of neighbours and does not scale them; "
            "rope_interleave=true and rope_attention_scaling=false say that"
        )
    # modeling_deepseek_v3.py: `q_a_layernorm` and `kv_a_layernorm` are made without an epsilon.
    if model.rms_norm_eps != _INNER_EPSILON:
        return (
            f"normalization_layer_epsilon={model.rms_norm_eps:g}, but the norms within latent "
            f"attention always have {_INNER_EPSILON:g} in transformers (in vLLM they do not), and "
            "MaxText has one for all"
        )
    return None


_INNER_EPSILON = 1e-6


def _requires(model: ModelDescription) -> str | None:
    if (reason := refusal(model)) is not None:
        return reason
    if (score := model.settings["routed_score_func"]) != "sigmoid":
        return f"routed_score_func={score!r}; it scores experts by sigmoid"
    if is_biased(model) and not is_named(model):
        return (
            "MaxText weighs the chosen experts with the router's bias unless model_name begins "
            f"with {', '.join(_NAMES)} (layers/moe.py `get_topk`); here they are weighed without it"
        )
    (number, best), experts = groups(model), model.num_experts or 0
    if experts % number or not 0 < best <= number:
        return f"{experts} experts in {number} groups, of which {best} are chosen"
    if (model.num_experts_per_tok or 0) > best * experts // number:
        return f"{best} of {number} groups have fewer experts than a token goes to"
    return None


def caveats(model: ModelDescription, options: Options) -> list[str]:
    """What is said of a model on either target."""
    number = model.settings["n_routing_groups"]
    if number != -1 and not is_named(model):
        return [
            f"n_routing_groups={number} is ignored: MaxText chooses groups of experts only where "
            f"model_name begins with {', '.join(_NAMES)}"
        ]
    return []


def _rope(model: ModelDescription) -> dict[str, Any]:
    """`rope_parameters`, with the scale of attention.

    MaxText multiplies scores by (0.1·mscale·ln(factor) + 1)² where the positions are stretched
    (layers/attention_mla.py), transformers the same by `mscale_all_dim` (`yarn_apply_mscale`).
    """
    stretched = model.settings["rope_positions"] > model.settings["original_max_position_embeddings"]
    mscale = model.settings["mscale"] if stretched else 0.0
    return {**rope_parameters(model), "mscale": mscale, "mscale_all_dim": mscale}


def _rope_scaling(model: ModelDescription) -> dict[str, Any]:
    return {key: value for key, value in _rope(model).items() if key != "rope_theta"}


def config(name: str, architecture: str, **own: Any) -> tuple[ConfigKey, ...]:
    """The config table of DeepSeek's architectures.

    Args:
        name: The model's type.
        architecture: The class.
        own: What the others lack, or have another constant for.
    """
    shared = [key for key in CONFIG if key.key not in ("head_dim", "rope_scaling", "rope_parameters")]
    sizes = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return (
        constant("architectures", [architecture]),
        constant("model_type", name),
        *shared,
        ConfigKey("rope_scaling", lambda m, o: _rope_scaling(m), "YaRN, for transformers 4"),
        ConfigKey("rope_parameters", lambda m, o: _rope(m), "YaRN and theta, for 5"),
        *map(from_field, sizes),
        ConfigKey(
            "intermediate_size",
            lambda m, o: m.intermediate_size or m.moe_intermediate_size,
            "`intermediate_size`, without dense layers `moe_intermediate_size`",
        ),
        from_field("moe_intermediate_size"),
        from_field("n_routed_experts", "num_experts"),
        from_field("num_experts_per_tok"),
        ConfigKey("n_shared_experts", lambda m, o: _shared_experts(vars(m)), "`shared_experts`"),
        ConfigKey("first_k_dense_replace", lambda m, o: len(m.dense_layers), "dense layers"),
        constant("moe_layer_freq", 1),
        ConfigKey(
            "routed_scaling_factor",
            lambda m, o: m.settings["routed_scaling_factor"],
            "`routed_scaling_factor`",
        ),
        ConfigKey("n_group", lambda m, o: groups(m)[0], "`n_routing_groups`, 1 for none"),
        ConfigKey("topk_group", lambda m, o: groups(m)[1], "`topk_routing_group`"),
        constant("attention_bias", False),
        constant("pretraining_tp", 1),
        *(constant(key, value) for key, value in own.items()),
    )


def alone(settings: Any, number: int, is_moe: bool) -> None:
    """Makes the one layer of a config dense or not (`Probe.alone`)."""
    settings.first_k_dense_replace = 0 if is_moe else 1


def _scores(mlp: Any, output: Any) -> Any:
    return output[0].sigmoid() + mlp.gate.e_score_correction_bias


TARGET = Target(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    summary="For models of MaxText's deepseek block that score experts by sigmoid (DeepSeek-V3, "
    "Kimi-K2); transformers ≥ 4.51.",
    kinds=Layers(),
    requires=_requires,
    since="4.51.0",
    caveats=caveats,
    rules=(*RULES, *BIAS),
    probe=Probe(scores=_scores, alone=alone),
    config=config(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        norm_topk_prob=True,
        rope_interleave=True,
        num_nextn_predict_layers=0,
    ),
)
