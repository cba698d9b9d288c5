"""Planning the way from Hugging Face to MaxText: which arrays, of which tensors, in which chunks.

No mapping is written a second time: the page's rules are expanded for the checkpoint that is to be
written, as if it were read, and each edge is turned round.
"""

import hashlib
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moeconv.arch.arrange import arranged
from moeconv.arch.description import ModelDescription
from moeconv.arch.model_keys import run_keys
from moeconv.conversion.described import Described, describe
from moeconv.conversion.incoming_tensors import as_text, demand_fills, demand_tensors, left_out
from moeconv.conversion.options import ConvertOptions, Prepared
from moeconv.errors import TokenizerError, UnsupportedError, UsageError
from moeconv.families import blocks
from moeconv.families._shared import QUERY_SCALE
from moeconv.hf.files import Files, LocalFiles
from moeconv.hf.model import (
    CONFIG,
    INDEX,
    HfModel,
    Tensors,
    Values,
    View,
    is_model,
    open_model,
    with_quantised,
)
from moeconv.hf.tokenizer import (
    TokenizerFiles,
    check_fits,
    read_files,
    read_tokenizer,
    tokenizer_of,
)
from moeconv.mapping.edges import Edge, expand
from moeconv.mapping.reverse import Origin, reverse
from moeconv.mapping.rules import Options
from moeconv.maxtext.unchanged import Unchanged
from moeconv.orbax.inventory import fingerprints
from moeconv.orbax.writer import WrittenArray
from moeconv.planning.orbax_output import MESH, in_a_row, orbax_output, source_chunk
from moeconv.planning.plan import PlannedSource, PlannedTokenizer, build_plan
from moeconv.tensor.stored import ArrayInfo, Source
from moeconv.untrusted.files import is_address
from moeconv.untrusted.text import printable

# Of a tokenizer that is a program (transformers/dynamic_module_utils.py).
_CODE = re.compile(r"token[a-z]*_.+\.py")


@dataclass(frozen=True)
class HfInput:
    """A Hugging Face model that is read (`options.Input`)."""

    model: HfModel
    arrays: Source
    files: str | None
    unchanged: Unchanged

    @property
    def folders(self) -> tuple[Path, ...]:
        """The model's, where it is on this machine."""
        files = self.model.files
        return (files.folder.resolve(),) if isinstance(files, LocalFiles) else ()

    def connected(self) -> AbstractContextManager[None]:
        """Everything is read while this is open."""
        return self.model.files.connected()


def model_files(source: str) -> Files | None:
    """The files of a Hugging Face model that SRC names; None where it names something else.

    Raises:
        MoeconvError: It names a model on the Hub, which cannot be read; see `HubFiles.open`.
    """
    if source.startswith("hf://"):
        from moeconv.hf.hub_files import HubFiles  # and huggingface_hub

        return HubFiles.open(source)
    if is_address(source):
        return None
    try:
        files = LocalFiles(Path(source).expanduser())
    except RuntimeError:  # ~name of no user
        return None
    return files if is_model(files) else None


def plan_incoming(files: Files, options: ConvertOptions, hf: HfModel | None = None) -> Prepared:
    """Reads config.json, the index and the headers of a model, and makes the plan; writes nothing.

    Args:
        files: The model's.
        options: What is asked for.
        hf: The model, where these were read.

    Raises:
        MoeconvError: Any of its subclasses; see `moeconv.errors`.
    """
    with files.connected():
        return _plan(files, options, hf)


