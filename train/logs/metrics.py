"""`metrics.jsonl`: a line for each step and evaluation, once, also after a crash and a resume."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeconv_train.data.records import write_bytes
from pydantic import ValidationError

from moeconv.arch.sidecar import METRICS_NAME, MetricsLine


class MetricsFile:
    """The file of a run, open for more.

    Steps are counted as completed: the first step's line has step 1.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        """Opens it, and drops what a crashed run wrote beyond the checkpoint that is resumed.

        Args:
            run_dir: The run's directory.
            start_step: Steps that the checkpoint holds; 0 for a new run.
        """
        self.path = run_dir / METRICS_NAME
        kept = [line for line in read_metrics(run_dir) if line.step <= start_step]
        text = "".join(_dump(line) for line in kept)
        if not self.path.is_file() or self.path.read_text(encoding="utf-8") != text:
            write_bytes(self.path, text.encode())
        trained = [line.tokens for line in kept if line.kind == "train" and line.tokens]
        self.tokens = trained[-1] if trained else 0
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: MetricsLine) -> None:
        """Adds a line, whole at once; one whose loss is no number has no place in JSON."""
        if math.isfinite(line.loss):
            self._file.write(_dump(line))
            self._file.flush()

    def close(self) -> None:
        """No more lines."""
        self._file.close()


def train_line(
    scalars: Mapping[str, Any], step: int, tokens: int, seconds: float | None
) -> MetricsLine:
    """A line of what MaxText's train step returned.

    Args:
        scalars: MaxText's `metrics["scalar"]`.
        step: The step's number, from 0.
        tokens: Targets of all steps before.
        seconds: From the step before's result to this one's; None where that is not known.
            MaxText's own are from one dispatch to the next, which says little where the device
            lags behind, and has saves and evaluations in it.
    """
    weights = int(float(scalars["learning/total_weights"]))
    scale = scalars.get("learning/loss_scale")
    skipped = scalars.get("learning/skipped_steps")
    extra = {
        name: _finite(scalars.get(f"learning/{key}"))
        for name, key in (("load_balance_loss", "moe_lb_loss"), ("grad_norm", "raw_grad_norm"))
    }
    return MetricsLine(
        kind="train",
        step=step + 1,
        loss=float(scalars["learning/lm_loss"]),
        tokens=tokens + weights,
        total_loss=_finite(scalars["learning/loss"]),
        learning_rate=_finite(scalars.get("learning/current_learning_rate")),
        loss_scale=None if scale is None else float(scale),
        skipped_steps=None if skipped is None else int(skipped),
        seconds=None if seconds is None else round(seconds, 6),
        tokens_per_second=round(weights / seconds, 3) if seconds else None,
        **{name: value for name, value in extra.items() if value is not None},
    )


def eval_line(
    scalars: Mapping[str, Any], step: int, tokens: int, seconds: float | None
) -> MetricsLine:
    """A line of one whole evaluation after step `step` (from 0)."""
    return MetricsLine(
        kind="eval",
        step=step + 1,
        loss=float(scalars["eval/avg_loss"]),
        tokens=tokens,
        seconds=None if seconds is None else round(seconds, 6),
    )


def read_metrics(run_dir: Path) -> Iterator[MetricsLine]:
    """The lines of a run, up to the first that was not written whole."""
    path = run_dir / METRICS_NAME
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            yield MetricsLine.model_validate_json(text)
        except ValidationError:
            return


def _dump(line: MetricsLine) -> str:
    return json.dumps(line.model_dump(exclude_none=True)) + "\n"


def _finite(value: Any) -> float | None:
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None
