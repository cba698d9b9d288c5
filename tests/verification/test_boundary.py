"""Whose fault it is: what OUT raises is a failed check, trouble of the machine is no verdict."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from outputs_lab import admit

from moeconv.errors import (
    ConfigError,
    MemoryLimitError,
    MissingPackageError,
    MoeconvError,
    StorageError,
    TensorError,
    TokenizerError,
)
from moeconv.untrusted.files import UnsafeFileError
from moeconv.verification.boundary import MachineError, blaming
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import CandidateError, Status
from moeconv.verification.levels import Level
from moeconv.verification.run import verify
from moeconv.verification.settings import VerifyOptions


class Panic(BaseException):
    """As pyo3 raises them."""


def caused(error: MoeconvError, cause: Exception) -> MoeconvError:
    """An error that a reader made of another one."""
    error.__context__ = cause
    return error


CANDIDATE = [
    KeyError("model_type"),
    RecursionError("maximum recursion depth exceeded"),
    ImportError("config.json wants bitsandbytes"),
    Panic("rust"),
    OSError(errno.ENOENT, "No such file", "/x/model.safetensors"),
    UnsafeFileError(Path("/x/config.json"), "is a link that leads out of /x"),
    TensorError("a header"),
    TokenizerError("a tokenizer"),
    caused(TensorError("not there"), FileNotFoundError(errno.ENOENT, "No such file")),
]
MACHINE = [
    (OSError(errno.EIO, "Input/output error", "/x/config.json"), MachineError),
    (PermissionError(errno.EACCES, "Permission denied", "/x/config.json"), MachineError),
    (caused(TensorError("no file"), OSError(errno.EMFILE, "Too many open files")), MachineError),
    (MemoryError(), MemoryLimitError),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryLimitError),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes"), MemoryLimitError),
    (MissingPackageError("torch"), MissingPackageError),
    (StorageError("the store"), StorageError),
    (KeyboardInterrupt(), KeyboardInterrupt),
]


@pytest.mark.parametrize("problem", CANDIDATE, ids=repr)
def test_what_the_candidate_raises_fails_a_check(problem):
    with pytest.raises(CandidateError) as found, blaming("the work is undone", check="files"):
        raise problem
    assert found.value.check == "files"
    assert str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(("problem", "kind"), MACHINE, ids=repr)
def test_what_the_machine_raises_is_no_verdict(problem, kind):
    with pytest.raises(kind) as found, blaming("the work is undone"):
        raise problem
    assert not isinstance(found.value, CandidateError)


def test_another_model_s_errors_are_not_the_candidate_s():
    what = "another model cannot be loaded"
    with pytest.raises(TensorError, match="cannot be loaded: boom"), blaming(what, TensorError):
        raise ValueError("boom")
    with pytest.raises(ConfigError, match="as it is"), blaming(what, TensorError):
        raise ConfigError("as it is")


@pytest.mark.maxtext
def test_more_experts_a_token_than_there_are(right, tmp_path):
    """The manifest is all that is known of this run: MaxText cannot build that either."""
    out = shutil.copytree(right, tmp_path / "out")
    manifest = json.loads((out / "moeconv_manifest.json").read_text())
    manifest["model"]["num_experts_per_tok"]["value"] = 9
    (out / "moeconv_manifest.json").write_text(json.dumps(manifest))
    (out / "config.json").write_text(json.dumps(Candidate.open(out).wanted_config))
    admit(out, "config.json")
    with pytest.raises(ConfigError, match="MaxText cannot") as found:
        verify(out, source=None, options=VerifyOptions(levels=[Level.LOGITS]))
    assert "\n" not in str(found.value)
    report = verify(out, source=None, options=VerifyOptions(levels=[Level.LAYERS]))
    (check,) = report.checks
    assert check.status is Status.FAIL and "transformers cannot run" in check.summary
