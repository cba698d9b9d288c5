"""The Hugging Face half of a family's page: rules, config table, probes.

Everything else is derived from them: the plan, the conversion, the way back, the structure check,
the per-layer comparison and docs/mapping.md.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import Layers
from moeconv.mapping.reading import Reading

Rotary = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Options:
    """Choices of the user that change which tensors a target has.

    Attributes:
        untie: Write an explicit output head although the model ties it to the embedding.
    """

    untie: bool = False


@dataclass(frozen=True)
class Factor:
    """A named constant by which a rule multiplies, and another that it then adds.

    Attributes:
        text: How plans and docs print it, e.g. `sqrt(head_dim)`; with an offset the whole
            expression, e.g. `x - 1`.
        reason: Why it is there, for docs and the manifest.
        value: The number for one model; None where the model needs neither factor nor offset.
        offset: What is added to the product, before it is rounded; where it follows from the
            model, a function of it.
    """

    text: str
    reason: str
    value: Callable[[ModelDescription], float | None]
    offset: float | Callable[[ModelDescription], float] = 0.0

    @property
    def words(self) -> str:
        """The operation, for docs."""
        return self.text if self.offset else f"× {self.text}"


@dataclass(frozen=True)
class When:
    """A condition on the model and the user's options under which a rule applies."""

    text: str
    holds: Callable[[ModelDescription, Options], bool]


ALWAYS = When("always", lambda m, o: True)
TIED_BUT_UNTIE = When("tied, and --untie given", lambda m, o: m.tie_word_embeddings and o.untie)
UNTIED = When("untied", lambda m, o: not m.tie_word_embeddings)


@dataclass(frozen=True)
class Rule:
    """Ties one source parameter to one target tensor pattern.

    Attributes:
        source: Logical MaxText name (of a `Parameter` of the block), or several that one tensor
            joins; None for a tensor that MaxText has no parameter for, which is then filled
            with `fill`.
        target: Hugging Face name; `{L}` is the layer, `{E}` the expert. An `{E}` that the source's
            axes lack replicates the tensor to every expert.
        place: The rearrangement of one slice, e.g. `D H h -> (H h) D`. Several sources are joined
            along the axis `g` of the right side (`D F -> D (F g)`, gate and up in turn), or else
            one behind the other along the outermost axis, each by its own place if they differ.
        scale: Factor and offset, if the values must change.
        scales: Where the sources are quantised, the logical name of each one's scales, whose axes
            are the source's or blocks of them (`D/128`; `tensor.companion`). They are consumed
            with it.
        rotary: True where `h` is rotated by RoPE, so that the order of its entries follows the
            rotary layouts of source and target.
        layers: Kinds of target layer the rule writes; None for a tensor the model has once.
        when: Further condition.
        shared: The parameter is read by another rule too, on purpose.
        fill: Value of a tensor without a source.
    """

    source: str | tuple[str, ...] | None
    target: str
    place: str | tuple[str, ...]
    scale: Factor | None = None
    scales: tuple[str, ...] = ()
    rotary: bool = False
    layers: Layers | None = None
    when: When = ALWAYS
    shared: bool = False
    fill: float = 0.0

    def __post_init__(self) -> None:
        if self.scales and len(self.scales) != len(self.sources):
            raise ValueError(f"the rule for {self.target} has scales of some of its sources only")

    @property
    def sources(self) -> tuple[str, ...]:
        """The parameters that the tensor is made of."""
        if self.source is None:
            return ()
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def pattern(self) -> re.Pattern[str]:
        """What the names of its tensors match."""
        text = re.escape(self.target)
        for letter in ("L", "E"):
            text = text.replace(re.escape(f"{{{letter}}}"), r"\d+")
        return re.compile(text)

    @property
    def places(self) -> tuple[str, ...]:
        """The rearrangement of each source."""
        if isinstance(self.place, str):
            return (self.place,) * max(1, len(self.sources))
        return self.place


# The axis along which a tensor has the sources of its rule.
JOINED = "g"

EVERY_LAYER = Layers()
DENSE_LAYERS = Layers(mlp="dense")
MOE_LAYERS = Layers(mlp="moe")


@dataclass(frozen=True)
class ConfigKey:
    """One key of `config.json`.

    Attributes:
        key: Its name.
        value: Its value for a model.
        text: Where the value comes from, for docs/mapping.md.
        when: The key is left out where this does not hold.
        field: Field of the description that it is a copy of, for reading a config.json.
        setting: The same of its settings.
    """

    key: str
    value: Callable[[ModelDescription, Options], Any]
    text: str
    when: When = ALWAYS
    field: str | None = None
    setting: str | None = None


