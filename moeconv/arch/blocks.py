"""What a MaxText decoder block is, for conversion: the MaxText half of a family's page."""

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from moeconv.arch.description import ModelDescription
from moeconv.arch.fields import YARN, ConfigField, Known
from moeconv.arch.parameters import EMBEDDING, FINAL_NORM, OUTPUT_HEAD, LayerKind, Parameter
from moeconv.arch.stacks import SCANNED, UNSCANNED, Stacking


@dataclass(frozen=True)
class Taps:
    """The submodules of one of MaxText's layers whose outputs verify compares, and its routing.

    Attributes:
        attention: Dotted attribute of a layer.
        mlp: The same of the feed-forward half, by its kind.
        router: The same of what gives the routing scores, below the feed-forward half. Alone or
            first of what it returns are the values by which experts are ranked: logits, or what a
            score function and a bias make of them (layers/moe.py `GateLogit`).
        router_in_layer: `router` is an attribute of the layer itself.
        further: The attribute of MaxText's decoder that makes further inputs of the layers,
            [B, T, L, p], of tokens and their embeddings; empty where they have none.
        eligible: The experts among which the `num_experts_per_tok` highest scores are taken:
            `(scores [..., E], model) -> mask [..., E]`. Without it all are, as in layers/moe.py
            `get_topk`; a model that first chooses groups of experts masks those of the others
            (`deepseek_routing`).
    """

    attention: str = "self_attention"
    mlp: Mapping[str, str] = field(default_factory=lambda: {"dense": "mlp"})
    router: str = "gate"
    router_in_layer: bool = False
    further: str = ""
    eligible: Callable[[NDArray[Any], ModelDescription], NDArray[Any]] | None = None

    def router_of(self, kind: LayerKind) -> str:
        """The dotted attribute of a layer of experts that is its router."""
        return self.router if self.router_in_layer else f"{self.mlp[kind.mlp]}.{self.router}"


@dataclass(frozen=True)
class Block:
    """A decoder block: its parameters, and what neither shapes nor config fields say of it.

    Every setting of MaxText that can change what a model computes is either a field of the model's
    description, honoured here with values that can be converted, not used by the block's code (as
    was observed, or is said here), or has to be neutral (`keys`). So a block whose settings no page
    looked through converts nothing but the plain decoder.

    Attributes:
        name: Value of MaxText's `decoder_block`.
        note: One line for `moeconv inspect` and docs/mapping.md.
        layers: The parameters of each kind of layer that it has.
        targets: Names of the targets that hold it; `auto` takes the first that holds the model.
        outer: The parameters outside the layers; the output head, the last, is absent in
            tied models.
        stackings: The ways in which MaxText keeps its layers.
        query_scale_in_kernel: True when 1/sqrt(head_dim) is folded into the query kernel, so that
            the exported projection must be multiplied by sqrt(head_dim). False when the block
            passes `query_pre_attn_scalar` and scales the query explicitly
            (layers/attentions.py `init_query_w`).
        expert_width: Config key that sets the experts' width.
        ropes: Kinds of RoPE that its targets know.
        settings: What the config must give for this block alone; the description holds it.
        layer_types: The attention of a layer, by its position in the repeated block (in the model
            where none is) and the settings, in transformers' words; for a block whose layers
            differ in it though their parameters do not show that. The description's `settings`
            has them as `layer_types`.
        demands: Settings that must have one of these values, of which none need be neutral.
        honours: Settings that may have other values than neutral ones, and these values.
        shown: Settings that are true where the layers have this kind of attention, and false
            elsewhere: their parameters show them.
        shapes: Settings that the shapes decide, from the description's fields. The config must
            agree, and the reference is built with them.
        idle: Settings that the block's code reads, and that have no effect in it.
        idle_values: The same for some values of a setting only.
        warns: Settings whose other values are converted with a warning, and what it says.
        refuses: Settings whose other values no target can hold, and why, for people.
        since: The first release of MaxText that has the block with these parameters; of an older
            one nothing is converted. None where the page does not know it.
        config: MaxText settings that follow from the model and the number of layers in a repeated
            block, for building it.
        taps: For verify.
        norm: What its norms are called.
    """

    name: str
    note: str
    layers: Mapping[LayerKind, tuple[Parameter, ...]]
    targets: tuple[str, ...]
    outer: tuple[Parameter, ...] = (EMBEDDING, FINAL_NORM, OUTPUT_HEAD)
    stackings: tuple[Stacking, ...] = (UNSCANNED, SCANNED)
    query_scale_in_kernel: bool = True
    expert_width: str = "moe_mlp_dim"
    ropes: Collection[str] = ("default", "llama3.1")
    settings: tuple[ConfigField, ...] = ()
    layer_types: Callable[[int, Mapping[str, Any]], str] | None = None
    demands: Mapping[str, Collection[Any]] = field(default_factory=dict)
    honours: Mapping[str, Collection[Any]] = field(default_factory=dict)
    shown: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, Callable[[Known], Any]] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    # layers/attention_op.py `_resolve_attention_type`: only `block_diffusion` reaches the layers.
    idle_values: Mapping[str, Collection[Any]] = field(
        default_factory=lambda: {
            "attention_type": ("local_sliding", "chunk", "full", "compressed"),
        }
    )
    warns: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    since: str | None = None
    config: Callable[[ModelDescription, int], dict[str, Any]] = lambda model, cycle: {}
    taps: Taps = Taps()
    norm: str = "RMSNorm"

    def parameters(self) -> dict[str, Parameter]:
        """Every parameter by its name."""
        return {p.name: p for group in (self.outer, *self.layers.values()) for p in group}

    def kinds_of(self, name: str) -> tuple[LayerKind, ...]:
        """The kinds of layer that have a parameter; none for one outside the layers."""
        return tuple(kind for kind, group in self.layers.items() if name in {p.name for p in group})


@dataclass(frozen=True)
class Refused:
    """A decoder block of MaxText that no target holds.

    Attributes:
        name: Value of MaxText's `decoder_block`.
        reason: Why, a sentence without its full stop.
        since: The first release of MaxText that has it.
    """

    name: str
    reason: str
    since: str


def release(version: str) -> tuple[int, ...]:
    """The numbers of a release, for comparing: (0, 2, 5) of "0.2.5" and of "0.2.5.dev1"."""
    numbers = itertools.takewhile(str.isdecimal, version.split("."))
    return tuple(int(number) for number in numbers)


def settings_of(block: Block | None, known: Known) -> list[ConfigField]:
    """The settings that a description has: YaRN's, and those of its block.

    Args:
        block: None where the config does not name one.
        known: The description's fields.
    """
    specs = (*YARN, *(block.settings if block else ()))
    return [spec for spec in specs if spec.needed(known)]
