"""`trial.json`: what a run's first session measured of its patches, and which step it kept."""

import statistics
from collections.abc import Mapping
from pathlib import Path

from moeconv_train.data.records import write_bytes
from moeconv_train.words import first_line
from pydantic import BaseModel, ConfigDict

from moeconv.errors import ConfigError
from moeconv.untrusted import strict_json
from moeconv.untrusted.files import read_inside

FILE = "trial.json"
# How much farther from the truth than MaxText's a gradient may be: the whole one, and that of each
# parameter, where a few near ties of the router weigh more. Nothing nearer than fp16's own rounding
# is too far. A distance bounds the angle and the norm as well.
WHOLE, EACH, ROUNDING = 1.25, 2.0, 2.0**-10


class Side(BaseModel):
    """One way to compute a step.

    Attributes:
        skipped: Steps that were left out until a loss scale fitted.
        distance: Of the gradient from fp32's, relative to its norm; None if it is not finite.
        distances: The same of each parameter.
        seconds: Of each timed step.
        overflows: Timed steps that were left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    skipped: int
    distance: float | None
    distances: dict[str, float | None]
    seconds: list[float]
    overflows: int


class Trial(BaseModel):
    """The verdict and what it rests on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chosen: dict[str, bool]
    reason: str
    device: str
    stock: Side
    patched: Side | None = None

    def write(self, run_dir: Path) -> None:
        """Into the run's folder, whole or not at all."""
        write_bytes(run_dir / FILE, strict_json.dumps(self.model_dump()))


def judge(patches: Mapping[str, bool], stock: Side, patched: Side, device: str) -> Trial:
    """The patches are kept if nothing speaks against them."""
    far = [
        name
        for name, distance in patched.distances.items()
        if not _near(distance, stock.distances[name], EACH)
    ]
    ours, theirs = statistics.median(patched.seconds), statistics.median(stock.seconds)
    times = f"{ours:.3f} s a step against {theirs:.3f} s"
    against = None
    if far or not _near(patched.distance, stock.distance, WHOLE):
        against = f"the patched gradient is too far from fp32's ({', '.join(far[:3]) or 'in all'})"
    elif (patched.skipped, patched.overflows) != (stock.skipped, stock.overflows):
        against = "the patched step skips others"
    elif ours >= theirs:
        against = f"the patched one is not faster ({times})"
    reason = (
        f"MaxText's own step is kept: {against}"
        if against
        else f"the patches are kept: {times}, and the gradient is as near to fp32's"
    )
    chosen = dict.fromkeys(patches, against is None)
    return Trial(chosen=chosen, reason=reason, device=device, stock=stock, patched=patched)


def _near(ours: float | None, stock: float | None, factor: float) -> bool:
    """Whether our distance from the truth is hardly more than stock's."""
    return ours is not None and ours <= max(factor * (stock or 0.0), ROUNDING)


def chosen(run_dir: Path) -> dict[str, bool] | None:
    """The patches that the run's trial chose; None without one.

    Raises:
        ConfigError: The file is no trial's.
    """
    try:
        return Trial.model_validate(strict_json.loads(read_inside(run_dir, FILE))).chosen
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # pydantic's is a ValueError
        raise ConfigError(
            f"{run_dir / FILE}: is not what a trial writes ({first_line(error)}); delete it, and "
            "the recipe's patches count again"
        ) from None
