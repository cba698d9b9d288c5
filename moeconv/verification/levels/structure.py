"""Level `structure`: files, headers, config and tokenizer, without the checkpoint.

What transformers would build from config.json is asked of transformers itself, on the meta device,
so that this level holds our rules against somebody else's.
"""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.artifact.manifest import MANIFEST_NAME
from moeconv.artifact.names import KNOWN, is_leftover
from moeconv.errors import MemoryLimitError, MoeconvError, OutputError
from moeconv.tensor.axes import Array
from moeconv.tensor.dtypes import DTYPES
from moeconv.untrusted.files import open_inside
from moeconv.verification.candidate import Stored, Subject, read_object
from moeconv.verification.checks import CandidateError, Check, Status, failed, passed, skipped
from moeconv.verification.levels.config_readers import check_readers
from moeconv.verification.levels.tokenizers import check_tokenizer
from moeconv.verification.models.transformers_load import build_empty, load_config, quiet, told_of

_HASH_BLOCK = 1 << 20
_SCAN_BLOCK = 1 << 22
# Keys of config.json that a check names.
_SHOWN = 20
_EXPONENT = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


def check_structure(subject: Subject) -> list[Check]:
    """Every check that needs nothing but the output directory."""
    checks: list[Check] = []
    for check in (
        _files,
        _tensors,
        _dtypes,
        _index,
        _tying,
        _finite,
        _config,
        check_readers,
        _transformers,
        check_tokenizer,
    ):
        try:
            checks.append(check(subject))
        except MemoryLimitError:  # the machine's, and no check's
            raise
        except MoeconvError as error:
            checks.append(
                failed("structure", check.__name__.removeprefix("check").strip("_"), str(error))
            )
    return checks


def _files(subject: Subject) -> Check:
    """Size and SHA-256 of every file against the manifest, and no file that it does not name."""
    foreign = sorted(set(subject.manifest.files) - set(subject.names))
    if foreign:  # they are not opened: a name may lead anywhere
        return failed(
            "structure",
            "files",
            f"the manifest names {len(foreign)} files that moeconv convert never writes",
            tensors=foreign,
        )
    wrong = []
    for name in subject.names:
        record = subject.manifest.files[name]
        path = subject.out / name
        if not path.is_file():
            wrong.append(f"{name} (missing)")
        elif path.stat().st_size != record.size:
            wrong.append(f"{name} (size)")
        elif sha256(path) != record.sha256:
            wrong.append(f"{name} (sha256)")
    known = {*subject.manifest.files, MANIFEST_NAME, *KNOWN}
    try:
        extra = sorted({p.name for p in subject.out.iterdir() if not is_leftover(p)} - known)
    except OSError as error:
        raise OutputError(f"{subject.out} cannot be listed: {error.strerror}") from None
    if wrong:
        return failed(
            "structure", "files", f"{len(wrong)} files are not as they were written", tensors=wrong
        )
    if extra:
        return Check(
            level="structure",
            name="files",
            status=Status.WARN,
            summary="files that the manifest does not name lie beside the model",
            tensors=extra,
        )
    count = len(subject.manifest.files)
    return passed("structure", "files", f"{count} files have the size and SHA-256 of the manifest")


def sha256(path: Path, *, links: bool = True) -> str:
    """SHA-256 of a file that lies directly in OUT; `links` as in `open_inside`.

    Raises:
        OutputError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_inside(path.parent, path.name, links=links) as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _tensors(subject: Subject) -> Check:
    """Every file's header, no tensor in two files, and as many as the described model has."""
    count = len(subject.tensors)
    if count != subject.count:
        summary = f"the described model has {subject.count:,} tensors, the files hold {count:,}"
        return failed("structure", "tensors", summary)
    listed = sum(1 for n in subject.names if n.endswith(".safetensors"))
    found = {stored.file.name for stored in subject.tensors.values()}
    if len(found) != listed:
        return failed(
            "structure", "tensors", f"{len(found)} of {listed} safetensors files hold tensors"
        )
    return passed("structure", "tensors", f"{count} tensors in {len(found)} files, no gaps")


def _dtypes(subject: Subject) -> Check:
    """What config.json declares is what the tensors have."""
    claimed = subject.config.get("dtype")
    sizes: dict[str, int] = {}
    for stored in subject.tensors.values():
        sizes[stored.spec.dtype] = sizes.get(stored.spec.dtype, 0) + stored.spec.nbytes
    most = max(sorted(sizes), key=sizes.__getitem__, default=None)  # as convert chooses
    kept = subject.manifest.dtype_kept
    if most == claimed and (kept or len(sizes) == 1):
        also = f", {len(sizes) - 1} other dtypes of the checkpoint kept" if len(sizes) > 1 else ""
        return passed("structure", "dtypes", f"tensors are {claimed}, as config.json says{also}")
    other = [n for n, stored in subject.tensors.items() if stored.spec.dtype != claimed]
    return failed(
        "structure",
        "dtypes",
        f"config.json says {claimed}, but {len(other)} of {len(subject.tensors)} tensors are "
        f"{' and '.join(sorted(dtype for dtype in sizes if dtype != claimed))}",
        tensors=other,
    )


