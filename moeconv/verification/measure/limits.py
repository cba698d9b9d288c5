"""The limits of every graded figure, in one table (docs/parity.md prints it), and how they apply.

In fp32 the two models differ by the order of sums only. A rounded output is allowed a multiple of
what rounding alone does to MaxText itself, which is measured in the same run (measure/rounding.py).
"""

import math
from dataclasses import dataclass

from moeconv.verification.checks import Status

# Multiples of the measured rounding that pass, and that are warned about.
PASS_ROUNDING, WARN_ROUNDING = 3.0, 10.0


@dataclass(frozen=True)
class Limit:
    """What a figure may be.

    Attributes:
        name: The figure.
        passing: Largest value that passes without any rounding.
        warning: Largest value that is a warning; above, the check fails.
        meaning: For people.
    """

    name: str
    passing: float
    warning: float
    meaning: str

    def grade(self, value: float, rounding: float = 0.0) -> Status:
        """The verdict on a value, given what rounding alone does; NaN and Inf fail."""
        if not math.isfinite(value):
            return Status.FAIL
        if value <= self.passing + PASS_ROUNDING * rounding:
            return Status.PASS
        if value <= self.warning + WARN_ROUNDING * rounding:
            return Status.WARN
        return Status.FAIL


KL = Limit(
    "KL",
    1e-6,
    1e-3,
    "KL divergence of the converted model's next-token distribution from MaxText's, in nats; the "
    "largest of all positions, and the mean",
)
LOGITS = Limit(
    "max |Δ| / max |logit|",
    1e-4,
    1e-2,
    "largest difference of a logit, as a share of the largest logit",
)
ROUTER = Limit(
    "router |Δ| / std",
    1e-3,
    3e-2,
    "largest difference of a router logit, in standard deviations of that layer's router logits",
)
HIDDEN = Limit(
    "hidden ‖Δ‖ / ‖x‖",
    1e-4,
    1e-3,
    "largest difference of a hidden vector, as a share of the mean length of those vectors",
)
LIMITS = (KL, LOGITS, ROUTER, HIDDEN)
