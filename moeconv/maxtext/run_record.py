"""The record of a run's training, carried into the manifest so that OUT needs no run.

The run's directory may be gone when a model is published, so `moeconv convert` takes over what a
model card needs: the sidecar's facts, the settings that describe a training, and the losses up to
the step that is converted. What is not known is absent.
"""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from moeconv.errors import NotACheckpointError
from moeconv.maxtext.sidecar import METRICS_NAME, MetricsLine, RunFacts, RunSidecar
from moeconv.orbax.locate import Step, read_beside
from moeconv.untrusted import strict_json

# Settings that a card may name; nothing else of a config is taken over, so no path and no name.
SETTINGS = (
    "hardware",
    "ici_data_parallelism",
    "ici_fsdp_parallelism",
    "steps",
    "global_batch_size_to_train_on",
    "per_device_batch_size",
    "gradient_accumulation_steps",
    "max_target_length",
    "dtype",
    "weight_dtype",
    "grad_dtype",
    "opt_type",
    "learning_rate",
    "lr_schedule_type",
    "warmup_steps_fraction",
    "learning_rate_final_fraction",
    "adam_b1",
    "adam_b2",
    "adam_eps",
    "adam_weight_decay",
    "gradient_clipping_threshold",
    "load_balance_loss_weight",
    "capacity_factor",
    "remat_policy",
)
# Points kept of a curve.
CURVE_POINTS = 200
_LONGEST_LINE = 64 * 1024
_METRICS_LIMIT = 64 * 2**20  # some 300,000 steps


class Measured(BaseModel):
    """A loss, after so many steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    loss: float
    tokens: int | None = None


class RunRecord(BaseModel):
    """The record's schema.

    Attributes:
        maxtext_version: The release that trained.
        facts: Those of the sidecar.
        settings: MaxText config keys of `SETTINGS`.
        train: Last training loss up to the converted step.
        evaluation: Last evaluation loss up to it.
        train_curve: Training loss, each point the mean of a stretch of steps, at its last step.
        evaluation_curve: Every evaluation, or the last of each stretch.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    maxtext_version: str | None = None
    facts: RunFacts | None = None
    settings: dict[str, bool | int | float | str] = {}
    train: Measured | None = None
    evaluation: Measured | None = None
    train_curve: list[Measured] = []
    evaluation_curve: list[Measured] = []


def read_run(step: Step, sidecar: RunSidecar | None) -> tuple[RunRecord | None, list[str]]:
    """The record of a checkpoint's run; None when there is nothing to record.

    Returns:
        The record, and warnings.
    """
    lines, warnings = _metrics(step)
    if sidecar is None and not lines:
        return None, warnings
    train = [m for m in lines if m.kind == "train"]
    evaluation = [m for m in lines if m.kind == "eval"]
    return RunRecord(
        maxtext_version=sidecar.maxtext_version if sidecar else None,
        facts=_facts(sidecar),
        settings=_settings(sidecar.config) if sidecar else {},
        train=_measured(train[-1:]),
        evaluation=_measured(evaluation[-1:]),
        train_curve=[_mean(part) for part in _stretches(train)],
        evaluation_curve=[_mean(part[-1:]) for part in _stretches(evaluation)],
    ), warnings


def _facts(sidecar: RunSidecar | None) -> RunFacts | None:
    """The facts that have a name; what a newer trainer added is not published unseen."""
    if sidecar is None or sidecar.run is None:
        return None
    return RunFacts(**{name: getattr(sidecar.run, name) for name in RunFacts.model_fields})


def _settings(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    found = {key: config[key] for key in SETTINGS if key in config}
    return {k: v for k, v in found.items() if isinstance(v, bool | int | float | str) and v != ""}


class _Point(NamedTuple):
    """What is kept of a line; a run may have a million."""

    kind: str
    step: int
    loss: float
    tokens: int | None


def _point(text: bytes) -> _Point | None:
    """A line's loss; None where there is none that is a number."""
    if len(text) > _LONGEST_LINE:
        return None
    try:
        line = MetricsLine.model_validate(strict_json.loads(text))
    except ValueError:  # pydantic's is one
        return None
    return (
        _Point(line.kind, line.step, line.loss, line.tokens) if math.isfinite(line.loss) else None
    )


def _metrics(step: Step) -> tuple[list[_Point], list[str]]:
    """The run's metrics up to the step, in its order; a step measured twice counts as at last."""
    raw = None
    for folder in step.beside:
        try:
            raw = read_beside(folder, METRICS_NAME, limit=_METRICS_LIMIT)
        except NotACheckpointError as error:
            return [], [f"{error}; the manifest has no losses"]
        if raw is not None:
            break
    found: dict[tuple[str, int], _Point] = {}
    damaged = 0
    for text in io.BytesIO(raw or b""):
        point = _point(text)
        if point is None:
            damaged += 1
        # Step N of a checkpoint is the number of its last training step, counted from 0.
        elif step.number is None or point.step <= step.number + 1:
            found[point.kind, point.step] = point
    warnings = []
    if damaged:
        warnings.append(
            f"{damaged} lines of the run's {METRICS_NAME} cannot be read (a line is cut off where "
            "a run was killed); they are left out of the losses in the manifest"
        )
    return sorted(found.values(), key=lambda line: line.step), warnings


def _measured(lines: Sequence[_Point]) -> Measured | None:
    return _mean(lines) if lines else None


def _stretches(lines: Sequence[_Point]) -> list[Sequence[_Point]]:
    """Up to `CURVE_POINTS` stretches of lines, of about the same length."""
    count = min(CURVE_POINTS, len(lines))
    ends = [len(lines) * n // count for n in range(count + 1)] if count else []
    return [lines[a:b] for a, b in itertools.pairwise(ends)]


def _mean(lines: Sequence[_Point]) -> Measured:
    loss = sum(line.loss for line in lines) / len(lines)
    if not math.isfinite(loss):  # the sum is beyond a double, the mean is not
        loss = sum(line.loss / len(lines) for line in lines)
    return Measured(step=lines[-1].step, loss=float(f"{loss:.6g}"), tokens=lines[-1].tokens)
