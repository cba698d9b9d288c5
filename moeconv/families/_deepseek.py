"""What DeepSeek-V2, V3 and V3.2 share: latent attention, two kinds of layers, routing, the config.

How MaxText chooses and weighs experts hangs on the name of the model (layers/moe.py `GateLogit`,
`RoutedMoE.get_topk`: `startswith`). Under `NAMES` it does as the published DeepSeek-V3: it chooses
by score plus bias, in the best groups, and weighs by the score. Under any other name it chooses and
weighs by score plus bias, and ignores groups.
"""

import math
from collections.abc import Callable
from typing import Any

from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import (
    ROUTING,
    ConfigField,
    Known,
    has_moe,
    not_negative,
    positive_int,
    truth,
)
from moeconv.arch.parameters import LayerKind, Layers, Parameter
from moeconv.arch.stacks import Module, Segment, Stacking
from moeconv.errors import UnsupportedError
from moeconv.families._shared import (
    CONFIG,
    MLP,
    MLP_PARAMETERS,
    NORM_PARAMETERS,
    NORMS,
    TRUNK,
    experts,
    mlp,
    moe_parameters,
    rope_parameters,
    setting,
    shared_experts,
    shared_parameters,
)
from moeconv.mapping.reading import Config, Reading, rope_fields, rope_of, yarn_settings
from moeconv.mapping.rules import (
    EVERY_LAYER,
    MOE_LAYERS,
    ConfigKey,
    Options,
    Rule,
    constant,
    from_field,
)

ROUTED = "DeepSeekMoeBlock_0.MoeBlock_0"
_SHARED = "DeepSeekMoeBlock_0.shared_experts"
# layers/attention_mla.py `MLA._init_projections`: queries directly, or through a narrow layer,
# which an indexer reads too (`Indexer`).
_DIRECT, NARROW, INDEXED = (Layers(attention=kind) for kind in ("mla", "mla_lora", "mla_index"))

# --- MaxText's layers -----------------------------------------------------------------------------

# fmt: off
_LORA = (
    Parameter.of("self_attention.wq_a.kernel",  "D q"),
    Parameter.of("self_attention.q_norm.scale", "q"),
    Parameter.of("self_attention.wq_b.kernel",  "q H k"),
)
_QUERY = {
    "mla":       (Parameter.of("self_attention.query.kernel", "D H k"),),
    "mla_lora":  _LORA,
    "mla_index": (*_LORA,
                  Parameter.of("self_attention.indexer.wq_b.kernel",         "q I i"),
                  Parameter.of("self_attention.indexer.wk.kernel",           "D i"),
                  Parameter.of("self_attention.indexer.k_norm.scale",        "i"),
                  Parameter.of("self_attention.indexer.k_norm.bias",         "i"),
                  Parameter.of("self_attention.indexer.weights_proj.kernel", "D I")),
}
_KEY_VALUE = (
    Parameter.of("self_attention.wkv_a.kernel",  "D r"),
    Parameter.of("self_attention.kv_norm.scale", "c"),
    Parameter.of("self_attention.wkv_b.kernel",  "c H b"),
    Parameter.of("self_attention.out.kernel",    "H v D"),
)
_EXPERTS = (
    *moe_parameters(ROUTED),
    *shared_parameters(_SHARED),
)
_FEED_FORWARD = {
    "dense":    MLP_PARAMETERS,
    "moe":      _EXPERTS,
    "moe+bias": (*_EXPERTS, Parameter.of(f"{ROUTED}.gate.bias", "E", "MoEBiasVar")),
}
# fmt: on
LAYERS = {
    LayerKind(f"{attention} {mlp}"): (*NORM_PARAMETERS, *query, *_KEY_VALUE, *feed_forward)
    for attention, query in _QUERY.items()
    for mlp, feed_forward in _FEED_FORWARD.items()
}


def stacking(name: str, pattern: str, *, stacked: bool) -> Stacking:
    """Dense layers, then those with experts.

    Source: layers/nnx_decoders.py `_init_scanned_deepseek_standard`, `_init_sequential_deepseek`.
    """
    dense, moe = (
        Module(f"{mlp}_{pattern}", stacked=stacked, kinds=Layers(mlp=mlp))
        for mlp in ("dense", "moe")
    )
    return Stacking(name, (Segment((dense,), optional=True), Segment((moe,))))


