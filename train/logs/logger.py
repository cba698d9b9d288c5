"""Where our metrics go into MaxText 0.2.5: around two methods of its MetricLogger.

MaxText logs each batch of an evaluation as a step of its own, from 0: that truncates
`metrics_file` (`write_metrics_locally` at step 0) and makes W&B drop what follows, as its steps may
only grow. These go to the log only; the evaluation's mean is logged everywhere.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from moeconv_train.logs.metrics import MetricsFile, eval_line, train_line
from moeconv_train.logs.progress import Progress

from moeconv.errors import UnsupportedError

_SAYS = {
    "__init__": ("self._eval_loop_start = None", "wandb.init("),
    "write_metrics": ("self.log_metrics(metrics, step, metric_type)", "metric_type == "),
    "buffer_and_write_metrics": (
        "self._finalize_eval_metrics(step)",
        "self._flush_one_buffered_entry(self.buffered_metrics.pop(0))",
        "self._pending_eval_step_count > 0",
    ),
    "_flush_one_buffered_entry": ('metric_type="running_eval"',),
    "_finalize_eval_metrics": ('train_step, metric_type="eval"',),
    "mark_eval_loop_start": ("self._eval_loop_start = datetime.datetime.now()",),
}


class Recorder(Protocol):
    """What takes a run's metrics."""

    def begin(self, start_step: int) -> None:
        """MaxText has restored its state, if there was one."""

    def train(self, scalars: Any, step: int, paused: float, late: bool = False) -> None:
        """A step's metrics, after which `paused` seconds went into an evaluation.

        `late`: They were there before now, nobody knows since when.
        """

    def evaluation(self, scalars: Any, step: int) -> None:
        """The means of a whole evaluation."""


class Records:
    """metrics.jsonl and the progress line."""

    def __init__(self, open_file: Callable[[int], MetricsFile], progress: Progress) -> None:
        self._open = open_file
        self._paused: float | None = None
        self.progress = progress
        self.file: MetricsFile | None = None
        self.start_step = 0
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self.completed = 0

    def begin(self, start_step: int) -> None:
        """Opens the file where the restored state is."""
        self.start_step = self.completed = self.progress.completed = start_step
        self.file = self._open(start_step)

    def train(self, scalars: Any, step: int, paused: float, late: bool = False) -> None:
        """One line, and progress."""
        assert self.file is not None
        # Reading the loss waits for the device.
        float(scalars["learning/lm_loss"])
        seconds = self.progress.lap(late)
        line = train_line(scalars, step, self.file.tokens, seconds)
        tokens = (line.tokens or 0) - self.file.tokens
        self.file.tokens += tokens
        self.file.write(line)
        self.loss, self.completed = line.loss, line.step
        self._paused = paused or None
        self.progress.step(line, tokens)

    def evaluation(self, scalars: Any, step: int) -> None:
        """One line."""
        assert self.file is not None
        line = eval_line(scalars, step, self.file.tokens, self._paused)
        self.eval_loss = line.loss
        self.file.write(line)
        self.progress.evaluation(line)

    def close(self) -> None:
        """No more metrics."""
        self.progress.close()
        if self.file is not None:
            self.file.close()


@contextlib.contextmanager
def install(recorder: Recorder) -> Iterator[None]:
    """While this is open, MaxText's metrics also go to `recorder`, and evaluations harm no log."""
    from maxtext.common.metric_logger import MetricLogger

    _check(MetricLogger)
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
            self.log_metrics(metrics, step, metric_type)
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

    MetricLogger.__init__, MetricLogger.write_metrics = __init__, write_metrics
    MetricLogger.buffer_and_write_metrics = buffer_and_write_metrics
    try:
        yield
    finally:
        MetricLogger.__init__, MetricLogger.write_metrics = init, write
        MetricLogger.buffer_and_write_metrics = buffer


def _is_there(metrics: Any) -> bool:
    """Whether the device has finished a step: a save or an evaluation has waited for it."""
    is_ready = getattr(metrics["scalar"]["learning/lm_loss"], "is_ready", None)
    return is_ready is None or bool(is_ready())


def _check(logger: Any) -> None:
    """Refuses a MaxText whose logger works in another way."""
    for name, sentences in _SAYS.items():
        source = inspect.getsource(inspect.unwrap(getattr(logger, name)))
        if not all(sentence in source for sentence in sentences):
            raise UnsupportedError(
                f"MaxText {importlib.metadata.version('maxtext')} has another MetricLogger.{name} "
                "than 0.2.5: its metrics cannot be kept; install maxtext==0.2.5."
            )
