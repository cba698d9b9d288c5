"""Gemma 4 (text): five layers with a window, then one that sees everything, of sizes of its own.

MaxText 0.2.5 and transformers compute the same function (models/gemma4.py, layers/moe.py
`RoutedAndSharedMoE`, `get_topk`; models/gemma4/modeling_gemma4.py) under conditions that
`_requires` holds. Norms are stored as they are, the embedding times sqrt(hidden_size)
(checkpoint_conversion/utils/param_mapping.py `GEMMA4_MAXTEXT_TO_HF_PARAM_HOOK_FN`).
"""

from collections.abc import Mapping
from typing import Any

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import ConfigField, Known, has_moe, not_negative, positive_int, truth
from moeconv.arch.keys import keys
from moeconv.arch.parameters import LayerKind, Layers
from moeconv.errors import UnsupportedError
from moeconv.families._gemma4 import LAYERS, PATTERN, ROUTED, RULES, STACKINGS
from moeconv.families._shared import CONFIG, DROPS_TOKENS, IDLE, QUANTISES, setting
from moeconv.mapping.reading import Config, Reading, multimodal, ropes_of, typed
from moeconv.mapping.rules import ConfigKey, Probe, Target, constant, from_field


def _layer_type(position: int, settings: Mapping[str, Any]) -> str:
    return PATTERN[position % len(PATTERN)]


def _theta(value: Any) -> float:
    return -1 if value == -1 else not_negative(value)


def _share(value: Any) -> float:
    if not 0 < (number := not_negative(value)) <= 1:
        raise ValueError
    return number


def _cap(value: Any) -> float:
    return 0.0 if value is None else not_negative(value)


def _is_tied(known: Known) -> bool:
    return bool(known["tie_word_embeddings"])


def _shares(kinds: tuple[LayerKind, ...]) -> bool:
    return any(kind.attention == "shared" for kind in kinds)


_THETA, _SHARE = "a number ≥ 0, or -1", "a number above 0, at most 1"
CAP = ConfigField(
    "final_logits_soft_cap", "final_logits_soft_cap", _cap, "a number ≥ 0", _is_tied, nullable=True
)
BLOCK = Block(
    name="gemma4",
    since="0.2.4",
    note="five layers with a window, then a global one of other sizes; all dense, or all with "
    "experts beside the MLP",
    layers=LAYERS,
    targets=("gemma4",),
    stackings=STACKINGS,
    query_scale_in_kernel=False,  # its `query_pre_attn_scalar` is 1
    ropes=("default",),
    settings=(
        ConfigField("sliding_window_size", "sliding_window_size", positive_int, "a whole number"),
        CAP,
        ConfigField("local_rope_max_timescale", "local_rope_max_timescale", _theta, _THETA),
        ConfigField("global_rope_max_timescale", "global_rope_max_timescale", _theta, _THETA),
        ConfigField("local_rope_proportion", "local_rope_proportion", _share, _SHARE),
        ConfigField("global_rope_proportion", "global_rope_proportion", _share, _SHARE),
        ConfigField("norm_topk_prob", "norm_topk_prob", truth, "true or false", has_moe),
        ConfigField("model_name", "model_name", str, "a name"),
    ),
    layer_types=_layer_type,
    demands={"mlp_activations": (("gelu", "linear"),), "v_norm_with_scale": (False,)},
    shapes={
        "use_post_attn_norm": lambda known: True,
        "use_post_ffw_norm": lambda known: True,
        "shared_experts": lambda known: 1 if known["num_experts"] else None,
        "global_head_dim": lambda known: known["global_head_dim"],
        "global_num_kv_heads": lambda known: known["num_global_key_value_heads"],
        "share_kv_projections": lambda known: _shares(known["layer_kinds"]),
    },
    idle=IDLE | {"model_call_mode", "use_qk_norm"},
    warns={**DROPS_TOKENS, **QUANTISES},
    taps=Taps(
        mlp=dict.fromkeys(("dense", "moe"), "post_ffw_norm"),
        router=f"{ROUTED}.gate",
        router_in_layer=True,
    ),
)


