"""Level `structure`: files, headers, config and tokenizer, without the checkpoint.

What transformers would build from config.json is asked of transformers itself, on the meta device,
so that this level checks our rules against an independent reading of the same file.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moeconv.artifact.manifest import MANIFEST_NAMES
from moeconv.artifact.names import KNOWN
from moeconv.tensor.axes import Array
from moeconv.tensor.dtypes import DTYPES
from moeconv.verification.boundary import blaming
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import CandidateError, Check, CheckFactory, Status
from moeconv.verification.context import Verification
from moeconv.verification.files import INDEX_NAME, read_object, sha256
from moeconv.verification.levels import Level
from moeconv.verification.levels.config_readers import check_config_readers
from moeconv.verification.levels.tokenizers import check_tokenizer
from moeconv.verification.models.transformers_load import build_empty, load_config, quiet
from moeconv.verification.stored import Stored

_OF = CheckFactory(Level.STRUCTURE)
_SCAN_BLOCK = 1 << 22
# Keys of config.json that a check names.
_SHOWN = 20
_EXPONENT = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


def run_level(run: Verification) -> list[Check]:
    """The level."""
    return check_structure(run.candidate)


def check_structure(candidate: Candidate) -> list[Check]:
    """Every check that needs nothing but the output directory.

    Raises:
        MachineError: This machine cannot read a file.
        MemoryLimitError: It has too little memory.
    """
    checks = []
    for name, check in _CHECKS.items():
        try:
            with blaming(f"{candidate.out}: check {name} cannot be made", check=name):
                checks.append(check(candidate))
        except CandidateError as error:
            checks.append(_OF.failed(name, str(error)))
    return checks


def check_files(candidate: Candidate) -> Check:
    """Size and SHA-256 of every file against the manifest, and no file that it does not name."""
    foreign = sorted(set(candidate.manifest.files) - set(candidate.names))
    if foreign:  # they are not opened: a name may lead anywhere
        return _OF.failed(
            "files",
            f"the manifest names {len(foreign)} files that moeconv convert never writes",
            tensors=foreign,
        )
    wrong = []
    for name in candidate.names:
        record = candidate.manifest.files[name]
        path = candidate.out / name
        if not path.is_file():
            wrong.append(f"{name} (missing)")
        elif path.stat().st_size != record.size:
            wrong.append(f"{name} (size)")
        elif sha256(path) != record.sha256:
            wrong.append(f"{name} (sha256)")
    known = {*candidate.manifest.files, *MANIFEST_NAMES, *KNOWN}
    extra = sorted(candidate.entries - known)
    if wrong:
        return _OF.failed(
            "files", f"{len(wrong)} files are not as they were written", tensors=wrong
        )
    if extra:
        return _OF.warned(
            "files", "files that the manifest does not name are beside the model", tensors=extra
        )
    count = len(candidate.manifest.files)
    return _OF.passed("files", f"{count} files have the size and SHA-256 of the manifest")


def _tensors(candidate: Candidate) -> Check:
    """Every file's header, no tensor in two files, and as many as the described model has."""
    count = len(candidate.tensors)
    if count != candidate.count:
        summary = f"the described model has {candidate.count:,} tensors, the files hold {count:,}"
        return _OF.failed("tensors", summary)
    listed = sum(1 for n in candidate.names if n.endswith(".safetensors"))
    found = {stored.file.name for stored in candidate.tensors.values()}
    if len(found) != listed:
        return _OF.failed("tensors", f"{len(found)} of {listed} safetensors files hold tensors")
    return _OF.passed("tensors", f"{count} tensors in {len(found)} files, no gaps")


def _dtypes(candidate: Candidate) -> Check:
    """What config.json declares is what the tensors have."""
    claimed = candidate.config.get("dtype")
    sizes: dict[str, int] = {}
    for stored in candidate.tensors.values():
        sizes[stored.spec.dtype] = sizes.get(stored.spec.dtype, 0) + stored.spec.nbytes
    most = max(sorted(sizes), key=sizes.__getitem__, default=None)  # as convert chooses
    kept = candidate.manifest.dtype_kept
    if most == claimed and (kept or len(sizes) == 1):
        also = f", {len(sizes) - 1} other dtypes of the checkpoint kept" if len(sizes) > 1 else ""
        return _OF.passed("dtypes", f"tensors are {claimed}, as config.json says{also}")
    other = [n for n, stored in candidate.tensors.items() if stored.spec.dtype != claimed]
    return _OF.failed(
        "dtypes",
        f"config.json says {claimed}, but {len(other)} of {len(candidate.tensors)} tensors are "
        f"{' and '.join(sorted(dtype for dtype in sizes if dtype != claimed))}",
        tensors=other,
    )


