"""The fields that shapes do not show, and the config keys that shapes can contradict."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Known = Mapping[str, Any]


@dataclass(frozen=True)
class ConfigField:
    """A field or setting of the description that the config must give.

    Attributes:
        name: Field of `ModelDescription`, or name in its `settings`.
        key: MaxText config key.
        parse: Checks and converts a config value; raises ValueError or TypeError.
        expects: What `parse` accepts, for messages.
        needed: True if this model has the field at all, given what is known so far.
        otherwise: Value of a field where it is not needed; a setting is left out there.
        write: A config value of which `parse` makes this value of a setting.
        nullable: True if MaxText's null is one of its values, which `parse` takes as None.
    """

    name: str
    key: str
    parse: Callable[[Any], Any]
    expects: str
    needed: Callable[[Known], bool] = lambda known: True
    otherwise: Any = None
    write: Callable[[Any], Any] = lambda value: value
    nullable: bool = False


def positive_float(value: Any) -> float:
    """A finite number above 0, or ValueError, TypeError or OverflowError; so the next."""
    number = float(value)
    if isinstance(value, bool) or not 0 < number < float("inf"):
        raise ValueError
    return number


def positive_int(value: Any) -> int:
    """A whole number from 1."""
    number = int(value)
    if isinstance(value, bool) or number != float(value) or not 1 <= number < 2**63:
        raise ValueError
    return number


def truth(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError
    return value


def not_negative(value: Any) -> float:
    """A finite number from 0."""
    return 0.0 if value == 0 and not isinstance(value, bool) else positive_float(value)


def count_or_none(value: Any) -> int:
    """A whole number from 1, or MaxText's -1 for none."""
    return -1 if value == -1 else positive_int(value)


def _rope_type(value: Any) -> str:
    """MaxText compares by prefix, in lower case (layers/attentions.py `init_rotary_embedding`)."""
    text = str(value).lower()
    for name in ("llama3.1", "yarn"):
        if text.startswith(name):
            return name
    if text != "default":
        raise ValueError
    return text


def has_moe(known: Known) -> bool:
    """True if the model has a Mixture-of-Experts layer."""
    return any(kind.mlp == "moe" for kind in known["layer_kinds"])


FIELDS: tuple[ConfigField, ...] = (
    ConfigField(
        "num_experts_per_tok", "num_experts_per_tok", positive_int, "a whole number ≥ 1", has_moe
    ),
    ConfigField(
        "normalize_embedding_logits",
        "normalize_embedding_logits",
        truth,
        "true or false",
        lambda known: bool(known["tie_word_embeddings"]),
        False,
    ),
    ConfigField("rope_type", "rope_type", _rope_type, "default, llama3.1 or yarn"),
    ConfigField("rope_theta", "rope_max_timescale", positive_float, "a number > 0"),
    ConfigField(
        "rope_use_scale",
        "rope_use_scale",
        truth,
        "true or false",
        lambda known: known.get("rope_type", "llama3.1") == "llama3.1",
        False,
    ),
    ConfigField("rms_norm_eps", "normalization_layer_epsilon", positive_float, "a number > 0"),
    ConfigField("max_position_embeddings", "max_target_length", positive_int, "a whole number ≥ 1"),
)


def _is_yarn(known: Known) -> bool:
    return known.get("rope_type") == "yarn"


# The settings of a model with YaRN; MaxText layers/embeddings.py `YarnRotaryEmbedding`. Positions
# from `rope_positions` on would be rotated as the last of them.
YARN: tuple[ConfigField, ...] = (
    ConfigField("rope_factor", "rope_factor", positive_float, "a number > 0", _is_yarn),
    ConfigField(
        "original_max_position_embeddings",
        "original_max_position_embeddings",
        positive_int,
        "a whole number ≥ 1",
        _is_yarn,
    ),
    ConfigField(
        "rope_positions", "max_position_embeddings", positive_int, "a whole number ≥ 1", _is_yarn
    ),
    ConfigField("beta_fast", "beta_fast", positive_float, "a number > 0", _is_yarn),
    ConfigField("beta_slow", "beta_slow", positive_float, "a number > 0", _is_yarn),
    ConfigField("rope_truncate", "rope_truncate", truth, "true or false", _is_yarn),
    ConfigField("rope_interleave", "rope_interleave", truth, "true or false", _is_yarn),
    ConfigField(
        "rope_attention_scaling", "rope_attention_scaling", truth, "true or false", _is_yarn
    ),
)

# Of blocks with a router of DeepSeek's kind; MaxText layers/moe.py `RoutedMoE.get_topk`.
ROUTING: tuple[ConfigField, ...] = (
    ConfigField("routed_score_func", "routed_score_func", str, "a function's name", has_moe),
    ConfigField(
        "routed_scaling_factor", "routed_scaling_factor", positive_float, "a number > 0", has_moe
    ),
    ConfigField(
        "n_routing_groups", "n_routing_groups", count_or_none, "-1 or a whole number ≥ 1", has_moe
    ),
    ConfigField(
        "topk_routing_group",
        "topk_routing_group",
        count_or_none,
        "-1 or a whole number ≥ 1",
        has_moe,
    ),
)

# Description field -> the config key (and its scaled form) that must agree with the shapes.
SHAPE_KEYS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("emb_dim", "base_emb_dim"),
    "num_attention_heads": ("num_query_heads", "base_num_query_heads"),
    "num_key_value_heads": ("num_kv_heads", "base_num_kv_heads"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "num_hidden_layers": ("num_decoder_layers", "base_num_decoder_layers"),
    "intermediate_size": ("mlp_dim", "base_mlp_dim"),
    "moe_intermediate_size": ("moe_mlp_dim", "base_moe_mlp_dim"),
    "num_experts": ("num_experts",),
    "tie_word_embeddings": ("logits_via_embedding",),
    "scan_layers": ("scan_layers",),
}

# Every key that a config may have, for the packaged defaults and for `--set`.
TOLD_KEYS: frozenset[str] = frozenset(
    {
        "decoder_block",
        "global_parameter_scale",
        "inhomogeneous_layer_cycle_interval",
        "interleave_moe_layer_step",
        "model_name",
        "param_scan_axis",
        "scan_layers",
        *(f.key for f in (*FIELDS, *YARN)),
        *(k for keys in SHAPE_KEYS.values() for k in keys if not k.startswith("base_")),
        *(k for keys in SHAPE_KEYS.values() for k in keys if k.startswith("base_")),
    }
)