def from_field(key: str, name: str | None = None, when: When = ALWAYS) -> ConfigKey:
    """A key that copies a field of the model's description."""
    source = name or key
    return ConfigKey(key, lambda m, o: getattr(m, source), f"`{source}`", when, field=source)


def constant(key: str, value: Any, text: str | None = None) -> ConfigKey:
    """A key whose value never changes."""
    return ConfigKey(key, lambda m, o: value, text or f"always `{value!r}`")


@dataclass(frozen=True)
class Probe:
    """How verify finds the parts of transformers' model, and runs one layer of it alone.

    Every name is a dotted attribute, and that of a parameter is the same with `.weight`.

    Attributes:
        layers: The decoder layers, below the model.
        embedding: The token embedding, below the model.
        positions: The table of learned positions, below the model, that is added to what is given
            for the embedding; empty where there is none.
        norm: The final norm, below the model.
        head: The output head, below the model.
        attention: Names below a layer of which the first that it has is its attention.
        mlp: The same of its feed-forward half.
        router: The router, below a feed-forward half with experts or beside it in the layer.
        scores: The values by which the experts are ranked, [..., E], in the form in which
            MaxText's router gives them (`Taps.router`): `(feed-forward half, what its router
            returned)`. By default what it returned first or alone.
        parts: Tensors outside the layers that make further inputs of the layers, and the axis of
            each that has the parts of the layers one behind the other; None where all layers have
            all of it.
        beside: The arguments of the model of one layer, beside its hidden states: `(model, ids,
            embedded, what the run of the layer before returned)`. It may change the model, which
            is used once.
        cut: Changes a config that was cut to layer `n`, or to no layer, `None`, where that takes
            more than their number and `layer_types`: `(config, the whole one, n)`.
        alone: Changes a config of one layer so that this layer is of the kind that layer `n` of
            the whole model is: `(config, n, is_moe)`. `layer_types` is cut already.
    """

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    positions: str = ""
    norm: str = "model.norm"
    head: str = "lm_head"
    attention: tuple[str, ...] = ("self_attn",)
    mlp: tuple[str, ...] = ("mlp",)
    router: str = "gate"
    scores: Callable[[Any, Any], Any] = lambda mlp, output: (
        output[0] if isinstance(output, tuple) else output
    )
    parts: Mapping[str, int | None] = field(default_factory=dict)
    beside: Callable[[Any, Any, Any, Any], dict[str, Any]] = lambda model, ids, embedded, last: {}
    cut: Callable[[Any, Any, int | None], None] = lambda config, whole, n: None
    alone: Callable[[Any, int, bool], None] = lambda config, n, is_moe: None


@dataclass(frozen=True)
class Target:
    """An architecture of transformers.

    Attributes:
        name: Value of `--target`.
        architecture: Class in transformers.
        summary: What it is for, one sentence.
        rotary: Order in which its checkpoints store the rotated halves of a head.
        kinds: Kinds of layer it can hold.
        requires: The reason why it cannot hold this model, None if it can.
        rules: The rule table.
        config: The config table.
        since: The oldest transformers that loads what is written; of those that do not have the
            architecture none is named.
        reading: How a config.json of it is read, for the way from Hugging Face to MaxText; None
            where that way is not built.
        spelled: Rules for tensors of other names or orders that a model to be read may have
            instead of those of `rules`, for the same parameters.
        pads_width: Dense and expert MLPs share one width, the narrower is padded with zeros.
        caveats: Sentences for people about this model on this target.
        card: More sentences for the model card.
        probe: For verify.
    """

    name: str
    architecture: str
    summary: str
    kinds: Layers
    rules: tuple[Rule, ...]
    config: tuple[ConfigKey, ...]
    rotary: Rotary = "half"
    requires: Callable[[ModelDescription], str | None] = lambda m: None
    since: str = "4.46.0"
    reading: Reading | None = None
    spelled: tuple[Rule, ...] = ()
    pads_width: bool = False
    caveats: Callable[[ModelDescription, Options], list[str]] = lambda m, o: []
    card: Callable[[ModelDescription], list[str]] = lambda m: []
    probe: Probe = field(default_factory=Probe)

    def spelled_as(self, names: Collection[str]) -> "Target":
        """The page with the rules of `spelled` that a model's tensors match."""
        found = [rule for rule in self.spelled if any(map(rule.pattern.fullmatch, names))]
        if not found:
            return self
        instead = {source for rule in found for source in rule.sources}
        kept = [rule for rule in self.rules if instead.isdisjoint(rule.sources)]
        return replace(self, rules=(*kept, *found))
