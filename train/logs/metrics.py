"""`metrics.jsonl`: a line for each step and evaluation, once, also after a crash and a resume.

MaxText 0.2.5 logs each batch of an evaluation as a step of its own, from 0: that truncates its own
`metrics_file` (`write_metrics_locally` at step 0), makes W&B drop what follows, as its steps may
only grow, and fills the log. Only the evaluation's mean is logged here.
"""

import contextlib
import datetime
import functools
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from moeconv_train import seams
from moeconv_train.data.records import write_bytes
from moeconv_train.logs.progress import Progress

from moeconv.errors import OutputError, TrainingError
from moeconv.maxtext.sidecar import METRICS_NAME, MetricsLine
from moeconv.untrusted import files, strict_json

# A line's fields that MaxText, or loss scaling, has by another name.
_FIELDS = {
    "total_loss": "loss",
    "learning_rate": "current_learning_rate",
    "load_balance_loss": "moe_lb_loss",
    "grad_norm": "raw_grad_norm",
    "loss_scale": "loss_scale",
    "skipped_steps": "skipped_steps",
}


class Metrics:
    """The file of a run and the progress line.

    Steps are counted as completed: the first step's line has step 1.

    Attributes:
        start_step: Steps that the checkpoint holds which is resumed; 0 for a new run.
        completed: Steps that are done.
        tokens: Targets of all of them.
        loss: Of the last step that was not left out.
        eval_loss: Of the last evaluation.
    """

    def __init__(self, run_dir: Path, progress: Progress, patience: int = 50) -> None:
        self.path, self._progress, self._patience = run_dir / METRICS_NAME, progress, patience
        self._file: IO[str] | None = None
        self._paused, self._skips = 0.0, 0
        self.start_step = self.completed = self.tokens = 0
        self.loss: float | None = None
        self.eval_loss: float | None = None

    def begin(self, start_step: int) -> None:
        """Opens the file where the state is that MaxText has restored, if there was one.

        What a crashed run wrote beyond it, and lines that cannot be read, are left out; the file as
        it was is kept beside it, as `metrics.jsonl.1` and so on.

        Raises:
            OutputError: The file cannot be read or written.
        """
        self.start_step = self.completed = start_step
        folder = self.path.parent
        try:
            before = files.read_inside(folder, METRICS_NAME)
        except FileNotFoundError:
            before = b""
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}; move it away") from None
        lines, damaged = _parse(before)
        kept = [line for line in lines if line.step <= start_step]
        text = "".join(map(_dump, kept)).encode()
        if before != text:
            names = (f"{METRICS_NAME}.{number}" for number in itertools.count(1))
            copy = next(name for name in names if not (folder / name).exists())
            write_bytes(folder / copy, before)
            write_bytes(self.path, text)
            logging.warning(
                f"{self.path}: begins anew at step {start_step}, without "
                f"{len(lines) + damaged - len(kept)} lines ({damaged} of them cannot be read); the "
                f"file as it was is {copy}"
            )
        self.tokens = max((line.tokens or 0 for line in kept), default=0)
        self._file = self.path.open("a", encoding="utf-8")

    def train(self, scalars: Any, step: int, paused: float, late: bool = False) -> None:
        """A step's metrics, after which `paused` seconds went into an evaluation.

        `late`: They were there before now, nobody knows since when.

        Raises:
            TrainingError: Loss scaling has left out nothing but steps for some time.
        """
        float(scalars["learning/lm_loss"])  # waits for the device
        line = train_line(scalars, step, self.tokens, self._progress.lap(late))
        tokens, self.tokens = (line.tokens or 0) - self.tokens, line.tokens or 0
        self._write(line)
        self.completed, self._paused = line.step, paused
        if math.isfinite(line.loss):  # else loss scaling leaves the step out
            self.loss = line.loss
        self._progress.step(line, tokens)
        self._skips = self._skips + 1 if scalars.get("learning/overflow", 0) else 0
        if self._skips >= self._patience:
            raise TrainingError(
                f"{self.path.parent}: the loss or the gradients of {self._skips} steps in a row "
                f"were not finite, in the end at a loss scale of {line.loss_scale:g}: FP16 itself "
                "overflows in this model (see docs/fp16.md); begin a new run_name with a lower "
                "learning_rate or dtype=float32"
            )

    def evaluation(self, scalars: Any, step: int) -> None:
        """The means of a whole evaluation after step `step` (from 0)."""
        self.eval_loss = float(scalars["eval/avg_loss"])
        line = MetricsLine(
            kind="eval",
            step=step + 1,
            loss=self.eval_loss,
            tokens=self.tokens,
            seconds=round(self._paused, 6) or None,
        )
        self._write(line)
        self._progress.evaluation(line)

    def _write(self, line: MetricsLine) -> None:
        """Adds a line, whole at once; one whose loss is no number has no place in JSON."""
        assert self._file is not None
        if math.isfinite(line.loss):
            self._file.write(_dump(line))
            self._file.flush()

    def close(self) -> None:
        """No more metrics."""
        if self._file is not None:
            self._file.close()