def _requires(model: ModelDescription) -> str | None:
    name, told = model.settings["model_name"], model.settings
    if model.settings["layer_types"][-1] != PATTERN[-1]:
        return (
            f"it has {model.num_hidden_layers} layers, no multiple of six, so that the last has a "
            "window; transformers lets the last layer of a Gemma 4 see everything "
            "(configuration_gemma4.py)"
        )
    kinds = set(model.layer_kinds)
    if len(kinds) > 2 or len({kind.mlp for kind in kinds}) > 1:
        return "its layers are of several kinds beside the window"
    if model.rms_norm_eps != 1e-6:
        return (
            f"normalization_layer_epsilon is {model.rms_norm_eps:g}; MaxText takes 1e-6 for the "
            "norms of the layers and that for the others (models/gemma4.py), a Gemma 4 has one"
        )
    if not told.get("norm_topk_prob", True):
        return "norm_topk_prob is false; a Gemma 4 lets the weights of the chosen experts sum to 1"
    kv = model.num_key_value_heads, model.num_global_key_value_heads
    if kv[0] != kv[1] and not _shares(model.layer_kinds):
        return (
            f"its global layers have {kv[1]} key heads, the others {kv[0]}, and values of their "
            "own; a Gemma 4 has other key heads only where these are the values too"
        )
    if name.startswith("gemma4"):
        return None
    if not keys()["model_name"].is_neutral(name):
        return f"model_name is {name}, for which MaxText has code of its own"
    if min(told["local_rope_proportion"], told["global_rope_proportion"]) < 1:
        return (
            f"model_name is {name}, with which MaxText rotates the first part of a head in halves "
            "of that part, at other frequencies (layers/attentions.py `init_rotary_embedding`); a "
            "Gemma 4 is rotated as under a name that begins with gemma4"
        )
    return None


def _ropes(model: ModelDescription) -> dict[str, Any]:
    """One for each kind of layer; `proportional` is MaxText's `Gemma4PartialRotaryEmbedding`."""
    found = {}
    for place, kind in (("local", PATTERN[0]), ("global", PATTERN[-1])):
        own, share = (
            model.settings[f"{place}_rope_{what}"] for what in ("max_timescale", "proportion")
        )
        theta = own if own > 0 else model.rope_theta
        part = {"rope_type": "proportional", "partial_rotary_factor": share}
        found[kind] = {**(part if share < 1 else {"rope_type": "default"}), "rope_theta": theta}
    return found


def _alone(config: Any, n: int, is_moe: bool) -> None:
    """Moves the sizes of a global layer, which are kept by its number in the whole model."""
    if getattr(config, "is_heterogeneous", False):
        config.num_hidden_layers = n + 1
        layer = config.per_layer_config[n]
        config.num_hidden_layers = 1
        names = ("head_dim", "num_key_value_heads")
        config.per_layer_config = {0: {name: getattr(layer, name) for name in names}}


def _read_ropes(config: Config) -> dict[str, Any]:
    """Of each kind of layer; a part that is all of a head is none."""
    found = ropes_of(config, PATTERN[-1], PATTERN[0])
    for rope in found.values():
        if rope.get("partial_rotary_factor", 1.0) == 1.0:
            rope |= {"rope_type": "default"}
            rope.pop("partial_rotary_factor", None)
    return found


def _global_sizes(config: Config) -> dict[str, Any]:
    """Sizes of layers without a window, which transformers 5.23 keeps by the number of the layer.

    configuration_gemma4.py `Gemma4TextConfig.__post_init__`.
    """
    own = config.get("per_layer_config")
    if not own:
        shared = config["attention_k_eq_v"]
        heads = config.get("num_global_key_value_heads") if shared else None
        return {"head_dim": config.get("global_head_dim") or 512, "num_key_value_heads": heads}
    types = config["layer_types"]
    numbers = [n for n, kind in enumerate(types) if kind == PATTERN[-1]]
    first: dict[str, Any] = own[str(numbers[0])]
    if own != {str(n): first for n in numbers}:
        raise UnsupportedError("per_layer_config gives its layers more sizes than two")
    return first


def _reading_fields(config: Config) -> dict[str, Any]:
    half = "moe" if config["enable_moe_block"] else "dense"
    whole = "shared" if config["attention_k_eq_v"] else "global"
    sizes = _global_sizes(config)
    kinds = {PATTERN[0]: f"sliding {half}", PATTERN[-1]: f"{whole} {half}"}
    heads = sizes.get("num_key_value_heads") or config["num_key_value_heads"]
    experts = {} if half == "moe" else dict.fromkeys(_OF_EXPERTS)
    return {
        "rope_type": "default",
        "rope_theta": _read_ropes(config)[PATTERN[-1]]["rope_theta"],
        "rope_use_scale": False,
        "normalize_embedding_logits": config["tie_word_embeddings"],
        "layer_kinds": [kinds[each] for each in config["layer_types"]],
        "global_head_dim": sizes.get("head_dim", config["head_dim"]),
        "num_global_key_value_heads": heads,
        **experts,
    }