# --- routing --------------------------------------------------------------------------------------

# Of MaxText 0.2.5, with what each makes of the routing; before, kimi-k2 was none of them.
_AS_V3, _SINCE = "as DeepSeek-V3", "as DeepSeek-V3, since MaxText 0.2.5"
_NAMES = {"deepseek3": _AS_V3, "deepseek4": _AS_V3, "kimi-k2": _SINCE}
NAMES = tuple(_NAMES)
_RELEASED = {_AS_V3: "deepseek3-671b", _SINCE: "kimi-k2-1t"}


def _routing(model_name: Any) -> str:
    """What a model's name makes of its routing; that itself, where it is given."""
    name = str(model_name)
    of_name = (routing for start, routing in _NAMES.items() if name.startswith(start))
    return name if name in _RELEASED else next(of_name, "by biased scores")


SETTINGS = (
    *ROUTING,
    ConfigField(
        "routing",
        "model_name",
        _routing,
        "a name",
        has_moe,
        write=lambda value: _RELEASED.get(value, "default"),
    ),
    ConfigField("routed_bias", "routed_bias", truth, "true or false", has_moe),
    ConfigField("mscale", "mscale", not_negative, "a number ≥ 0"),
    ConfigField(
        "index_topk",
        "indexer_topk",
        positive_int,
        "a whole number ≥ 1",
        lambda known: known["index_n_heads"] is not None,
    ),
)


def biased(known: Known) -> bool:
    """True if the router has a bias."""
    return any(kind.variant == "bias" for kind in known["layer_kinds"])


def routes_as_v3(model: ModelDescription) -> bool:
    """True if MaxText routes by the rules of DeepSeek-V3, for the model's name."""
    return model.settings["routing"] in _RELEASED


def routes_so_since(model: ModelDescription) -> bool:
    """True if it does since 0.2.5 only."""
    return bool(model.settings["routing"] == _SINCE)


def groups(model: ModelDescription) -> tuple[int, int]:
    """How many groups of experts there are, and in how many of them a token's are."""
    number = model.settings["n_routing_groups"]
    if not routes_as_v3(model) or number == -1:
        return 1, 1
    return number, model.settings["topk_routing_group"]


# --- rules ----------------------------------------------------------------------------------------

