"""`plan.json`: a plan as a file, for people, for programs, and for another process to execute.

It holds everything that the plan was made from, and what came of it. Reading it makes the plan anew
from the first and compares the digest, so that a file that was changed, or that another moeconv
wrote by other rules, is refused, and never half believed.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moeconv import __version__
from moeconv.arch.description import ModelDescription, Origin, Provenance
from moeconv.arch.detection import detect_layout
from moeconv.arch.layout import Layout
from moeconv.errors import ConfigError, MoeconvError, OutputError
from moeconv.families import blocks, targets
from moeconv.mapping.edges import Edge, expand
from moeconv.mapping.lora import merged_edges, peft_edges, targeted
from moeconv.mapping.rules import Options, Target
from moeconv.maxtext.lora import Strength
from moeconv.maxtext.run_record import RunRecord
from moeconv.planning.adapter import PlannedAdapter, changes_of, peft_output
from moeconv.planning.model_values import model_of
from moeconv.planning.output import safetensors_output
from moeconv.planning.plan import Plan, PlannedSource, PlannedTokenizer, build_plan
from moeconv.tensor.stored import ArrayInfo
from moeconv.untrusted import strict_json
from moeconv.untrusted.files import read_regular

# What makes an output of a kind.
_LAY_OUT = {"huggingface": safetensors_output, "peft": peft_output}
_LIMIT = 2**30  # a plan of a trillion parameters has some 50 MB


_Size = Annotated[int, Field(gt=0, lt=2**63)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Array(_Frozen):
    path: tuple[str, ...]
    shape: tuple[_Size, ...]
    dtype: str
    chunk: tuple[_Size, ...]
    codec: str
    decoded_bytes: _Size


class _Source(_Frozen):
    kind: Literal["maxtext", "huggingface"]
    path: str
    step: int | None
    format: str
    layout: str
    scan_axis: int | None
    metadata: dict[str, str]
    files: str | None
    may_lack: bool
    arrays: list[_Array]
    collections: dict[str, str]

    def planned(self) -> PlannedSource:
        arrays = [ArrayInfo(**vars(array)) for array in self.arrays]
        return PlannedSource(**{**vars(self), "arrays": {array.name: array for array in arrays}})


class _Adapter(_Frozen):
    """A LoRA adapter, and the checkpoint that is read beside the source."""

    rank: _Size
    alpha: float
    where: str
    quantised: str | None
    base_model: str | None
    merged: bool
    other: _Source

    @property
    def strength(self) -> Strength:
        return Strength(self.rank, self.alpha, self.where, self.quantised)


class _Field(_Frozen):
    value: Any
    source: tuple[Origin, str] | None


class _Tokenizer(_Frozen):
    option: str | None
    source: str
    files: dict[str, str]

    def planned(self) -> PlannedTokenizer:
        return PlannedTokenizer(self.option, self.source, self.files)


class _Request(_Frozen):
    """What a plan is made from: its attributes, but for what follows from them."""

    source: _Source
    model: dict[str, _Field]
    target: str
    untie: bool
    dtype: str | None
    max_shard_bytes: int
    dropped: dict[str, str]
    warnings: list[str]
    tokenizer: _Tokenizer | None
    run: RunRecord | None
    accepted_keys: list[str]
    narrowed: dict[str, str] = {}
    adapter: _Adapter | None = None
    jobs: _Size
    max_memory: _Size


class _PlanFile(BaseModel):
    """The file's schema, but for what is there for people only."""

    format: Literal["moeconv plan"]
    version: Literal[1]
    moeconv_version: str = Field(pattern=r"^[0-9A-Za-z.+-]{1,40}$")
    output: Literal["huggingface", "peft", "maxtext"]
    digest: str
    request: _Request
    request_sha256: str


