"""A LoRA adapter in a plan: how strong it is, the model that it changes, and what is made of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeconv.arch.layout import Layout
from moeconv.hf.safetensors import TensorSpec, lay_out
from moeconv.mapping.edges import Edge
from moeconv.mapping.lora import LowRank, Targeted, low_ranks
from moeconv.maxtext.lora import Strength, factors_of
from moeconv.planning.output import Place, PlannedFile, SafetensorsOutput
from moeconv.tensor.stored import ArrayInfo

if TYPE_CHECKING:
    from moeconv.planning.plan import PlannedSource

# What PEFT reads (peft `utils/constants.py`, `SAFETENSORS_WEIGHTS_NAME`, `CONFIG_NAME`).
WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class PlannedAdapter:
    """The LoRA adapter of a plan: converted for PEFT, or merged into its base.

    Attributes:
        strength: Its rank and alpha.
        base_model: How PEFT finds the converted base: an id on the Hub, or a folder.
        targeted: What of the converted base it changes, as PEFT names it; None where it is merged.
        other: The checkpoint that is read beside the plan's source: of an adapter its base, of a
            base that is merged the adapter.
    """

    strength: Strength
    base_model: str | None
    targeted: Targeted | None
    other: "PlannedSource"

    @property
    def merged(self) -> bool:
        """True if the plan makes the merged model."""
        return self.targeted is None


def changes_of(layout: Layout, factors: Mapping[str, ArrayInfo]) -> dict[str, LowRank]:
    """What an adapter changes, by the names of the base's arrays.

    Raises:
        TensorError: The adapter is of another model, or a part of one.
    """
    return low_ranks(layout, factors_of(factors))


def peft_output(edges: Mapping[str, Edge], made: object, max_shard_bytes: int) -> SafetensorsOutput:
    """One file, whatever its size: PEFT reads no other."""
    layout = lay_out([TensorSpec(e.target, e.dtype, e.shape) for e in edges.values()])
    tensors = tuple(sorted(edges, key=layout.offsets.__getitem__))
    places = {name: Place(0, offset) for name, offset in layout.offsets.items()}
    return SafetensorsOutput((PlannedFile(WEIGHTS_NAME, tensors, layout),), places, kind="peft")
