"""What the trainer changes in MaxText while it traces the step: the compiled step has it too."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def trainer(
    *, loss_scale: Mapping[str, Any] | None = None, fp16_head: bool = True
) -> Iterator[None]:
    """Loss scaling and the FP16 head, as the launcher installs them.

    Args:
        loss_scale: Fields of `LossScaleSettings`; None for its defaults.
        fp16_head: Whether the tied head is computed in FP16.
    """
    from moeconv_train import fp16_head as head
    from moeconv_train import loss_scaling

    with contextlib.ExitStack() as stack:
        if fp16_head:
            stack.enter_context(head.install())
        settings = loss_scaling.LossScaleSettings.model_validate(dict(loss_scale or {}))
        stack.enter_context(loss_scaling.install(settings))
        yield


@contextlib.contextmanager
def stock() -> Iterator[None]:
    """Unmodified MaxText."""
    yield