def to_json(plan: Plan) -> dict[str, Any]:
    """The content of plan.json: what was asked for, and all that came of it."""
    model = plan.model
    request = _Request(
        source=_source(plan.source),
        model={
            name: _Field(value=value, source=_origin(model.sources.get(name)))
            for name, value in model.values().items()
        },
        target=plan.target,
        untie=plan.options.untie,
        dtype=plan.dtype,
        max_shard_bytes=plan.max_shard_bytes,
        dropped=dict(plan.dropped),
        warnings=list(plan.warnings),
        tokenizer=_Tokenizer(**vars(plan.tokenizer)) if plan.tokenizer is not None else None,
        run=plan.run,
        accepted_keys=list(plan.accepted_keys),
        narrowed=dict(plan.narrowed),
        adapter=_adapter(plan.adapter) if plan.adapter is not None else None,
        jobs=plan.jobs,
        max_memory=plan.max_memory,
    )
    return {
        "format": "moeconv plan",
        "version": 1,
        "moeconv_version": __version__,
        "output": plan.output.kind,
        **_outcome(plan),
        "request": (asked := _asked(request)),
        "request_sha256": _sha256(asked),
    }


def _source(source: PlannedSource) -> _Source:
    arrays = [_Array(**vars(info)) for info in source.arrays.values()]
    return _Source(**{**vars(source), "arrays": arrays, "metadata": dict(source.metadata)})


def _adapter(adapter: PlannedAdapter) -> _Adapter:
    strength = adapter.strength
    return _Adapter(
        rank=strength.rank,
        alpha=strength.alpha,
        where=strength.source,
        quantised=strength.quantised,
        base_model=adapter.base_model,
        merged=adapter.merged,
        other=_source(adapter.other),
    )


def _asked(request: _Request) -> dict[str, Any]:
    rare = {name for name in ("adapter", "narrowed") if not getattr(request, name)}
    return request.model_dump(mode="json", exclude=rare)


def _outcome(plan: Plan) -> dict[str, Any]:
    """What people and programs read of a plan: tensors, files and costs."""
    estimate, output = plan.estimate, plan.output
    return {
        "target": plan.target,
        "architecture": plan.page.architecture,
        "digest": plan.digest,
        "tensors": [
            {
                "name": edge.target,
                "shape": list(edge.shape),
                "dtype": edge.dtype,
                "sources": list(edge.sources),
                "ops": edge.steps(),
                "summary": edge.describe(),
                "error_bound": edge.bound(),
                **output.place(name),
                "bytes": edge.nbytes,
            }
            for name, edge in plan.edges.items()
        ],
        "files": [{"name": name, "bytes": size} for name, size in output.sizes.items()],
        "read_bytes": estimate.read_bytes,
        "write_bytes": estimate.write_bytes,
        "scratch_bytes": estimate.scratch_bytes,
        "disk_bytes": estimate.disk_bytes,
        "memory_floor": estimate.memory_floor,
        "memory_budget": plan.memory_budget,
        "units": len(plan.units),
        "warnings": list(plan.warnings),
        "dropped": dict(plan.dropped),
    }