def _index(candidate: Candidate) -> Check:
    """The index names the file of every tensor, and only those."""
    path = candidate.out / INDEX_NAME
    files = {name: stored.file.name for name, stored in candidate.tensors.items()}
    if not path.is_file():
        if len(set(files.values())) > 1:
            return _OF.failed("index", f"several files, but no {INDEX_NAME}")
        return _OF.passed("index", "one file needs no index")
    listed = read_object(path, "index").get("weight_map")
    if not isinstance(listed, Mapping):
        return _OF.failed("index", f"{path.name} has no weight_map of names to files")
    wrong = sorted(n for n in listed.keys() | files.keys() if listed.get(n) != files.get(n))
    if wrong:
        return _OF.failed(
            "index",
            f"{len(wrong)} tensors are not where the index says",
            tensors=wrong,
        )
    return _OF.passed("index", f"the index places all {len(files)} tensors")


def _tying(candidate: Candidate) -> Check:
    """Tied means no head tensor; untied means one."""
    head = _head_of(candidate)
    tied, there = candidate.config.get("tie_word_embeddings"), head in candidate.tensors
    if tied is not (not there):
        state = "there" if there else "not there"
        summary = f"config.json has tie_word_embeddings: {tied!r}, but {head} is {state}"
        return _OF.failed("tying", summary, tensors=[head])
    return _OF.passed("tying", "tied" if tied else "untied, with its own head")


def check_finite(candidate: Candidate) -> Check:
    """No NaN or Inf."""
    files = {stored.file for stored in candidate.tensors.values()}
    data = {file: np.memmap(file, np.uint8, "r") for file in files}
    tensors = candidate.tensors.items()
    wrong = [name for name, stored in tensors if not _is_finite(stored, data[stored.file])]
    if wrong:
        return _OF.failed("finite", f"{len(wrong)} tensors hold NaN or Inf", tensors=wrong)
    return _OF.passed("finite", "all values are finite")


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


def _config(candidate: Candidate) -> Check:
    """config.json against what the described model should have, key by key."""
    expected, actual, wrong = candidate.wanted_config, candidate.config, candidate.wrong_keys
    if wrong:
        shown = wrong[:_SHOWN]
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        return _OF.failed(
            "config",
            f"config.json differs from the described model in: {', '.join(shown)}{more}",
            metrics={k: [expected.get(k), actual.get(k)] for k in shown if k in actual},
        )
    summary = f"{len(expected)} keys of config.json are the described model's"
    if accepted := candidate.manifest.accepted_keys:
        return _OF.warned(
            "config",
            f"{summary}; but the run's config has settings that moeconv does not know, and that "
            f"the conversion accepted: {', '.join(accepted)}",
            metrics={"accepted_keys": accepted},
        )
    return _OF.passed("config", summary)


def demand_loadable(candidate: Candidate) -> None:
    """What the levels of running models load is what the manifest describes.

    Raises:
        CandidateError: config.json or the tensors are another model's.
    """
    candidate.demand_described()
    if (check := _transformers(candidate)).status is Status.FAIL:
        raise CandidateError(check.summary, check.name)


def _transformers(candidate: Candidate) -> Check:
    """Names and shapes against the architecture that transformers builds on the meta device."""
    missing = [p for p in ("torch", "transformers") if importlib.util.find_spec(p) is None]
    if missing:
        return _OF.skipped(
            "transformers", f"{' and '.join(missing)} not installed (moeconv[verify])"
        )
    try:
        candidate.demand_described()
    except CandidateError as error:  # so what it would build may be anything, of any size
        return _OF.skipped("transformers", f"not asked, since {error}")
    what = f"transformers cannot build a model from config.json of {candidate.out}"
    with blaming(what, check="transformers"), quiet():
        wanted = _architecture(candidate)
    found = {name: stored.spec.shape for name, stored in candidate.tensors.items()}
    problems = [f"{n} (missing)" for n in sorted(set(wanted) - set(found))]
    problems += [f"{n} (unexpected)" for n in sorted(set(found) - set(wanted))]
    both = sorted(set(found) & set(wanted))
    problems += [f"{n} {found[n]} for {wanted[n]}" for n in both if found[n] != wanted[n]]
    if problems:
        return _OF.failed(
            "transformers",
            f"transformers builds another model from config.json: {len(problems)} tensors differ",
            tensors=problems,
        )
    return _OF.passed("transformers", f"transformers builds exactly these {len(both)} tensors")


def _head_of(candidate: Candidate) -> str:
    return f"{candidate.family.probe.head}.weight"


def _architecture(candidate: Candidate) -> dict[str, tuple[int, ...]]:
    """Tensors of a model as its checkpoints name them, built without memory for values."""
    from transformers.core_model_loading import revert_weight_conversion

    config = load_config(candidate.out)
    model = build_empty(config)
    state: dict[str, Any] = revert_weight_conversion(model, model.state_dict())
    if config.tie_word_embeddings:
        state.pop(_head_of(candidate), None)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


_CHECKS: Mapping[str, Callable[[Candidate], Check]] = {
    "files": check_files,
    "tensors": _tensors,
    "dtypes": _dtypes,
    "index": _index,
    "tying": _tying,
    "finite": check_finite,
    "config": _config,
    "readers": check_config_readers,
    "transformers": _transformers,
    "tokenizer": check_tokenizer,
}