def _index(subject: Subject) -> Check:
    """The index names the file of every tensor, and only those."""
    path = subject.out / "model.safetensors.index.json"
    files = {name: stored.file.name for name, stored in subject.tensors.items()}
    if not path.is_file():
        if len(set(files.values())) > 1:
            return failed(
                "structure", "index", "several files, but no model.safetensors.index.json"
            )
        return passed("structure", "index", "one file needs no index")
    listed = read_object(path, "index").get("weight_map")
    if not isinstance(listed, Mapping):
        return failed("structure", "index", f"{path.name} has no weight_map of names to files")
    wrong = sorted(n for n in set(listed) | set(files) if listed.get(n) != files.get(n))
    if wrong:
        return failed(
            "structure",
            "index",
            f"{len(wrong)} tensors are not where the index says",
            tensors=wrong,
        )
    return passed("structure", "index", f"the index places all {len(files)} tensors")


def _tying(subject: Subject) -> Check:
    """Tied means no head tensor; untied means one."""
    tied, head = subject.config.get("tie_word_embeddings"), "lm_head.weight" in subject.tensors
    if tied is head:
        state = "tied, yet has" if tied else "untied, yet lacks"
        return failed(
            "structure",
            "tying",
            f"config.json says the head is {state} lm_head.weight",
            tensors=["lm_head.weight"],
        )
    return passed("structure", "tying", "tied" if tied else "untied, with its own head")


def _finite(subject: Subject) -> Check:
    """No NaN or Inf."""
    files = {stored.file for stored in subject.tensors.values()}
    data = {file: np.memmap(file, np.uint8, "r") for file in files}
    tensors = subject.tensors.items()
    wrong = [name for name, stored in tensors if not _is_finite(stored, data[stored.file])]
    if wrong:
        return failed("structure", "finite", f"{len(wrong)} tensors hold NaN or Inf", tensors=wrong)
    return passed("structure", "finite", "all values are finite")


def _is_finite(stored: Stored, data: Array) -> bool:
    """Of a tensor in its file's bytes; never an exponent of all ones."""
    count = stored.spec.nbytes // DTYPES[stored.spec.dtype].itemsize
    dtype = np.dtype(f"u{DTYPES[stored.spec.dtype].itemsize}")
    bits: Array = np.ndarray(count, dtype, data, stored.offset)
    mask = dtype.type(_EXPONENT[stored.spec.dtype])
    return not any(
        bool(((bits[i : i + _SCAN_BLOCK] & mask) == mask).any())
        for i in range(0, count, _SCAN_BLOCK)
    )


def _config(subject: Subject) -> Check:
    """config.json against what the described model should have, key by key."""
    expected, actual, wrong = subject.wanted_config, subject.config, subject.wrong_keys
    if wrong:
        shown = wrong[:_SHOWN]
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        return failed(
            "structure",
            "config",
            f"config.json differs from the described model in: {', '.join(shown)}{more}",
            metrics={k: [expected.get(k), actual.get(k)] for k in shown if k in actual},
        )
    summary = f"{len(expected)} keys of config.json are the described model's"
    if accepted := subject.manifest.accepted_keys:
        return Check(
            level="structure",
            name="config",
            status=Status.WARN,
            summary=f"{summary}; but the run's config has settings that moeconv does not know, "
            f"which the conversion was told to accept: {', '.join(accepted)}",
            metrics={"accepted_keys": accepted},
        )
    return passed("structure", "config", summary)


def demand_loadable(subject: Subject) -> None:
    """What the levels of running models load is what the manifest describes.

    Raises:
        CandidateError: config.json or the tensors are another model's.
    """
    subject.demand_described()
    if (check := _transformers(subject)).status is Status.FAIL:
        raise CandidateError(check.summary, check.name)


def _transformers(subject: Subject) -> Check:
    """Names and shapes against the architecture that transformers builds on the meta device."""
    missing = [p for p in ("torch", "transformers") if importlib.util.find_spec(p) is None]
    if missing:
        return skipped(
            "structure", "transformers", f"{' and '.join(missing)} not installed (moeconv[verify])"
        )
    try:
        subject.demand_described()
    except CandidateError as error:  # so what it would build may be anything, of any size
        return skipped("structure", "transformers", f"not asked, since {error}")
    with told_of(subject.out, CandidateError, "build a model from config.json of"), quiet():
        wanted = _architecture(subject.out)
    found = {name: stored.spec.shape for name, stored in subject.tensors.items()}
    problems = [f"{n} (missing)" for n in sorted(set(wanted) - set(found))]
    problems += [f"{n} (unexpected)" for n in sorted(set(found) - set(wanted))]
    both = sorted(set(found) & set(wanted))
    problems += [f"{n} {found[n]} for {wanted[n]}" for n in both if found[n] != wanted[n]]
    if problems:
        return failed(
            "structure",
            "transformers",
            f"transformers builds another model from config.json: {len(problems)} tensors differ",
            tensors=problems,
        )
    return passed(
        "structure", "transformers", f"transformers builds exactly these {len(both)} tensors"
    )


def _architecture(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensors of a model as its checkpoints name them, built without memory for values."""
    from transformers.core_model_loading import revert_weight_conversion

    config = load_config(folder)
    model = build_empty(config)
    state: dict[str, Any] = revert_weight_conversion(model, model.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
