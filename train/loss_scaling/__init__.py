"""Dynamic loss scaling for unmodified MaxText, which has none: FP16 gradients that do not flush.

Only cotangents are scaled: by S where they enter at the loss, by 1/S in fp32 where they leave at
each parameter. S is a power of two, so this rounds nothing, and loss, metrics, clipping, Adam and
decay see true units. A step whose gradients are not finite is left out and halves S. S and its
counters live in the optimizer's state, so that MaxText saves and restores them.
"""

from moeconv_train.loss_scaling.optimizer import LossScaleState, with_loss_scale
from moeconv_train.loss_scaling.seam import install
from moeconv_train.loss_scaling.settings import LossScaleSettings, check_config

__all__ = [
    "LossScaleSettings",
    "LossScaleState",
    "check_config",
    "install",
    "with_loss_scale",
]
