"""What decides whether a Gemma 4 can be held, and how transformers' runs one layer of it alone.

Sources: MaxText models/gemma4.py, models/gemma4_small.py; transformers models/gemma4.
"""

from collections.abc import Callable, Mapping
from typing import Any

from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import ConfigField, Known, not_negative, positive_int
from moeconv.arch.keys import keys
from moeconv.arch.parameters import LayerKind
from moeconv.families._gemma4 import LOCAL, PATTERN
from moeconv.mapping.rules import Probe

# models/gemma4_small.py `get_attention_pattern`.
E2B, E2B_PATTERN = "gemma4-e2b", PATTERN[1:]


def pattern_of(model_name: str) -> tuple[str, ...]:
    """The attention of the layers of a block of MaxText's Gemma 4 of this name."""
    return E2B_PATTERN if model_name == E2B else PATTERN


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


def shares(kinds: tuple[LayerKind, ...]) -> bool:
    """True if global layers have keys as values."""
    return any(kind.attention == "shared" for kind in kinds)


_THETA, _SHARE = "a number ≥ 0, or -1", "a number above 0, at most 1"
_CAP = ConfigField(
    "final_logits_soft_cap", "final_logits_soft_cap", _cap, "a number ≥ 0", _is_tied, nullable=True
)
SETTINGS = (
    ConfigField("sliding_window_size", "sliding_window_size", positive_int, "a whole number"),
    _CAP,
    ConfigField("local_rope_max_timescale", "local_rope_max_timescale", _theta, _THETA),
    ConfigField("global_rope_max_timescale", "global_rope_max_timescale", _theta, _THETA),
    ConfigField("local_rope_proportion", "local_rope_proportion", _share, _SHARE),
    ConfigField("global_rope_proportion", "global_rope_proportion", _share, _SHARE),
    ConfigField("model_name", "model_name", str, "a name"),
)
# What their shapes show alike.
SHAPES: Mapping[str, Callable[[Known], Any]] = {
    "use_post_attn_norm": lambda known: True,
    "use_post_ffw_norm": lambda known: True,
    "global_head_dim": lambda known: known["global_head_dim"],
    "global_num_kv_heads": lambda known: known["num_global_key_value_heads"],
}


def reusing(kinds: tuple[LayerKind, ...]) -> int:
    """How many layers attend to the keys and values of earlier ones."""
    return sum(kind.variant == "reuse" for kind in kinds)


def requires(model: ModelDescription) -> str | None:
    """Why a Gemma 4 of transformers is not this model; None if it is."""
    name, told = model.settings["model_name"], model.settings
    if model.settings["layer_types"][-1] != PATTERN[-1]:
        return (
            f"it has {model.num_hidden_layers} layers, no multiple of "
            f"{'five' if name == E2B else 'six'}, so that the last has a window; transformers lets "
            "the last layer of a Gemma 4 see everything (configuration_gemma4.py)"
        )
    kinds = {(kind.attention, kind.mlp) for kind in model.layer_kinds}
    if len(kinds) > 2 or len({mlp for _, mlp in kinds}) > 1:
        return "its layers are of several kinds beside the window"
    if (reason := _further(model)) is not None:
        return reason
    if model.rms_norm_eps != 1e-6:
        return (
            f"normalization_layer_epsilon is {model.rms_norm_eps:g}; MaxText takes 1e-6 for the "
            "norms of the layers and that for the others (models/gemma4.py), a Gemma 4 has one"
        )
    if not told.get("norm_topk_prob", True):
        return "norm_topk_prob is false; a Gemma 4 lets the weights of the chosen experts sum to 1"
    kv = model.num_key_value_heads, model.num_global_key_value_heads
    if kv[1] not in (None, kv[0]) and not shares(model.layer_kinds):
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


def _further(model: ModelDescription) -> str | None:
    """Of inputs that each layer has, and of layers that reuse keys and values."""
    count, types = model.num_hidden_layers, model.settings["layer_types"]
    kinds, width = model.layer_kinds, model.hidden_size_per_layer_input
    windows = [kind.attention in LOCAL for kind in kinds]
    # Without sizes of their own global layers are not seen in the shapes.
    heads = (model.num_key_value_heads, model.head_dim), (None, None)
    alike = (model.num_global_key_value_heads, model.global_head_dim) in heads
    if not alike and windows != [kind == PATTERN[0] for kind in types]:
        return (
            f"its layers with a window are not where MaxText has them under model_name="
            f"{model.settings['model_name']} (models/gemma4_small.py `get_attention_pattern`)"
        )
    reuse = reusing(kinds)
    own = types[: count - reuse]
    if reusing(kinds[count - reuse :]) != reuse or set(own) != set(types):
        return "layers that reuse keys and values are not its last, behind one of each attention"
    if width and model.all_layers_input_size != count * width:
        return (
            f"the inputs of its {count} layers are {model.all_layers_input_size} wide together, "
            f"not {count} times {width}"
        )
    if width and (model.vocab_size_per_layer_input or 0) < model.vocab_size:
        return (
            f"vocab_size_per_layer_input is {model.vocab_size_per_layer_input}, so that tokens "
            f"from there to {model.vocab_size} have no row; MaxText reads another one for them, "
            "and a Gemma 4 none"
        )
    return None


def ropes(model: ModelDescription) -> dict[str, Any]:
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


def _beside(model: Any, ids: Any, embedded: Any, last: Any) -> dict[str, Any]:
    """Its own input, and what layers before it have left for later ones."""
    shared = getattr(last, "shared_kv_states", None)
    found = {"shared_kv_states": shared, "return_shared_kv_states": True}
    text = model.model
    if not text.hidden_size_per_layer_input:
        return found
    own = text.project_per_layer_inputs(embedded, text.get_per_layer_inputs(ids))
    # The model of one layer would make it of the hidden states that it is given.
    text.project_per_layer_inputs = lambda hidden, inputs: inputs
    return {**found, "per_layer_inputs": own}


def _cut(config: Any, whole: Any, n: int | None) -> None:
    """Whether a layer keeps or reuses keys and values follows from its place in the whole model."""
    shared, config.num_kv_shared_layers = whole.num_kv_shared_layers, 0
    if n is None:
        config.hidden_size_per_layer_input = 0
    elif shared:
        kind = type(config)
        mode = "reuse" if whole.kv_sharing_modes[n] == "reuse" else "store"
        config.__class__ = type(kind.__name__, (kind,), {"kv_sharing_modes": [mode]})


def _alone(config: Any, n: int, is_moe: bool) -> None:
    """Moves the sizes of a global layer, which are kept by its number in the whole model."""
    if getattr(config, "is_heterogeneous", False):
        config.num_hidden_layers = n + 1
        layer = config.per_layer_config[n]
        config.num_hidden_layers = 1
        names = ("head_dim", "num_key_value_heads")
        config.per_layer_config = {0: {name: getattr(layer, name) for name in names}}


PROBE = Probe(
    # What is behind the feed-forward half's last norm; the router is beside that half.
    mlp=("post_feedforward_layernorm",),
    router="router.proj",
    parts={
        "model.embed_tokens_per_layer.weight": 1,
        "model.per_layer_model_projection.weight": 0,
        "model.per_layer_projection_norm.weight": None,
    },
    beside=_beside,
    cut=_cut,
    alone=_alone,
)
