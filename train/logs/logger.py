"""Where our metrics go into MaxText 0.2.5: around two methods of its MetricLogger.

MaxText logs each batch of an evaluation as a step of its own, from 0: that truncates
`metrics_file` (`write_metrics_locally` at step 0), makes W&B drop what follows, as its steps may
only grow, and fills the log. Only the evaluation's mean is logged here.
"""

import contextlib
import datetime
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeconv_train import seams
from moeconv_train.logs.metrics import MetricsFile, eval_line, train_line
from moeconv_train.logs.progress import Progress


class Records:
    """metrics.jsonl and the progress line."""

    def __init__(self, run_dir: Path, progress: Progress) -> None:
        self._run_dir, self._progress = run_dir, progress
        self._paused: float | None = None
        self.file: MetricsFile | None = None
        self.start_step = 0
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self.completed = 0

    def begin(self, start_step: int) -> None:
        """Opens the file where the state is that MaxText has restored, if there was one."""
        self.start_step = self.completed = self._progress.completed = start_step
        self.file = MetricsFile(self._run_dir, start_step)

    def train(self, scalars: Any, step: int, paused: float, late: bool = False) -> None:
        """A step's metrics, after which `paused` seconds went into an evaluation.

        `late`: They were there before now, nobody knows since when.
        """
        assert self.file is not None
        # Reading the loss waits for the device.
        float(scalars["learning/lm_loss"])
        seconds = self._progress.lap(late)
        line = train_line(scalars, step, self.file.tokens, seconds)
        tokens = (line.tokens or 0) - self.file.tokens
        self.file.tokens += tokens
        self.file.write(line)
        self.completed = line.step
        if math.isfinite(line.loss):  # else loss scaling leaves the step out
            self.loss = line.loss
        self._paused = paused or None
        self._progress.step(line, tokens)

    def evaluation(self, scalars: Any, step: int) -> None:
        """The means of a whole evaluation."""
        assert self.file is not None
        line = eval_line(scalars, step, self.file.tokens, self._paused)
        self.eval_loss = line.loss
        self.file.write(line)
        self._progress.evaluation(line)

    def close(self) -> None:
        """No more metrics."""
        self._progress.close()
        if self.file is not None:
            self.file.close()


@contextlib.contextmanager
def install(recorder: Records) -> Iterator[None]:
    """While this is open, MaxText's metrics also go to `recorder`, and evaluations harm no log."""
    from maxtext.common.metric_logger import MetricLogger

    seams.check("common.metric_logger")
    init, write = MetricLogger.__init__, MetricLogger.write_metrics
    buffer = MetricLogger.buffer_and_write_metrics
    # The step that is logged next is on time only if MaxText logs it in the regular way: right
    # after dispatching the step behind it, which the device has not finished.
    on_time = False

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        init(self, *args, **kwargs)
        recorder.begin(self.start_step)

    @functools.wraps(write)
    def write_metrics(self: Any, metrics: Any, step: int, metric_type: str = "train") -> None:
        if metric_type == "running_eval":
            return
        if metrics and metric_type == "train":
            begun = self._eval_loop_start
            paused = (datetime.datetime.now() - begun).total_seconds() if begun else 0.0
            recorder.train(metrics["scalar"], step, paused, late=not on_time)
        elif metrics:
            recorder.evaluation(metrics["scalar"], step)
        write(self, metrics, step, metric_type)

    @functools.wraps(buffer)
    def buffer_and_write_metrics(
        self: Any, metrics: Any, step: int, step_time_delta: Any = None, is_training: bool = True
    ) -> None:
        nonlocal on_time
        on_time = is_training and not self._pending_eval_step_count and not _is_there(metrics)
        try:
            buffer(self, metrics, step, step_time_delta, is_training)
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
