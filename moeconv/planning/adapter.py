"""A LoRA adapter in a plan: how strong it is, the model that it changes, and what is made of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeconv.arch.description import ModelDescription
from moeconv.arch.layout import Layout
from moeconv.hf.safetensors import TensorSpec, lay_out
from moeconv.mapping.edges import Edge, expand
from moeconv.mapping.lora import LowRank, low_ranks, peft_edges, targeted
from moeconv.mapping.rules import Target
from moeconv.maxtext.lora import Strength, factors_of
from moeconv.planning.output import Place, PlannedFile, SafetensorsOutput
from moeconv.tensor.stored import ArrayInfo

if TYPE_CHECKING:
    from moeconv.planning.plan import PlannedSource

# What PEFT reads (peft `utils/constants.py`, `SAFETENSORS_WEIGHTS_NAME`, `CONFIG_NAME`).
WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class PlannedAdapter:
    """The adapter that is converted.

    Attributes:
        strength: Its rank and alpha.
        base_model: How PEFT finds the converted base: an id on the Hub, or a folder.
        modules: The modules of the converted base that it changes, as PEFT names them.
        base: The checkpoint that it was trained on.
    """

    strength: Strength
    base_model: str | None
    modules: tuple[str, ...]
    base: "PlannedSource"


@dataclass(frozen=True)
class Mapped:
    """What becomes of an adapter.

    Attributes:
        edges: The tensors of PEFT.
        modules: `target_modules`.
        changes: What is changed, by the names of the base's arrays.
    """

    edges: tuple[Edge, ...]
    modules: tuple[str, ...]
    changes: Mapping[str, LowRank]


def map_adapter(
    page: Target,
    model: ModelDescription,
    layout: Layout,
    base: Mapping[str, ArrayInfo],
    factors: Mapping[str, ArrayInfo],
    dtype: str | None,
) -> Mapped:
    """Maps an adapter by the rules of the model that it changes.

    Args:
        page: What the model becomes.
        model: What it is.
        layout: Where its checkpoint keeps its parameters.
        base: The arrays of that checkpoint.
        factors: The arrays of the adapter.
        dtype: Of the output; None keeps each array's own.

    Raises:
        UnsupportedError: The page cannot hold the model, or PEFT not the adapter.
        TensorError: The adapter is of another model, or a part of one.
    """
    edges = expand(page, model, layout, {name: info.dtype for name, info in base.items()})
    changes = low_ranks(layout, factors_of(factors))
    adapted = peft_edges(edges, page, changes, dtype=dtype)
    return Mapped(adapted, tuple(targeted(edges, adapted)), changes)


def peft_output(edges: Mapping[str, Edge], made: object, max_shard_bytes: int) -> SafetensorsOutput:
    """One file, whatever its size: PEFT reads no other."""
    layout = lay_out([TensorSpec(e.target, e.dtype, e.shape) for e in edges.values()])
    tensors = tuple(sorted(edges, key=layout.offsets.__getitem__))
    places = {name: Place(0, offset) for name, offset in layout.offsets.items()}
    return SafetensorsOutput((PlannedFile(WEIGHTS_NAME, tensors, layout),), places, kind="peft")
