"""What the trainer changes in MaxText while it traces the step: the compiled step has it too."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def trainer(
    *,
    loss_scale: Mapping[str, Any] | None = None,
    fp16_head: bool = True,
    expert_tiles: bool = False,
    attention_blocks: bool = False,
) -> Iterator[None]:
    """Loss scaling and the FP16 head, as the launcher installs them, and what makes a step cheaper.

    Args:
        loss_scale: Fields of `LossScaleSettings`; None for its defaults.
        fp16_head: Whether the tied head is computed in FP16.
        expert_tiles: Whether tokens pass their own experts only (expert_tiles.py).
        attention_blocks: Whether attention leaves out the future (causal_attention.py).

    Raises:
        UnsupportedError: MaxText is not the one that was read.
    """
    from moeconv_train import causal_attention, loss_scaling, seams
    from moeconv_train import expert_tiles as tiles
    from moeconv_train import fp16_head as head

    seams.check()
    with contextlib.ExitStack() as stack:
        changes = {head: fp16_head, tiles: expert_tiles, causal_attention: attention_blocks}
        for change in (module for module, on in changes.items() if on):
            stack.enter_context(change.install())
        settings = loss_scaling.LossScaleSettings.model_validate(dict(loss_scale or {}))
        stack.enter_context(loss_scaling.install(settings))
        yield