def _plan(files: Files, options: ConvertOptions, hf: HfModel | None) -> Prepared:
    unchanged = Unchanged()
    if isinstance(files, LocalFiles):
        unchanged.watch(partial(fingerprints, files.folder))
    hf, beside = as_text(hf or open_model(files))
    hf = with_quantised(hf)
    found = _described(hf, options)
    page, model = found.page.spelled_as(hf.tensors), found.model
    layout = arranged(
        found.block, model, scan_layers=options.scan_layers, scan_axis=options.scan_axis
    )
    tokenizer, warnings = _tokenizer(files, options, found)
    forward = expand(page, model, layout, {a.name: "float32" for a in layout.arrays})
    dropped = demand_tensors(hf, forward, found, beside)
    demand_fills(hf, forward)
    dtypes = _dtypes(hf, forward, options)
    forward = expand(page, model, layout, dtypes)
    stored = {name: tensor.spec.dtype for name, tensor in hf.tensors.items()}
    scales = {name: t.scales for name, t in hf.tensors.items() if t.scales is not None}
    edges, origins = reverse(forward, page, layout, stored, scales)
    settings = run_keys(model, layout)
    output = orbax_output(
        edges,
        _shards(options.shards),
        collections={
            array.name: ("params", array.parameter.variable or "params") for array in layout.arrays
        },
        scan_layers=layout.stacking.scanned,
        settings=settings,
        zarr3=options.zarr3,
        ocdbt=options.ocdbt,
    )
    _demand_steps(model, settings)
    source = Tensors(hf, views_of(edges, origins, output.arrays, remote=files.remote))
    digest = _files_digest(hf)
    plan = build_plan(
        model=model,
        target=page.name,
        options=Options(),
        dtype=None if options.dtype == "keep" else options.dtype,
        edges=edges,
        source=PlannedSource(
            kind="huggingface",
            path=files.name,
            step=None,
            format="safetensors",
            layout=layout.describe(),
            scan_axis=layout.scan_axis,
            metadata=_metadata(files),
            files=digest,
            may_lack=False,
            arrays=source.info,
            collections={},
        ),
        lay_out=lambda edges, made, limit: output,
        chunks=output.blocks,
        max_shard_bytes=options.max_shard_bytes,
        warnings=(*found.notes, *warnings, *left_out(dropped)),
        dropped=dropped,
        tokenizer=tokenizer and PlannedTokenizer.of(tokenizer, options.tokenizer),
        accepted_keys=tuple(options.accept),
        jobs=options.jobs,
        max_memory=options.max_memory,
    )
    _ = plan.memory_budget  # or it raises: the limit is too low
    return Prepared(plan, HfInput(hf, source, digest, unchanged), tokenizer, options)


def _described(hf: HfModel, options: ConvertOptions) -> Described:
    """What the model is, in a decoder block that holds it exactly where there is one.

    A factor that a block folds into weights rounds those of 32 bits; one that scales queries itself
    folds none.
    """
    where = f"{hf.name}/{CONFIG}"
    read = partial(describe, hf.config, where, accept=options.accept, peek=Values(hf))
    found = read(block=options.block)
    wide = any(tensor.spec.dtype == "float32" for tensor in hf.tensors.values())
    if options.block is not None or not (wide and found.block.query_scale_in_kernel):
        return found
    for block in blocks().values():
        if block.targets[0] == found.page.name and not block.query_scale_in_kernel:
            other = read(block=block.name)
            why = (
                f"decoder_block={block.name} is written, which holds weights of 32 bits as they "
                f"are; {found.block.name} would fold {QUERY_SCALE.text} into them, and round: give "
                f"--block {found.block.name} if it has to be that"
            )
            return replace(other, notes=(*other.notes, why))
    return found


def _demand_steps(model: ModelDescription, settings: Mapping[str, Any]) -> None:
    """Experts must be where MaxText builds them.

    Raises:
        UnsupportedError: They are not in every n-th layer (models/envy.py, models/llama4.py
            `determine_is_moe_layer`).
    """
    step = settings.get("interleave_moe_layer_step", 1)
    built = tuple(n for n in range(model.num_hidden_layers) if step and (n + 1) % step == 0)
    if "interleave_moe_layer_step" in settings and model.moe_layers != built:
        listed = ", ".join(str(n + 1) for n in model.moe_layers)
        raise UnsupportedError(
            f"it has experts in layers {listed}, and MaxText's {model.decoder_block} in every "
            f"{step}th"
        )


