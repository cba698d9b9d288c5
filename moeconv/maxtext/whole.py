"""What is no model, or not all of one, is refused for what it is."""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from moeconv.arch.blocks import Block, release
from moeconv.arch.detection import may_hold
from moeconv.arch.yaml_file import short
from moeconv.errors import NotACheckpointError, TensorError, UnsupportedError
from moeconv.families import blocks
from moeconv.orbax.arrays import Arrays
from moeconv.orbax.database import gaps
from moeconv.orbax.locate import Step
from moeconv.orbax.metadata import Tree, outside
from moeconv.orbax.store import Folder
from moeconv.orbax.trees import PARAMS, UNTOLD, is_adapter

# What of a checkpoint is meant.
Part = Literal["model", "model alone", "adapter"]


def demand_whole(step: Step, arrays: Arrays) -> list[str]:
    """Of a save that is not known to have finished, demands every chunk of the model.

    Returns:
        A warning that names the evidence, if it was such a one.

    Raises:
        TensorError: Chunks are missing; names the first array.
        NotACheckpointError: It cannot be found out whether some are.
    """
    why = [step.uncommitted] if step.uncommitted else []
    if arrays.unmerged:
        count = len(arrays.unmerged)
        many = "1 process" if count == 1 else f"{count} processes"
        why.append(f"Orbax never merged what {many} wrote, or the index of that is lost")
        if missing := gaps(arrays.unmerged):
            why.append(missing)
    if not why:
        return []
    if arrays.missing and not arrays.may_lack:
        name, (stored, count) = next(iter(arrays.missing.items()))
        more = f", and of {len(arrays.missing) - 1} others" if len(arrays.missing) > 1 else ""
        unsure = (
            ""
            if arrays.tree.zeros_stored
            else "; its Orbax left out chunks of nothing but zeros, and a lost one looks the same: "
            "pass --allow-missing-chunks to read them as zeros"
        )
        raise TensorError(
            f"{step.items} is no whole save: {' and '.join(why)}, and of {name} {stored} of "
            f"{count} chunks are there{more}; copy what is missing (each process of a run may have "
            f"written to a disk of its own), or use another step{unsure}"
        )
    return [
        f"{' and '.join(why)}, but every array of the model is whole, as in a copy of a finished "
        "save; it is taken as such"
    ]


def part_of(step: Step, tree: Tree, part: Part) -> Tree:
    """A tree with the arrays of the model alone, or of the LoRA adapter alone.

    Raises:
        UnsupportedError: The model is asked for, and there is an adapter beside it, or only that;
            says which, and what to do.
        NotACheckpointError: The adapter is asked for, and there is none.
    """
    adapters, model = tree.adapters, tuple(m for m in tree.model if not is_adapter(m.path))
    if part == "adapter":
        if not adapters:
            raise NotACheckpointError(
                f"{step.items} holds no LoRA adapter (no …lora_a and …lora_b); give the checkpoint "
                "that its training saved"
            )
        return replace(tree, model=adapters, superseded=())
    if not adapters or (part == "model alone" and model):
        return replace(tree, model=model)
    facts = [f"{key.removeprefix('lora_')} {step.lora[key]}"
            for key in ("lora_rank", "lora_alpha") if key in step.lora]  # fmt: skip
    what = f"a LoRA adapter ({', '.join([*facts, f'{len(adapters)} matrices'])})"
    first = adapters[0].stored_name
    if not model:
        raise UnsupportedError(
            f"{step.items} holds {what} and no model, as MaxText saves a LoRA training: {first}, "
            "…; for PEFT, give the checkpoint that it was trained on with --base; for the merged "
            "model, convert that one with --merge-lora and this"
        )
    raise UnsupportedError(
        f"{step.items} holds a model and {what}: {first}, …; give this checkpoint with "
        "--merge-lora for the merged model, or with --base for the adapter alone, for PEFT"
    )


def refuse_unclaimed(items: Folder, tree: Tree, *, unused: Collection[str]) -> None:
    """Refuses arrays beside the parameters that no decoder block has there.

    Args:
        items: The item.
        tree: What it holds.
        unused: First keys of what is left out on purpose.

    Raises:
        TensorError: There are some; names them.
        UnsupportedError: Among them are biases of a router; or layers are stages of a pipeline.
    """
    # layers/nnx_decoders.py `NNXDecoder.__init__`; stages are axes of their own, or repeated.
    if any("pipeline_module" in leaf.path for leaf in tree.model):
        raise UnsupportedError(
            f"{items} keeps its layers as stages of pipeline parallelism "
            "(decoder.pipeline_module), which are not converted: restore it with the run's own "
            "settings, and save its parameters as decoder.layers"
        )
    names = [
        leaf.stored_name
        for leaf in tree.model
        if leaf.collection not in (PARAMS, UNTOLD)
        and leaf.path[0] not in unused
        and not any(may_hold(block, leaf.path, leaf.collection) for block in blocks().values())
    ]
    # `MoEBiasVar` (MaxText layers/moe.py): in `params` of MaxText's converter, in `nnx_aux` of a
    # train state (common/train_state_nnx.py `split_for_checkpoint`).
    if any("MoEBiasVar" in name or name.endswith("gate.bias") for name in names):
        listed = "".join(f"\n  {name}" for name in names[:20])
        raise UnsupportedError(
            f"{items} keeps biases of a router outside of params.params, which no supported target "
            f"has:{listed}"
        )
    if names:
        raise outside(items, tree.root, names)


def refuse_older(where: str, version: str | None, block: Block) -> None:
    """Refuses a run of a release that had no such block, or kept it otherwise.

    Only the run's sidecar names its release. What `facts.py` finds by the absence of signs is no
    ground to refuse: a checkpoint that a converter wrote has none of them either.

    Args:
        where: The sidecar.
        version: The release that it names, if any.
        block: The checkpoint's.

    Raises:
        UnsupportedError: The release is older than the block's.
    """
    if version and block.since and () < release(version) < release(block.since):
        raise UnsupportedError(
            f"{where}: maxtext_version={short(version)}, but decoder_block={block.name} is "
            f"converted since MaxText {block.since}, the first release that has it; put the "
            "record of the run that trained this checkpoint there"
        )
