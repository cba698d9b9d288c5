"""How the loss is scaled, and which settings of MaxText do not go with FP16."""

import math
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from moeconv.errors import ConfigError

Mode = Literal["dynamic", "static", "off"]


class LossScaleSettings(BaseModel):
    """Every number but the counts is a power of two, so that scaling rounds nothing.

    The defaults are those of PyTorch's GradScaler with half its initial scale. With the loss a mean
    over a batch's tokens, 2^10 to 2^18 serve equally well, and growth finds more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Annotated[Mode | None, BeforeValidator(lambda told: "off" if told is False else told)] = (
        Field(None, description="None: dynamic for dtype float16, else off.")
    )  # YAML reads the word off as false
    initial: float = Field(2.0**15, description="S of the first step.")
    growth_interval: int = Field(2000, ge=1, description="Good steps in a row before S grows.")
    growth_factor: float = Field(2.0, ge=1)
    backoff_factor: float = Field(0.5, lt=1)
    min: float = 1.0
    max: float = 2.0**24
    patience: int = Field(50, ge=1, description="Skipped steps in a row that end the run.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("initial", "growth_factor", "backoff_factor", "min", "max"):
            value = getattr(self, name)
            if not (math.isfinite(value) and math.frexp(value)[0] == 0.5):
                raise ValueError(f"{name} must be a power of two, not {value:g}")
        if not self.min <= self.initial <= self.max:
            raise ValueError(f"initial must lie between min and max, {self.min:g} and {self.max:g}")
        return self

    def mode_for(self, dtype: Any) -> Mode:
        """The mode for a run whose MaxText `dtype` is this."""
        return self.mode or ("dynamic" if np.dtype(dtype) == np.float16 else "off")


def check_config(config: Any) -> None:
    """Refuses settings of MaxText under which scaled gradients would be lost or wrong."""
    for key in ("weight_dtype", "grad_dtype"):
        if np.dtype(getattr(config, key)) == np.float16:
            raise ConfigError(
                f"{key}: float16 flushes the gradients that loss scaling saves; use float32."
            )
    for key in (
        "optimizer_memory_host_offload",
        "parameter_memory_host_offload",
        "enable_diloco",
        "quantization",
        "compiled_trainstep_file",
    ):
        if value := getattr(config, key):
            raise ConfigError(
                f"{key}: {value} does not go with loss scaling; unset it, or set the loss scale's "
                "mode to off."
            )
