"""What is written next to the tensors: config.json, the index, the tokenizer, and the manifest."""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from moeconv import __version__
from moeconv.artifact.manifest import (
    AdapterRecord,
    FieldRecord,
    FileRecord,
    FoldRecord,
    Manifest,
    SourceRecord,
)
from moeconv.conversion.adapter_files import adapter_files
from moeconv.conversion.run_files import run_files
from moeconv.errors import ConfigError
from moeconv.execution.engine import Result
from moeconv.hf.config import generation_config, model_config, to_json
from moeconv.hf.tokenizer import TokenizerFiles
from moeconv.mapping.edges import Edge
from moeconv.planning.adapter import PlannedAdapter
from moeconv.planning.orbax_output import OrbaxOutput
from moeconv.planning.plan import Plan

INDEX_NAME = "model.safetensors.index.json"
_LORA = re.compile(r"lora_[AB]\.weight\Z")


def small_files(plan: Plan, tokenizer: TokenizerFiles | None) -> dict[str, bytes]:
    """Every file but the tensors and the manifest, by name."""
    if plan.adapter is not None and plan.adapter.targeted is not None:
        return adapter_files(plan, plan.adapter, plan.adapter.targeted)
    if isinstance(plan.output, OrbaxOutput):
        return run_files(plan, plan.output, tokenizer)
    files: dict[str, bytes] = dict(tokenizer.files) if tokenizer is not None else {}
    config = model_config(plan.page, plan.model, plan.main_dtype, plan.options)
    files["config.json"] = to_json(config)
    own = tokenizer.generation if tokenizer is not None else None
    files["generation_config.json"] = to_json(generation_config(plan.page, plan.model, own))
    if (index := _index(plan)) is not None:
        files[INDEX_NAME] = to_json(index)
    return files


def _index(plan: Plan) -> dict[str, Any] | None:
    """Content of model.safetensors.index.json; None when one file holds everything."""
    if len(plan.output.sizes) == 1:
        return None
    return {
        "metadata": {
            # As transformers counts them: a tied table once.
            "total_parameters": sum(math.prod(edge.shape) for edge in plan.edges.values()),
            "total_size": plan.target_bytes,
        },
        "weight_map": {name: plan.output.place(name)["file"] for name in sorted(plan.edges)},
    }


def make_manifest(plan: Plan, result: Result, files: Mapping[str, bytes]) -> Manifest:
    """Puts the manifest together from what was planned and what was done.

    Args:
        plan: What was planned.
        result: What was done.
        files: The small files that were written.
    """
    source, model = plan.source, plan.model
    records = dict(result.files)
    records |= {
        name: FileRecord(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
        for name, raw in files.items()
    }
    lines = [f"{name} {digest}" for name, digest in sorted(result.arrays.items())]
    return Manifest(
        moeconv_version=__version__,
        kind=plan.output.kind,
        source=SourceRecord(
            kind=source.kind,
            path=source.path,
            step=source.step,
            format=source.format,
            layout=source.layout,
            scan_axis=source.scan_axis,
            digest=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            arrays=dict(sorted(result.arrays.items())),
            metadata=dict(source.metadata),
        ),
        target=plan.target,
        architecture=plan.page.architecture,
        dtype=plan.main_dtype,
        dtype_kept=plan.dtype is None,
        untied=plan.options.untie,
        model={
            name: FieldRecord(
                value=value,
                source=str(model.sources[name]) if name in model.sources else None,
            )
            for name, value in model.values().items()
        },
        rules=_rules(plan),
        folds=_folds(plan),
        dropped=dict(plan.dropped),
        warnings=[*plan.warnings, *result.warnings],
        tokenizer=plan.tokenizer.source if plan.tokenizer is not None else None,
        plan=plan.digest,
        files=dict(sorted(records.items())),
        run=plan.run,
        missing_chunks={n: [list(p) for p in places] for n, places in result.missing.items()},
        accepted_keys=list(plan.accepted_keys),
        adapter=_adapter(plan.adapter) if plan.adapter is not None else None,
        narrowed=dict(plan.narrowed),
    )


def _adapter(adapter: PlannedAdapter) -> AdapterRecord:
    strength = adapter.strength
    return AdapterRecord(
        rank=strength.rank,
        alpha=strength.alpha,
        alpha_source=strength.source,
        scale=strength.scale,
        merged=adapter.merged,
        checkpoint=adapter.other.path,
        metadata=dict(adapter.other.metadata),
        base_model=adapter.base_model,
    )


def demand_json(plan: Plan) -> None:
    """What others gave must fit into the manifest, which is written when all work is done.

    Raises:
        ConfigError: Something is no number or no text.
    """
    given = {
        "model": plan.model.values(),
        "sources": {name: str(source) for name, source in plan.model.sources.items()},
        "tokenizer": plan.tokenizer and plan.tokenizer.source,
        "dropped": dict(plan.dropped),
        "warnings": list(plan.warnings),
        "run": plan.run and plan.run.model_dump(mode="json"),
        "adapter": plan.adapter and _adapter(plan.adapter).model_dump(mode="json"),
    }
    for name, value in given.items():
        try:
            to_json(value)
        except ValueError as error:
            raise ConfigError(f"{name}: cannot stand in the manifest: {error}") from None


def _folds(plan: Plan) -> list[FoldRecord]:
    """The factors a plan moves into weights, once for each rule."""
    records = {}
    for edge in plan.edges.values():
        for value in edge.values:
            if (fold := value.fold) is not None:
                target = plan.page.rules[edge.rule].target
                records[target] = FoldRecord(
                    target=target,
                    factor=fold.why,
                    value=fold.factor,
                    exact=value.bound() == 0.0,
                    reason=fold.reason,
                )
    return list(records.values())


def _factor(edge: Edge) -> str:
    """The end of the name of a tensor of an adapter; empty for one of a model."""
    return match[0] if (match := _LORA.search(edge.target)) else ""


def _rules(plan: Plan) -> list[str]:
    """The rules the plan used, one line each."""
    used = {(edge.rule, _factor(edge)): edge for edge in plan.edges.values()}
    lines = []
    for (number, factor), edge in used.items():
        rule, what = plan.page.rules[number], edge.describe()
        target = rule.target.removesuffix("weight") + factor if factor else rule.target
        lines.append(f"{' + '.join(rule.sources) or what} -> {target}: {what}")
    return lines