def _reading_settings(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, rope in zip(("global", "local"), _read_ropes(config).values(), strict=True):
        found[f"{place}_rope_max_timescale"] = rope["rope_theta"]
        found[f"{place}_rope_proportion"] = rope.get("partial_rotary_factor", 1.0)
    return {
        **found,
        "final_logits_soft_cap": config["final_logit_softcapping"] or 0.0,
        "norm_topk_prob": True,
        "model_name": "gemma4-26b" if config["enable_moe_block"] else "gemma4-31b",
    }


_OF_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
# What a config without RoPE means.
_ROPES = {
    PATTERN[0]: {"rope_type": "default", "rope_theta": 10_000.0},
    PATTERN[-1]: {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
}
_OTHERWISE = {"hidden_act", "rope_theta", "rope_scaling", "rope_parameters"}
TARGET = Target(
    name="gemma4",
    architecture="Gemma4ForCausalLM",
    summary="For models of MaxText's gemma4 block; transformers ≥ 5.5.",
    kinds=Layers(),
    since="5.5.0",
    requires=_requires,
    reading=Reading(
        {
            "layer_types": typed(len(PATTERN), PATTERN[0], PATTERN[-1]),
            "rope_parameters": lambda c: _ROPES,
        },
        _reading_fields,
        _reading_settings,
        _read_ropes,
        multimodal=(
            multimodal(
                "Gemma4ForConditionalGeneration",
                ("vision_tower", "vision tower"),
                ("audio_tower", "audio tower"),
                ("embed_vision", "projector of images"),
                ("embed_audio", "projector of sound"),
                # modeling_gemma4.py `create_causal_mask_mapping`: of the tokens of an image.
                unread={"use_bidirectional_attention": "vision"},
            ),
        ),
        # Without layers that have inputs of their own; the sizes are read (`_global_sizes`).
        ignored=frozenset(
            {
                "vocab_size_per_layer_input",
                "per_layer_config",
                "global_head_dim",
                "num_global_key_value_heads",
                "cache_implementation",
            }
        ),
    ),
    rules=RULES,
    # What is behind the feed-forward half's last norm; the router is beside that half.
    probe=Probe(mlp=("post_feedforward_layernorm",), router="router.proj", alone=_alone),
    config=(
        constant("architectures", ["Gemma4ForCausalLM"]),
        constant("model_type", "gemma4_text"),
        *(key for key in CONFIG if key.key not in _OTHERWISE),
        constant("hidden_activation", "gelu_pytorch_tanh"),
        ConfigKey("rope_parameters", lambda m, o: _ropes(m), "RoPE of both kinds of layer"),
        from_field("intermediate_size"),
        from_field("global_head_dim"),
        ConfigKey(
            "num_global_key_value_heads",
            lambda m, o: m.num_global_key_value_heads if _shares(m.layer_kinds) else None,
            "`num_global_key_value_heads` where global layers have no values of their own",
        ),
        ConfigKey(
            "attention_k_eq_v", lambda m, o: _shares(m.layer_kinds), "`share_kv_projections`"
        ),
        setting("sliding_window", "sliding_window_size"),
        ConfigKey(
            "layer_types", lambda m, o: list(m.settings["layer_types"]), "in turn, by position"
        ),
        ConfigKey(
            "final_logit_softcapping",
            lambda m, o: m.settings.get("final_logits_soft_cap") or None,
            "`final_logits_soft_cap` of tied logits (layers/nnx_decoders.py `apply_output_head`)",
        ),
        ConfigKey("enable_moe_block", lambda m, o: bool(m.num_experts), "with experts"),
        from_field("num_experts"),
        from_field("top_k_experts", "num_experts_per_tok"),
        from_field("moe_intermediate_size"),
        constant("hidden_size_per_layer_input", 0),
        from_field("vocab_size_per_layer_input", "vocab_size"),
        constant("num_kv_shared_layers", 0),
        constant("use_double_wide_mlp", False),
        constant("use_bidirectional_attention", None),
        constant("attention_bias", False),
    ),
)
