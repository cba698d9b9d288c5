"""What MaxText and JAX raise, said in one sentence with its exit code."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from moeconv_train import run_dir
from moeconv_train.preflight.target import DEFAULT_FRACTION, FRACTIONS, MEMORY_FRACTION
from moeconv_train.words import first_line

from moeconv.errors import MoeconvError, TrainingError
from moeconv.maxtext.sidecar import METRICS_NAME

# Memory that is not JAX's: the driver's, NCCL's (`Cuda failure 2 'out of memory'`), the handles and
# workspaces of cuBLAS and cuDNN.
_OUTSIDE = re.compile(
    r"CUDA_ERROR_OUT_OF_MEMORY|Cuda failure.*out of memory|ncclSystemError"
    r"|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
)


@contextlib.contextmanager
def explained(log: Path, directory: Path) -> Iterator[None]:
    """Around a run: the log keeps the exception's own words.

    Raises:
        TrainingError: In place of what MaxText and JAX raise.
    """
    try:
        yield
    except (KeyboardInterrupt, MoeconvError):
        raise
    except SystemExit as error:
        if error.code != 1:  # metric_logger.py `_maybe_abort_after_write_metrics`
            raise TrainingError(f"{directory}: MaxText ended the process; see {log}") from None
        step = run_dir.saved_step(directory)
        last = "nothing was saved" if step is None else f"the last checkpoint is of step {step + 1}"
        raise TrainingError(
            f"{directory}: the loss is no number any more (see {METRICS_NAME} for how it came), so "
            f"the run was ended; {last}. Begin a new run_name with a lower learning_rate; in FP16 "
            "the same command goes on with abort_on_nan_loss=false abort_on_inf_loss=false, which "
            "leaves such steps out"
        ) from None
    except Exception as error:
        logging.exception("the run failed")
        raise TrainingError(f"{directory}: {_sentence(error, log)}") from error


def _sentence(error: Exception, log: Path) -> str:
    if _OUTSIDE.search(str(error)):
        name = next(filter(os.environ.get, FRACTIONS), MEMORY_FRACTION)
        fraction = os.environ.get(name, DEFAULT_FRACTION)
        return (
            f"CUDA, NCCL or cuBLAS found no memory beside JAX's ({first_line(error)}); set "
            f"{name} lower than {fraction}, and look with nvidia-smi for other processes"
        )
    if "RESOURCE_EXHAUSTED" in str(error):
        return (
            "the GPU's memory is too small for this run; `moeconv train … --check` names settings "
            "that fit, docs/memory.md lists them"
        )
    return f"{type(error).__name__}: {first_line(error)}; see {log}"