# fmt: off
RULES = (
    *TRUNK,
    *NORMS,
    Rule("self_attention.query.kernel",  "model.layers.{L}.self_attn.q_proj.weight",
         "D H k -> (H k) D", layers=_DIRECT),
    Rule("self_attention.wq_a.kernel",   "model.layers.{L}.self_attn.q_a_proj.weight",
         "D q -> q D", layers=NARROW),
    Rule("self_attention.q_norm.scale",  "model.layers.{L}.self_attn.q_a_layernorm.weight",
         "q -> q", layers=NARROW),
    Rule("self_attention.wq_b.kernel",   "model.layers.{L}.self_attn.q_b_proj.weight",
         "q H k -> (H k) q", layers=NARROW),
    Rule("self_attention.wkv_a.kernel",  "model.layers.{L}.self_attn.kv_a_proj_with_mqa.weight",
         "D r -> r D", layers=EVERY_LAYER),
    Rule("self_attention.kv_norm.scale", "model.layers.{L}.self_attn.kv_a_layernorm.weight",
         "c -> c", layers=EVERY_LAYER),
    Rule("self_attention.wkv_b.kernel",  "model.layers.{L}.self_attn.kv_b_proj.weight",
         "c H b -> (H b) c", layers=EVERY_LAYER),
    Rule("self_attention.out.kernel",    "model.layers.{L}.self_attn.o_proj.weight",
         "H v D -> D (H v)", layers=EVERY_LAYER),
    *MLP,
    *experts(ROUTED, "mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    *mlp(_SHARED, "model.layers.{L}.mlp.shared_experts", "S", MOE_LAYERS),
)
# fmt: on

# --- what the targets hold ------------------------------------------------------------------------

# modeling_deepseek_v2.py: `q_a_layernorm` and `kv_a_layernorm` are made without an epsilon.
_INNER_EPSILON = 1e-6


def refusal(model: ModelDescription, *, indexed: bool = False) -> str | None:
    """Why no DeepSeek holds a model.

    Args:
        model: The model.
        indexed: True for the one whose indexer chooses keys, False for those without.
    """
    if indexed != (model.index_n_heads is not None):
        return (
            "it has no indexer that chooses keys (use_indexer)"
            if indexed
            else "an indexer chooses the keys that it attends to (use_indexer)"
        )
    expert, shared = model.moe_intermediate_size or 0, model.shared_intermediate_size or 0
    if not model.moe_layers:
        return "it has no Mixture-of-Experts layer"
    if model.settings["routed_bias"] and not biased(vars(model)):
        return (
            "routed_bias=true, but the checkpoint has no bias of the router: a parameters-only "
            "checkpoint of MaxText 0.2.5 leaves it out (layers/moe.py `MoEBiasVar`); convert the "
            "train state"
        )
    if biased(vars(model)) and not model.settings["routed_bias"]:
        return "routed_bias=false, but the checkpoint has a bias of the router"
    if not shared or shared % expert:
        return f"its shared experts are {shared} wide, no multiple of an expert's {expert}"
    if model.settings["rope_attention_scaling"] or not model.settings["rope_interleave"]:
        return (
            "it rotates neighbours and does not scale them: rope_interleave=true and "
            "rope_attention_scaling=false"
        )
    if model.rms_norm_eps != _INNER_EPSILON:
        return (
            f"normalization_layer_epsilon={model.rms_norm_eps:g}, which MaxText has in all norms; "
            f"those within latent attention have {_INNER_EPSILON:g} in transformers, whatever the "
            "config says"
        )
    return None


def caveats(model: ModelDescription, options: Options) -> list[str]:
    """What is said of a model on either target."""
    # Transformers 5 would take it over into `rope_parameters`, beside `rope_type`.
    lines = [
        "mistral.rs refuses a DeepSeek whose rope_scaling has no key `type`, the old name of "
        "rope_type"
    ]
    if model.settings["n_routing_groups"] == -1 or routes_as_v3(model):
        return lines
    return [
        *lines,
        f"n_routing_groups={model.settings['n_routing_groups']} has no effect: MaxText chooses "
        f"groups of experts only where model_name begins with {', '.join(NAMES)}",
    ]


def alone(config: Any, number: int, is_moe: bool) -> None:
    """Makes the one layer of a config dense or not (`Probe.alone`)."""
    config.first_k_dense_replace = 0 if is_moe else 1


def _mscale(model: ModelDescription) -> float:
    """0 where positions are not stretched, and MaxText scales nothing."""
    numbers = model.settings
    stretched = numbers["rope_positions"] > numbers["original_max_position_embeddings"]
    return float(numbers["mscale"]) if stretched else 0.0


def is_scaled(model: ModelDescription) -> bool:
    """True if YaRN scales attention."""
    return _mscale(model) > 0 and model.settings["rope_factor"] > 1


def _rope(model: ModelDescription) -> dict[str, Any]:
    """`rope_parameters`, with the scale of attention.

    MaxText multiplies scores by (0.1·mscale·ln(factor) + 1)² (layers/attention_mla.py);
    transformers does by `mscale_all_dim` (`yarn_apply_mscale`), and scales what is rotated by the
    ratio of both.
    """
    mscale = _mscale(model)
    return {**rope_parameters(model), "mscale": mscale, "mscale_all_dim": mscale}


def _rope_scaling(model: ModelDescription) -> dict[str, Any]:
    return {key: value for key, value in _rope(model).items() if key != "rope_theta"}


def _always(value: Any) -> Callable[[Config], Any]:
    return lambda config: value


def _read_rope(config: Config) -> dict[str, Any]:
    """Its RoPE, with the scale of what is rotated (`_compute_yarn_parameters`)."""
    rope = rope_of(config)
    if rope["rope_type"] != "yarn":
        return rope
    one, other, factor = rope.get("mscale"), rope.get("mscale_all_dim"), rope["factor"]
    scale = rope.get("attention_factor")
    if scale is None and one and other:
        scale = _yarn_scale(factor, one) / _yarn_scale(factor, other)
    return {
        **rope,
        "attention_factor": _yarn_scale(factor, 1.0) if scale is None else scale,
        "mscale": 0.0,
        "mscale_all_dim": other or 0.0,
    }


def _yarn_scale(factor: float, mscale: float) -> float:
    """modeling_rope_utils.py `get_mscale`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def reading(*, biased: bool, **own: Any) -> Reading:
    """How a config of DeepSeek's architectures is read.

    Args:
        biased: The router has a bias.
        own: As in `config`.
    """
    score = own["scoring_func"]

    def fields(config: Config) -> dict[str, Any]:
        attention = "mla_lora" if config["q_lora_rank"] else "mla"
        routed = f"{attention} moe+bias" if biased else f"{attention} moe"
        if config.get("head_dim") not in (None, config["qk_rope_head_dim"]):
            raise UnsupportedError(
                f"head_dim is {config['head_dim']}, by which transformers rotates, and "
                f"qk_rope_head_dim {config['qk_rope_head_dim']}"
            )
        layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
        return {
            **rope_fields(rope_of(config)),
            "layer_kinds": [f"{attention} dense"] * dense + [routed] * (layers - dense),
            "head_dim": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
            "intermediate_size": config["intermediate_size"] if dense else None,
            "shared_intermediate_size": config["n_shared_experts"]
            * config["moe_intermediate_size"],
        }

    def settings(config: Config) -> dict[str, Any]:
        rope = _read_rope(config)
        yarn = yarn_settings(rope, config, interleave=True)
        grouped = config["n_group"] > 1
        return {
            **yarn,
            "routed_score_func": score,
            "n_routing_groups": config["n_group"] if grouped else -1,
            "topk_routing_group": config["topk_group"] if grouped else -1,
            "routing": _AS_V3 if biased else "by biased scores",
            "routed_bias": biased,
            "mscale": float(rope.get("mscale_all_dim", 0.0)),
        }

    return Reading(
        {
            "num_key_value_heads": lambda c: c["num_attention_heads"],
            "n_group": lambda c: 1,
            "topk_group": lambda c: 1,
            "moe_layer_freq": lambda c: 1,
            **{key: _always(value) for key, value in own.items()},
        },
        fields,
        settings,
        _read_rope,
        # Training's losses; layers that predict further tokens are left out with their tensors.
        ignored=frozenset(
            {
                "aux_loss_alpha",
                "ep_size",
                "head_dim",
                "num_mtp_layers",
                "qk_head_dim",
                "num_nextn_predict_layers",
                "seq_aux",
            }
        ),
    )


_OTHERWISE = frozenset({"head_dim", "rope_scaling", "rope_parameters"})


def config(name: str, architecture: str, **own: Any) -> tuple[ConfigKey, ...]:
    """The config table of DeepSeek's architectures.

    Args:
        name: The model's type.
        architecture: The class.
        own: Constants of this one.
    """
    sizes = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return (
        constant("architectures", [architecture]),
        constant("model_type", name),
        *(key for key in CONFIG if key.key not in _OTHERWISE),
        ConfigKey("rope_scaling", lambda m, o: _rope_scaling(m), "YaRN, for transformers 4"),
        ConfigKey("rope_parameters", lambda m, o: _rope(m), "YaRN and theta, for 5"),
        *map(from_field, sizes),
        ConfigKey(
            "intermediate_size",
            lambda m, o: m.intermediate_size or m.moe_intermediate_size,
            "`intermediate_size`; without dense layers `moe_intermediate_size`",
        ),
        from_field("moe_intermediate_size"),
        from_field("n_routed_experts", "num_experts"),
        from_field("num_experts_per_tok"),
        ConfigKey("n_shared_experts", lambda m, o: shared_experts(vars(m)), "`shared_experts`"),
        ConfigKey("first_k_dense_replace", lambda m, o: len(m.dense_layers), "dense layers"),
        constant("moe_layer_freq", 1),
        setting("routed_scaling_factor", "routed_scaling_factor"),
        ConfigKey("n_group", lambda m, o: groups(m)[0], "`n_routing_groups`, 1 for none"),
        ConfigKey("topk_group", lambda m, o: groups(m)[1], "`topk_routing_group`, 1 for none"),
        constant("attention_bias", False),
        constant("pretraining_tp", 1),
        *(constant(key, value) for key, value in own.items()),
    )
