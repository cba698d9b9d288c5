"""How a page reads a config.json, for the way from Hugging Face to MaxText."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moeconv.errors import UnsupportedError

# The content of a config.json, with transformers' defaults for what it leaves out.
Config = Mapping[str, Any]


class Peek(Protocol):
    """What looks at the values of a model's tensors."""

    def is_zero(self, name: str) -> bool:
        """True if a tensor is all zeros."""

    def are_equal(self, names: Sequence[str]) -> bool:
        """True if all these tensors have the same bits."""


@dataclass(frozen=True)
class Multimodal:
    """A class of transformers that holds an architecture's model beside others.

    Its config has the model's as `text_config`; its tensors, the model's below `language_model`.

    Attributes:
        architecture: The class.
        left_out: What else it has, by the expression that the beginning of its tensors' names
            matches.
        unread: Keys of the text model's config, with the value that is about what is left out.
    """

    architecture: str
    left_out: Mapping[str, str]
    unread: Config = field(default_factory=dict)


def multimodal(
    architecture: str, *others: tuple[str, str], unread: Config | None = None
) -> Multimodal:
    """A multimodal class.

    Args:
        architecture: The class.
        others: Of each part beside the text model: its name in the class, and in words.
        unread: See `Multimodal`.
    """
    why = "only the text model of a multimodal one is converted, without its {}"
    left_out = {rf"(model\.)?{name}\.": why.format(words) for name, words in others}
    return Multimodal(architecture, left_out, unread or {})


# Beginnings of the model's tensors in a multimodal one, and what they are in its own: before
# transformers 4.52 and after.
MULTIMODAL = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
# Keys that the whole has, and that are the model's.
_SHARED_KEYS = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")


def text_config(config: Config, whole: Multimodal, architecture: str) -> dict[str, Any]:
    """The config of the text model in a multimodal one, as if it were alone.

    Args:
        config: Of the multimodal one, with a `text_config`.
        whole: Its class.
        architecture: The text model's.
    """
    shared = {key: config[key] for key in _SHARED_KEYS if config.get(key) is not None}
    given: Config = config["text_config"]
    own = {
        key: value
        for key, value in given.items()
        if key not in whole.unread or value != whole.unread[key]
    }
    return {**own, **shared, "architectures": [architecture]}


@dataclass(frozen=True)
class Reading:
    """How a config.json of an architecture becomes a model's description.

    Keys that the page's table copies from fields and settings are copied back. All that is found is
    then written again by the table, and must be what was read: a config that says anything else
    than the page would write is refused, and so is a key that the page does not write, unless it
    has the architecture's default.

    Attributes:
        derived: What transformers makes of keys that are null or absent, in this order.
        fields: Fields of the description that the table does not copy, such as `layer_kinds`.
        settings: The same of its settings.
        ropes: Of a config what its RoPE is, alike for all spellings of transformers 4 and 5.
        ignored: Keys that no code of transformers reads, whatever they say, beside those that no
            architecture's does.
        left_out: Why tensors whose names match are left out, by the expression that the beginning
            of the name matches.
        multimodal: Classes that hold this model and others, of which it alone is read.
        kinds: The kinds of layers that tensors show, where a config does not: of the config and of
            what looks at tensors. A decoder block that does not have them all gets those of
            `fields`.
        unmade: Decoder blocks that have the architecture as a target and are not made of it.
    """

    derived: Mapping[str, Callable[[Config], Any]] = field(default_factory=dict)
    fields: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    settings: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    ropes: Callable[[Config], Any] = lambda config: rope_of(config)
    ignored: frozenset[str] = frozenset()
    left_out: Mapping[str, str] = field(default_factory=dict)
    multimodal: tuple[Multimodal, ...] = ()
    kinds: Callable[[Config, Peek], Sequence[str]] | None = None
    unmade: frozenset[str] = frozenset()


