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

from moeconv.convert.beside import KNOWN
from moeconv.convert.manifest import MANIFEST_NAME
from moeconv.errors import MoeconvError, OutputError
from moeconv.hf.config import model_config
from moeconv.mapping.ops import DTYPES
from moeconv.untrusted.files import open_inside
from moeconv.verify.outcome import Check, Status, failed, first_line, passed, skipped
from moeconv.verify.readers import check_readers
from moeconv.verify.subject import Stored, Subject, read_object
from moeconv.verify.tokenizers import check_tokenizer

_HASH_BLOCK = 1 << 20
_SCAN_BLOCK = 1 << 22
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
        except MoeconvError as error:
            checks.append(
                failed("structure", check.__name__.removeprefix("check").strip("_"), str(error))
            )
    return checks


def _files(subject: Subject) -> Check:
    """Size and SHA-256 of every file against the manifest, and no file that it does not name."""
    wrong = []
    for name, record in subject.manifest.files.items():
        path = subject.out / name
        if not path.is_file():
            wrong.append(f"{name} (missing)")
        elif path.stat().st_size != record.size:
            wrong.append(f"{name} (size)")
        elif sha256(subject.out, name) != record.sha256:
            wrong.append(f"{name} (sha256)")
    known = {*subject.manifest.files, MANIFEST_NAME, *KNOWN}
    try:
        extra = sorted({p.name for p in subject.out.iterdir()} - known)
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


def sha256(folder: Path, name: str, *, links: bool = True) -> str:
    """SHA-256 of a file of a folder; `links` as in `open_inside`.

    Raises:
        OutputError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_inside(folder, name, links=links) as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)
    except OSError as error:
        raise OutputError(f"{folder / name} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _tensors(subject: Subject) -> Check:
    """Every file's header, and no tensor in two files."""
    names = list(subject.tensors)
    listed = sum(1 for n in subject.manifest.files if n.endswith(".safetensors"))
    found = {stored.file.name for stored in subject.tensors.values()}
    if len(found) != listed:
        return failed(
            "structure", "tensors", f"{len(found)} of {listed} safetensors files hold tensors"
        )
    return passed("structure", "tensors", f"{len(names)} tensors in {len(found)} files, no gaps")


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
    listed = read_object(path).get("weight_map")
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
    wrong = [name for name, stored in subject.tensors.items() if not _is_finite(stored)]
    if wrong:
        return failed("structure", "finite", f"{len(wrong)} tensors hold NaN or Inf", tensors=wrong)
    return passed("structure", "finite", "all values are finite")


def _is_finite(stored: Stored) -> bool:
    count = stored.spec.nbytes // DTYPES[stored.spec.dtype].itemsize
    if not count:
        return True
    bits = np.memmap(
        stored.file,
        dtype=f"u{DTYPES[stored.spec.dtype].itemsize}",
        mode="r",
        offset=stored.offset,
        shape=(count,),
    )
    mask = bits.dtype.type(_EXPONENT[stored.spec.dtype])
    return not any(
        bool(((bits[i : i + _SCAN_BLOCK] & mask) == mask).any())
        for i in range(0, count, _SCAN_BLOCK)
    )


def _config(subject: Subject) -> Check:
    """config.json against what the described model should have, key by key."""
    expected = model_config(subject.family, subject.model, subject.manifest.dtype, subject.options)
    actual = subject.config
    wrong = sorted(k for k in set(expected) | set(actual) if expected.get(k) != actual.get(k))
    if wrong:
        return failed(
            "structure",
            "config",
            f"config.json differs from the described model in: {', '.join(wrong)}",
            metrics={k: [expected.get(k), actual.get(k)] for k in wrong if k in actual},
        )
    return passed(
        "structure", "config", f"{len(expected)} keys of config.json are the described model's"
    )


def _transformers(subject: Subject) -> Check:
    """Names and shapes against the architecture that transformers builds on the meta device."""
    missing = [p for p in ("torch", "transformers") if importlib.util.find_spec(p) is None]
    if missing:
        return skipped(
            "structure", "transformers", f"{' and '.join(missing)} not installed (moeconv[verify])"
        )
    _ = subject.config  # says itself what is wrong with the file
    try:
        wanted = _architecture(subject.out)
    except Exception as error:  # whatever transformers raises, it cannot load the model
        return failed(
            "structure",
            "transformers",
            f"transformers cannot build a model from config.json: {first_line(error)}",
        )
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
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state: dict[str, Any] = revert_weight_conversion(model, model.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