def _dtypes(hf: HfModel, forward: tuple[Edge, ...], options: ConvertOptions) -> dict[str, str]:
    """The dtype of each array: that of its tensors, float32 where a factor is folded into it.

    A quantised tensor has the dtype of its numbers.
    """
    stored: dict[str, set[str]] = {}
    folded: set[str] = set()
    for edge in forward:
        for part in edge.parts:
            tensor = hf.tensors[edge.target]
            dtype = tensor.spec.dtype if tensor.scales is None else tensor.scales.through[-1]
            stored.setdefault(part.source, set()).add(dtype)
            if part.form.value.fold is not None:
                folded.add(part.source)
    if options.dtype != "keep":
        return dict.fromkeys(stored, options.dtype)
    return {
        name: found.pop() if len(found) == 1 and name not in folded else "float32"
        for name, found in stored.items()
    }


def _shards(mesh: Mapping[str, int]) -> dict[str, int]:
    """In how many parts a mesh cuts each axis of an array.

    Raises:
        UsageError: It has an axis that moeconv does not know.
    """
    parts: dict[str, int] = {}
    for name, count in mesh.items():
        if name not in MESH:
            raise UsageError(f"--shards {name} is none of {', '.join(MESH)}")
        parts |= dict.fromkeys(MESH[name], count)
    return parts


def views_of(
    edges: tuple[Edge, ...],
    origins: Mapping[str, Origin],
    arrays: Mapping[str, WrittenArray | ArrayInfo],
    *,
    remote: bool = False,
) -> dict[str, View]:
    """The tensors as arrays, each read in pieces that make whole chunks.

    Args:
        edges: From `reverse`.
        origins: The same.
        arrays: What is written, by name.
        remote: Each piece is one range of bytes, whatever the chunks are; what then makes no whole
            chunks waits in the scratch file.
    """
    views: dict[str, View] = {}
    for edge in edges:
        for part in edge.parts:
            origin = origins[part.source]
            chunk = source_chunk(part.form, arrays[edge.target].chunk, origin.shape)
            if remote:
                chunk = in_a_row(chunk, origin.shape, part.form.dtype.itemsize)
            if (seen := views.get(origin.name)) is not None:
                chunk = tuple(max(a, b) for a, b in zip(chunk, seen.chunk, strict=True))
            views[origin.name] = View(origin.tensor, origin.base, origin.shape, chunk)
            for other in part.form.value.companions:
                scales = origins[other.source]
                # Of stacked experts those of one.
                once = (1,) * max(0, len(scales.shape) - 2) + scales.shape[-2:]
                views[scales.name] = View(scales.tensor, scales.base, scales.shape, once)
    return views


def _tokenizer(
    files: Files, options: ConvertOptions, found: Described
) -> tuple[TokenizerFiles | None, list[str]]:
    """The tokenizer that the user names, else the model's own, else None with a warning."""
    length = found.model.max_position_embeddings
    try:
        if options.tokenizer is not None:
            tokenizer = read_tokenizer(options.tokenizer, model_max_length=length)
        elif isinstance(files, LocalFiles):
            tokenizer = read_tokenizer(files.name, model_max_length=length)
        else:
            own = read_files(partial(_read, files), files.name)
            tokenizer = tokenizer_of(own, files.name, "hub", model_max_length=length)
    except TokenizerError as error:
        if options.tokenizer is not None:
            raise
        code = sorted(name for name in files.sizes() if _CODE.fullmatch(name))
        if code:
            return None, [
                f"no tokenizer is written: {files.name} has one as code ({printable(code[0])}), "
                "which is never executed; give a folder with a tokenizer.json, or its ranks, with "
                "--tokenizer"
            ]
        return None, [f"no tokenizer is written: {error}"]
    return tokenizer, [*tokenizer.notes, *check_fits(tokenizer, found.model.vocab_size)]


def _read(files: Files, name: str, limit: int) -> bytes | None:
    try:
        return files.read(name, limit)
    except FileNotFoundError:
        return None


def _metadata(files: Files) -> dict[str, str]:
    found = {name: _read(files, name, 2**30) for name in (CONFIG, INDEX)}
    return {n: hashlib.sha256(raw).hexdigest() for n, raw in found.items() if raw is not None}


def _files_digest(hf: HfModel) -> str:
    lines = [f"{name} {hf.files.version(name)}" for name in hf.weights]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