# Keys of all spellings of RoPE, which `Reading.ropes` makes one of.
ROPE_KEYS = frozenset(
    {
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rope_local_base_freq",
        "partial_rotary_factor",
    }
)
# transformers modeling_rope_utils.py `_compute_yarn_parameters`, for what a config leaves out.
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
# What MaxText has as constants (layers/embeddings.py `LLaMARotaryEmbedding`).
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_of(config: Config, kind: str | None = None) -> dict[str, Any]:
    """The one RoPE of a config: its type and numbers, theta among them.

    transformers 5 has `rope_parameters`; before it `rope_theta` and `rope_scaling` were apart, and
    before 4.43 `rope_type` was called `type` (modeling_rope_utils.py
    `standardize_rope_params`).

    Args:
        config: The config.
        kind: Of which kind of layer, in a config that has one for each.

    Raises:
        UnsupportedError: It has one for each kind of layer, and none is asked for.
    """
    given = config.get("rope_parameters")
    nested = isinstance(given, Mapping) and any(isinstance(v, Mapping) for v in given.values())
    if nested and kind is None:
        raise UnsupportedError("rope_parameters has more than one RoPE, and this architecture one")
    own = given[kind] if isinstance(given, Mapping) and nested else given
    found = dict(own or config.get("rope_scaling") or {})
    old = found.pop("type", None)
    found.setdefault("rope_type", old or "default")
    found.setdefault("rope_theta", config.get("rope_theta"))
    found.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    if found["rope_type"] == "yarn":
        found = {**_YARN, **found}
        found.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return {key: value for key, value in found.items() if value is not None}


def ropes_of(config: Config, full: str, sliding: str) -> dict[str, dict[str, Any]]:
    """The RoPE of each of two kinds of layer.

    Before transformers 5 a scaling was that of the first kind alone, as 5 reads it still
    (configuration_gemma3.py, configuration_olmo3.py `convert_rope_params_to_dict`).

    Args:
        config: The config; where it has no theta for layers with a window, `rope_local_base_freq`
            has it, or `rope_theta`.
        full: The kind of layers that see everything.
        sliding: The kind of layers with a window.
    """
    given = config.get("rope_parameters") or {}
    local = config.get("rope_local_base_freq") or config.get("rope_theta")
    plain = {"rope_parameters": {**given.get(sliding, {"rope_theta": local})}}
    plain["rope_parameters"].setdefault("rope_theta", local)
    if full in given:
        own: Config = {**config, "rope_parameters": given[full]}
    else:
        own = {**config, "rope_parameters": None} if not given else config
    return {
        full: rope_of(own),
        sliding: rope_of({**plain, "max_position_embeddings": config["max_position_embeddings"]}),
    }


def typed(cycle: int, first: str, last: str) -> Callable[[Config], list[str]]:
    """What transformers takes for `layer_types`: the last of each block of layers is another."""
    return lambda config: [
        last if (n + 1) % cycle == 0 else first for n in range(config["num_hidden_layers"])
    ]


def rope_fields(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a description that hold a RoPE.

    Raises:
        UnsupportedError: MaxText has none like it.
    """
    kind, theta = rope["rope_type"], rope["rope_theta"]
    if kind == "llama3":
        wrong = [f"{k}={rope.get(k)}, not {v:g}" for k, v in _LLAMA3.items() if rope.get(k) != v]
        if wrong:
            raise UnsupportedError(
                "its RoPE is scaled as in Llama 3.1 with other numbers than MaxText has as "
                f"constants: {'; '.join(wrong)}"
            )
        return {"rope_type": "llama3.1", "rope_theta": theta, "rope_use_scale": True}
    if kind not in ("default", "yarn"):
        raise UnsupportedError(f"its RoPE is of type {kind}, which MaxText does not have")
    return {"rope_type": kind, "rope_theta": theta, "rope_use_scale": False}


def yarn_settings(rope: Mapping[str, Any], config: Config, *, interleave: bool) -> dict[str, Any]:
    """The settings of a description that hold YaRN; none of another RoPE.

    Args:
        rope: Of `rope_of`.
        config: The config.
        interleave: The architecture rotates neighbours.

    Raises:
        UnsupportedError: What is rotated is scaled in a way that MaxText does not have.
    """
    if rope["rope_type"] != "yarn":
        return {}
    if (factor := rope.get("attention_factor")) not in (None, 1.0):
        raise UnsupportedError(
            f"attention_factor={factor} of its YaRN; MaxText scales what it rotates by "
            "0.1·ln(factor) + 1 or not at all"
        )
    return {
        "rope_factor": float(rope["factor"]),
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "rope_positions": config["max_position_embeddings"],
        "beta_fast": float(rope["beta_fast"]),
        "beta_slow": float(rope["beta_slow"]),
        "rope_truncate": rope["truncate"],
        "rope_interleave": interleave,
        "rope_attention_scaling": factor is None,
    }