def save_plan(plan: Plan, path: Path) -> None:
    """Writes plan.json.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        path.write_bytes(strict_json.dumps(to_json(plan)))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None


def _sha256(content: Any) -> str:
    return hashlib.sha256(strict_json.dumps(content)).hexdigest()


def _origin(source: Provenance | None) -> tuple[Origin, str] | None:
    return (source.origin, source.detail) if source is not None else None


def load_plan(path: Path) -> Plan:
    """Reads plan.json and makes the plan anew.

    Raises:
        ConfigError: It is no plan, another moeconv's, or it was changed.
    """
    try:
        content = strict_json.loads(read_regular(path, limit=_LIMIT), unique=True)
        if isinstance(content, dict) and content.get("output") == "maxtext":
            raise ConfigError(
                f"{path} plans the way from Hugging Face to MaxText, which is not carried out from "
                "a file; convert the model itself, with the same options"
            )
        plan = _plan_of(_PlanFile.model_validate(content), path)
        if content != strict_json.loads(strict_json.dumps(to_json(plan))):
            raise _changed(path)  # what people read of it, say
        return plan
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"{path} is no plan that moeconv wrote: {where}: {first['msg']}; make it again"
        ) from None
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RecursionError):
        raise ConfigError(f"{path} is no plan that moeconv wrote; make it again") from None


def _changed(path: Path, version: str = __version__) -> ConfigError:
    made = f"it was made by moeconv {version}, and this is {__version__}"
    because = made if version != __version__ else "it was changed"
    return ConfigError(f"{path} is not what this moeconv would plan: {because}; make it again")


def _plan_of(file: _PlanFile, path: Path) -> Plan:
    request, tokenizer = file.request, file.request.tokenizer
    stale = _changed(path, file.moeconv_version)
    model = model_of({name: one.value for name, one in request.model.items()})
    sources = {name: Provenance(*one.source) for name, one in request.model.items() if one.source}
    source = request.source.planned()
    page, options = targets().get(request.target), Options(untie=request.untie)
    if page is None:
        raise stale
    try:
        adapter, edges = _edges(page, model, source, request)
        plan = build_plan(
            model=replace(model, sources=sources),
            target=page.name,
            options=options,
            dtype=request.dtype,
            edges=edges,
            source=source,
            adapter=adapter,
            lay_out=_LAY_OUT[file.output],
            max_shard_bytes=request.max_shard_bytes,
            warnings=tuple(request.warnings),
            dropped=request.dropped,
            tokenizer=tokenizer.planned() if tokenizer is not None else None,
            run=request.run,
            accepted_keys=tuple(request.accepted_keys),
            narrowed=request.narrowed,
            jobs=request.jobs,
            max_memory=request.max_memory,
        )
    except MoeconvError:
        raise stale from None
    asked = _asked(request)
    if plan.digest != file.digest or file.request_sha256 != _sha256(asked):
        raise stale
    return plan


def _edges(
    page: Target, model: ModelDescription, source: PlannedSource, request: _Request
) -> tuple[PlannedAdapter | None, tuple[Edge, ...]]:
    """The tensors of a plan, and its adapter where it is one's."""
    adapter, dtype, options = request.adapter, request.dtype, Options(untie=request.untie)
    base: Mapping[str, ArrayInfo] = source.arrays
    factors: Mapping[str, ArrayInfo] = {}
    if adapter is not None:
        other = adapter.other.planned()
        factors = other.arrays if adapter.merged else source.arrays
        base = source.arrays if adapter.merged else other.arrays
        base = {name: info for name, info in base.items() if name not in factors}
    of_model = source if adapter is None or adapter.merged else other
    layout = _layout(model.decoder_block, replace(of_model, arrays=base), request.dropped)
    dtypes = {name: info.dtype for name, info in base.items()}
    edges = expand(
        page, model, layout, dtypes, dtype=dtype, narrowed=request.narrowed, options=options
    )
    if adapter is None:
        return None, edges
    changes, strength = changes_of(layout, factors), adapter.strength
    if adapter.merged:
        planned = PlannedAdapter(strength, adapter.base_model, None, other)
        return planned, merged_edges(edges, changes, strength.scale)
    adapted = peft_edges(edges, page, changes, dtype=dtype)
    found = targeted(edges, adapted, page)
    return PlannedAdapter(strength, adapter.base_model, found, other), adapted


def _layout(block: str, source: PlannedSource, dropped: Collection[str]) -> Layout:
    """How the source keeps its layers, found anew from its shapes."""
    shapes = {info.path: info.shape for name, info in source.arrays.items() if name not in dropped}
    collections = {
        info.path: source.collections[name]
        for name, info in source.arrays.items()
        if name in source.collections
    }
    return detect_layout(
        shapes, [blocks()[block]], scan_axis=source.scan_axis, collections=collections
    )
