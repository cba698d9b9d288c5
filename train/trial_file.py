"""`trial.json`: what a run's first session found about its patches, and which it kept."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from moeconv.errors import ConfigError
from moeconv.untrusted import strict_json
from moeconv.untrusted.files import open_inside

FILE = "trial.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gradient(_Part):
    """One parameter's on one side; None for what is no number.

    Attributes:
        norm: In fp32.
        distance: From it, relative to that norm.
        cosine: Of the angle to it.
    """

    norm: float
    distance: float | None
    cosine: float | None


class Side(_Part):
    """One side's steps: `skipped` until a loss scale fitted, `overflows` of those timed."""

    seconds: list[float]
    losses: list[float | None]
    skipped: int
    overflows: int
    distance: float | None = None
    gradients: dict[str, Gradient] = {}


class Trial(_Part):
    """The verdict and what it rests on."""

    chosen: dict[str, bool]
    reason: str
    device: str
    sides: dict[str, Side]

    def write(self, run_dir: Path) -> None:
        """Into the run's folder, whole or not at all."""
        part = run_dir / f"{FILE}.part"
        part.write_bytes(strict_json.dumps(self.model_dump()))
        part.replace(run_dir / FILE)


def chosen(run_dir: Path) -> dict[str, bool] | None:
    """The patches that the run's trial chose; None without one.

    Raises:
        ConfigError: The file is no trial's.
    """
    try:
        with open_inside(run_dir, FILE) as file:
            return Trial.model_validate(strict_json.loads(file.read())).chosen
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # pydantic's is a ValueError
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{run_dir / FILE}: is not what a trial writes ({reason}); delete it, and the recipe's "
            "patches count again"
        ) from None
