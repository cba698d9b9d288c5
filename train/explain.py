"""What MaxText and JAX raise, said in one sentence with its exit code."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from moeconv_train import run_dir
from moeconv_train.words import first_line

from moeconv.arch.sidecar import METRICS_NAME
from moeconv.errors import MoeconvError, TrainingError


@contextlib.contextmanager
def explained(log: Path, directory: Path) -> Iterator[None]:
    """Around a run: the log keeps the exception's own words."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except MoeconvError as error:
        if type(error) is MoeconvError:  # loss scaling gave up
            raise TrainingError(f"{directory}: {error}") from error
        raise
    except SystemExit as error:
        if error.code != 1:  # metric_logger.py `_maybe_abort_after_write_metrics`
            raise TrainingError(f"{directory}: MaxText ended the process; see {log}") from None
        step = run_dir.saved_step(directory)
        last = "nothing was saved" if step is None else f"the last checkpoint is of step {step + 1}"
        raise TrainingError(
            f"{directory}: the loss is no number any more (see {METRICS_NAME} for how it came), so "
            f"the run was ended; {last}. Lower learning_rate, or see docs/fp16.md for FP16"
        ) from None
    except Exception as error:
        logging.exception("the run failed")
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TrainingError(
                f"{directory}: the GPU's memory is too small for this run; `moeconv train … "
                "--check` names settings that fit, docs/memory.md lists them"
            ) from error
        raise TrainingError(
            f"{directory}: {type(error).__name__}: {first_line(error)}; see {log}"
        ) from error
