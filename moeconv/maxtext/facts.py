"""What a checkpoint is, for people: who wrote it, in which tree, and what of it is converted."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moeconv.orbax.locate import Step
from moeconv.orbax.metadata import Tree
from moeconv.orbax.trees import AUX, PARAMS, UNTOLD

if TYPE_CHECKING:
    from moeconv.maxtext.checkpoint import Checkpoint

_TREES = {
    ("params", "params"): "parameters as MaxText's trainer saves them (params.params)",
    ("params",): "parameters without a collection (params)",
    ("base",): "an NNX state of RL (base)",
    ("model",): "a whole NNX train state (model)",
    (): "an NNX state of fine-tuning",
}
# What only releases from then on write (their common/checkpointing.py, common/train_state_nnx.py).
_V1 = "0.2.4"
_V1_HANDLER = "experimental.v1"  # in the name of the handler in a step's metadata


@dataclass(frozen=True)
class Facts:
    """What a checkpoint is.

    Attributes:
        releases: The MaxText releases that may have written it, and the evidence.
        item: Name of the item of its step, or that it is the step itself.
        tree: Where the model is in its tree.
        storage: How arrays are stored.
        layout: How layers are.
        beside: Parameters that are in another collection than `params`, with their number.
        fused: Settings by which parameters are in one array; they are taken apart.
        left_out: Parameters that are not converted, by their first key, with their number.
        left_alone: Top-level entries of its tree that are of the training.
        missing_chunks: Arrays of which not all chunks are stored: how many are, of how many.
    """

    releases: str
    item: str
    tree: str
    storage: str
    layout: str
    beside: dict[str, int]
    fused: list[str]
    left_out: dict[str, int]
    left_alone: list[str]
    missing_chunks: dict[str, tuple[int, int]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a screen."""
        found = [
            f"written by MaxText {self.releases}",
            f"{self.item}; {self.tree}; {self.storage}",
            f"layers: {self.layout}",
        ]
        if self.beside:
            found.append(f"parameters in other collections: {_counted(self.beside)}")
        if self.fused:
            found.append(f"fused, and taken apart: {', '.join(self.fused)}")
        if self.left_out:
            found.append(f"not converted: {_counted(self.left_out)}")
        if self.left_alone:
            found.append(f"of the training, left alone: {', '.join(self.left_alone)}")
        if self.missing_chunks:
            name, (stored, count) = next(iter(self.missing_chunks.items()))
            found.append(
                f"chunks are missing in {len(self.missing_chunks)} arrays: {name} has {stored} of "
                f"{count}"
            )
        return found


def facts_of(checkpoint: "Checkpoint") -> Facts:
    """What a checkpoint is."""
    step, tree = checkpoint.step, checkpoint.tree
    beside: dict[str, int] = {}
    for leaf in tree.model:
        if leaf.collection not in (PARAMS, UNTOLD) and leaf.name not in checkpoint.dropped:
            beside[leaf.collection] = beside.get(leaf.collection, 0) + 1
    left_out: dict[str, int] = {}
    for name in checkpoint.dropped:
        module = name.split(".")[0]
        left_out[module] = left_out.get(module, 0) + 1
    remote = step.items.local is None and not tree.use_ocdbt
    return Facts(
        releases=_releases(step, tree, checkpoint),
        item="the step's own directory" if step.items == step.folder else f"item {step.items.name}",
        tree=f"{'train state' if tree.is_train_state else 'parameters only'}, {_TREES[tree.root]}",
        storage=tree.describe(),
        layout=checkpoint.layout.describe(),
        beside=beside,
        fused=sorted(checkpoint.fused),
        left_out=left_out,
        left_alone=list(tree.others),
        missing_chunks={} if remote else dict(checkpoint.arrays.missing),
    )


def is_unmarked(step: Step) -> bool:
    """True if its metadata have nothing that only 0.2.4 and later record."""
    return step.scan_layers is None and _V1_HANDLER not in step.handler


def _releases(step: Step, tree: Tree, checkpoint: "Checkpoint") -> str:
    sidecar = checkpoint.sidecar.content if checkpoint.sidecar else None
    if sidecar is not None and sidecar.maxtext_version:
        return f"{sidecar.maxtext_version} (the run's sidecar says so)"
    signs = {
        "Orbax v1": _V1_HANDLER in step.handler,
        "scan_layers is recorded": step.scan_layers is not None,
        "nnx_aux": any(leaf[0] == AUX for leaf in tree.leaves),
        "DiLoCo's inner_state": any(leaf[0] == "inner_state" for leaf in tree.leaves),
    }
    found = [sign for sign, there in signs.items() if there]
    if found:
        return f"{_V1} or later ({', '.join(found)})"
    since = "0.2.2" if "prefuse_moe_weights" in checkpoint.fused else "0.1.0"
    if tree.root in (("base",), (), ("model",)):
        return f"{since} or later, by a fine-tuning or RL trainer"
    if step.items.name == "state":
        return f"{since} or later, by an emergency checkpoint manager"
    if not step.dated:
        return "of an unknown release (there is no step metadata), or before 0.1.0"
    return f"{since} to 0.2.3, or by hand (none of the signs of {_V1})"


def _counted(found: dict[str, int]) -> str:
    return ", ".join(f"{count} in {name}" for name, count in found.items())
