"""`metrics.jsonl`: a line for each step and evaluation, once, also after a crash and a resume."""

import itertools
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeconv_train.data.records import write_bytes

from moeconv.arch.sidecar import METRICS_NAME, MetricsLine
from moeconv.errors import OutputError
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


class MetricsFile:
    """The file of a run, open for more.

    Steps are counted as completed: the first step's line has step 1.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        """Opens it at the checkpoint that is resumed.

        What a crashed run wrote beyond it, and lines that cannot be read, are left out; the file as
        it was is kept beside it, as `metrics.jsonl.1` and so on.

        Args:
            run_dir: The run's directory.
            start_step: Steps that the checkpoint holds; 0 for a new run.

        Raises:
            OutputError: The file cannot be read or written.
        """
        self.path = run_dir / METRICS_NAME
        try:
            before = files.read_inside(run_dir, METRICS_NAME)
        except FileNotFoundError:
            before = b""
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}; move it away") from None
        lines, damaged = _parse(before)
        kept = [line for line in lines if line.step <= start_step]
        text = "".join(map(_dump, kept)).encode()
        if before != text:
            names = (f"{METRICS_NAME}.{number}" for number in itertools.count(1))
            copy = next(name for name in names if not (run_dir / name).exists())
            write_bytes(run_dir / copy, before)
            write_bytes(self.path, text)
            logging.warning(
                f"{self.path}: begins anew at step {start_step}, without "
                f"{len(lines) + damaged - len(kept)} lines ({damaged} of them cannot be read); the "
                f"file as it was is {copy}"
            )
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


def read_metrics(run_dir: Path) -> list[MetricsLine]:
    """The lines of a run that can be read; none where there is no file."""
    try:
        return _parse(files.read_inside(run_dir, METRICS_NAME))[0]
    except FileNotFoundError:
        return []


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