def train_line(
    scalars: Mapping[str, Any], step: int, tokens: int, seconds: float | None
) -> MetricsLine:
    """A line of what MaxText measured in one step.

    Args:
        scalars: MaxText's.
        step: The step's number, from 0.
        tokens: Targets of all steps before.
        seconds: From the step before's result to this one's; None where that is not known.
            MaxText's own are from one dispatch to the next, which says little where the device
            lags behind, and has saves and evaluations in it.
    """
    weights = int(float(scalars["learning/total_weights"]))
    found = {
        name: float(scalars[f"learning/{key}"])
        for name, key in _FIELDS.items()
        if f"learning/{key}" in scalars
    }
    return MetricsLine(
        kind="train",
        step=step + 1,
        loss=float(scalars["learning/lm_loss"]),
        tokens=tokens + weights,
        skipped_steps=int(found.pop("skipped_steps")) if "skipped_steps" in found else None,
        seconds=None if seconds is None else round(seconds, 6),
        tokens_per_second=round(weights / seconds, 3) if seconds else None,
        **{name: value for name, value in found.items() if math.isfinite(value)},
    )


def _parse(content: bytes) -> tuple[list[MetricsLine], int]:
    """The lines, and how many cannot be read (the last one where a run was killed, say)."""
    lines, damaged = [], 0
    for text in content.splitlines():
        try:
            lines.append(MetricsLine.model_validate(strict_json.loads(text)))
        except ValueError:  # pydantic's too
            damaged += 1
    return lines, damaged


def _dump(line: MetricsLine) -> str:
    return json.dumps(line.model_dump(exclude_none=True)) + "\n"


@contextlib.contextmanager
def install(metrics: Metrics) -> Iterator[None]:
    """While this is open, MaxText's metrics also go to `metrics`, and evaluations harm no log."""
    from maxtext.common.metric_logger import MetricLogger

    init, write = MetricLogger.__init__, MetricLogger.write_metrics
    buffer = MetricLogger.buffer_and_write_metrics
    # The step that is logged next is on time only if MaxText logs it in the regular way: right
    # after dispatching the step behind it, which the device has not finished.
    on_time = False

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        init(self, *args, **kwargs)
        metrics.begin(self.start_step)

    @functools.wraps(write)
    def write_metrics(self: Any, found: Any, step: int, metric_type: str = "train") -> None:
        if metric_type == "running_eval":
            return
        if found and metric_type == "train":
            begun = self._eval_loop_start
            paused = (datetime.datetime.now() - begun).total_seconds() if begun else 0.0
            metrics.train(found["scalar"], step, paused, late=not on_time)
        elif found:
            metrics.evaluation(found["scalar"], step)
        write(self, found, step, metric_type)

    @functools.wraps(buffer)
    def buffer_and_write_metrics(
        self: Any, found: Any, step: int, step_time_delta: Any = None, is_training: bool = True
    ) -> None:
        nonlocal on_time
        on_time = is_training and not self._pending_eval_step_count and not _is_there(found)
        try:
            buffer(self, found, step, step_time_delta, is_training)
        finally:
            on_time = False

    with seams.replaced(
        MetricLogger,
        __init__=__init__,
        write_metrics=write_metrics,
        buffer_and_write_metrics=buffer_and_write_metrics,
    ):
        yield


def _is_there(metrics: Any) -> bool:
    """Whether the device has finished a step: a save or an evaluation has waited for it."""
    is_ready = getattr(metrics["scalar"]["learning/lm_loss"], "is_ready", None)
    return is_ready is None or bool(is_ready())
