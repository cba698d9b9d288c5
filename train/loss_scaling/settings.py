"""How the loss is scaled, and which settings of MaxText do not go with FP16."""

import math
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moeconv.errors import ConfigError

Mode = Literal["dynamic", "static", "off"]


class LossScaleSettings(BaseModel):
    """Every number but the counts is a power of two, so that scaling rounds nothing.

    The defaults are those of PyTorch's GradScaler with half its initial scale. With the loss a mean
    over a batch's tokens, 2^10 to 2^18 serve equally well, and growth finds more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Mode | None = Field(None, description="None: dynamic for dtype float16, else off.")
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


def hazards(config: Any) -> list[str]:
    """What can overflow in an FP16 forward pass, where no loss scale helps: one sentence each.

    RMSNorm, the router's softmax and, by default, the softmax of the loss and the weighted sum over
    experts are in fp32 in MaxText (normalizations.py; moe.py `get_topk`; cast_logits_to_fp32;
    float32_weight_sum). Attention is not: attention_op.py `compute_local_attention` multiplies the
    values by weights that are not normalised yet, and the sum over keys is rounded to `dtype`.
    """
    if np.dtype(config.dtype) != np.float16:
        return []
    found = []
    if config.attention == "dot_product" and not config.float32_logits:
        found.append(
            "float32_logits: false adds up to max_target_length unnormalised attention weights "
            "times values in fp16, which ends at 65504; set it to true."
        )
    if config.num_experts > 1 and not config.float32_gate_logits:
        found.append(
            "float32_gate_logits: false rounds the router's logits to 11 bits, so near ties choose "
            "other experts; set it to true, which costs nothing."
        )
    if config.num_experts > 1 and not config.float32_weight_sum:
        found.append("float32_weight_sum: false adds up experts in fp16; set it to true.")
    if not config.cast_logits_to_fp32:
        found.append("cast_logits_to_fp32: false computes the loss in fp16; set it to true.")
    return found
