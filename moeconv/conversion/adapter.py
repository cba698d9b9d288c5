"""The first step of converting a LoRA adapter to PEFT: a plan, by the rules of its base model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moeconv.conversion.contents import demand_json
from moeconv.conversion.options import ConvertOptions, Prepared, planned_source
from moeconv.errors import UsageError
from moeconv.families import target_for
from moeconv.mapping.edges import Edge, expand
from moeconv.mapping.lora import LowRank, merged_edges, peft_edges, targeted
from moeconv.mapping.rules import Options
from moeconv.maxtext.adapter import Adapter, open_adapter
from moeconv.maxtext.checkpoint import Checkpoint, StoredCheckpoint, open_checkpoint
from moeconv.maxtext.lora import Strength, strength_of
from moeconv.planning.adapter import PlannedAdapter, changes_of, peft_output
from moeconv.planning.plan import build_plan

_NO_BASE = (
    "adapter_config.json names no base model, so PEFT must be given one; name it with "
    "--base-model, a Hub id or a folder"
)


def plan_adapter(ckpt: str, base_ckpt: str, options: ConvertOptions) -> Prepared:
    """Reads the metadata of an adapter and of its base, and makes the plan; writes nothing.

    Args:
        ckpt: The checkpoint with the adapter.
        base_ckpt: The one that it was trained on; both may be one.
        options: Those of any conversion. The config is of the run that trained the adapter, which
            also describes the base.

    Raises:
        MoeconvError: Any of its subclasses; see `moeconv.errors`.
    """
    for name, value in {"--untie": options.untie, "--tokenizer": options.tokenizer}.items():
        if value:
            raise UsageError(f"{name} says nothing of an adapter: it is of the base's conversion")
    adapter = _open(ckpt, options)
    base = open_checkpoint(
        base_ckpt,
        config=options.config,
        sets=options.sets,
        accept=options.accept,
        beside_adapter=True,
    )
    model = base.resolution.model()
    page = target_for(model, options.target)
    dtype = None if options.dtype == "keep" else options.dtype
    changes = changes_of(base.layout, adapter.stored.arrays.info)
    dtypes = {name: info.dtype for name, info in base.arrays.info.items()}
    edges = expand(page, model, base.layout, dtypes)
    adapted = peft_edges(edges, page, changes, dtype=dtype)
    strength = _strength(adapter, changes)
    plan = build_plan(
        model=model,
        target=page.name,
        options=Options(),
        dtype=dtype,
        edges=adapted,
        source=planned_source(adapter.stored, base.layout),
        lay_out=peft_output,
        max_shard_bytes=options.max_shard_bytes,
        warnings=(
            *base.resolution.warnings,
            *_warnings(adapter, strength),
            *([] if options.base_model else [_NO_BASE]),
        ),
        adapter=PlannedAdapter(
            strength,
            options.base_model,
            targeted(edges, adapted, page),
            planned_source(base, base.layout),
        ),
        accepted_keys=tuple(base.resolved.accepted),
        jobs=options.jobs,
        max_memory=options.max_memory,
    )
    _ = plan.memory_budget  # or it raises: the limit is too low
    demand_json(plan)
    base.unchanged.check()
    return Prepared(plan, adapter.stored, None, options)


@dataclass(frozen=True)
class Merging:
    """An adapter on its way into its base.

    Attributes:
        adapter: Its checkpoint.
        edges: The tensors of the merged model.
        planned: For the plan.
        warnings: Things to know, a sentence each.
    """

    adapter: StoredCheckpoint
    edges: tuple[Edge, ...]
    planned: PlannedAdapter
    warnings: tuple[str, ...]


def merge(ckpt: str, base: Checkpoint, edges: Sequence[Edge], options: ConvertOptions) -> Merging:
    """Merges an adapter into a model.

    Args:
        ckpt: The checkpoint with the adapter, which may be the base's.
        base: The model.
        edges: Its tensors.
        options: Those of the conversion.

    Raises:
        MoeconvError: There is no adapter, or it is of another model.
    """
    adapter = _open(ckpt, options)
    changes = changes_of(base.layout, adapter.stored.arrays.info)
    strength = _strength(adapter, changes)
    merged = merged_edges(edges, changes, strength.scale)
    planned = PlannedAdapter(strength, None, None, planned_source(adapter.stored, base.layout))
    said = (
        f"{len(changes)} parameters have alpha / rank = {strength.alpha:g} / {strength.rank} times "
        f"the product of the adapter's factors added ({strength.source}), rounded once"
    )
    return Merging(adapter.stored, merged, planned, (said, *_warnings(adapter, strength)))


def _open(ckpt: str, options: ConvertOptions) -> Adapter:
    return open_adapter(
        ckpt,
        config=options.config,
        sets=options.sets,
        accept=options.accept,
        allow_missing_chunks=options.allow_missing_chunks,
    )


def _strength(adapter: Adapter, changes: Mapping[str, LowRank]) -> Strength:
    ranks = {name: change.rank for name, change in changes.items()}
    return strength_of(adapter.stored.step, adapter.resolved, ranks)


def _warnings(adapter: Adapter, strength: Strength) -> Iterator[str]:
    """Things to know of an adapter, a sentence each."""
    yield from adapter.notes
    if skipped := adapter.stored.step.skipped:
        yield f"newer steps were passed over: {'; '.join(skipped)}"
    if strength.quantised:
        yield (
            f"the adapter was trained on a base quantised to {strength.quantised} "
            f"({strength.source}); on one that is not, the logits are others"
        )
