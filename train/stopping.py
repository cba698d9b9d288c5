"""Leaving a run early without losing a step: signals and a time limit.

MaxText 0.2.5 saves nothing on SIGTERM, and a run that stops between two saves loses up to
`checkpoint_period` steps. Around `training_loop_iteration` we look after each step whether it is
time to leave, save with MaxText's own function, and end the loop by its own StopTraining.
"""

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from moeconv_train import seams

Reason = Literal["interrupted", "time limit"]

# What common/data_loader.py `loader_exception_guard` says where there is no batch.
_NO_BATCH = {
    "You may have run out of training data": "ended",
    "`next(self.data_iterator)` failed": "failed",
}


class Stopper:
    """Whether a run is to leave, and how it did.

    Attributes:
        stepping: Whether a step has begun.
        reason: Why it is to leave early; None if it is not.
        message: Why MaxText itself ended the loop, if it did.
    """

    def __init__(
        self,
        limit: float | None,
        note: Callable[[str], None],
        begun: float | None = None,
    ) -> None:
        self._limit, self._note = limit, note
        self._begun = time.monotonic() if begun is None else begun
        self._signal: int | None = None
        self.stepping = False
        self.reason: Reason | None = None
        self.message: str | None = None

    @property
    def no_batch(self) -> str | None:
        """`ended` or `failed`, as MaxText's loader did; the state is that of the step before."""
        said = self.message or ""
        return next((how for text, how in _NO_BATCH.items() if said.startswith(text)), None)

    def due(self) -> Reason | None:
        """Asked after each step."""
        if self._signal is not None:
            number, self._signal = self._signal, None
            name = signal.Signals(number).name
            self._note(f"{name}: saving a checkpoint, then leaving; again to not save")
        over = self._limit is not None and time.monotonic() - self._begun >= self._limit
        if self.reason is None and over:
            self.reason = "time limit"
        return self.reason

    def signalled(self, number: int, _: Any = None) -> None:
        """The first signal leaves after this step, the second at once.

        Before the first step there is nothing to save, so it is left at once.
        """
        if not self.stepping or self.reason == "interrupted":
            raise KeyboardInterrupt
        # It may have come in the middle of a write, so due() reports it.
        self.reason, self._signal = "interrupted", number

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """What ends a process comes here while this is open; under nohup SIGHUP does not."""
        ending = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            ending.append(signal.SIGHUP)
        before = {number: signal.signal(number, self.signalled) for number in ending}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def install(stopper: Stopper) -> Iterator[None]:
    """While this is open, MaxText's loop leaves when `stopper` says so, its state saved."""
    from maxtext.trainers.pre_train import train
    from maxtext.utils import exceptions

    stock = train.training_loop_iteration

    @functools.wraps(stock)
    def iteration(device_state: Any, variables: Any, fixed: Any) -> Any:
        stopper.stepping = True
        step = variables["step"]
        try:
            metrics = stock(device_state, variables, fixed)
        except exceptions.StopTraining as stop:
            stopper.message = str(stop)
            if stopper.no_batch and step > fixed["start_step"]:
                _save(device_state, variables, fixed["config"], step - 1)
            raise
        if step == 0 and fixed["steps"] == 1 and fixed["config"].save_checkpoint_on_completion:
            # common/checkpointing.py `_should_save_checkpoint_at_step` never saves step 0.
            _save(device_state, variables, fixed["config"], step)
        if step + 1 < fixed["steps"] and (reason := stopper.due()):
            _save(device_state, variables, fixed["config"], step)
            raise exceptions.StopTraining(reason)
        return metrics

    with seams.replaced(train, training_loop_iteration=iteration):
        yield


def _save(device_state: Any, variables: Any, config: Any, step: int) -> None:
    """A checkpoint of the state after `step`, whole on disk, unless it is there already."""
    from maxtext.common import checkpointing

    manager = variables["checkpoint_manager"]
    if manager is None:
        return
    checkpointing.wait_until_finished(manager)
    if step not in checkpointing.all_steps(manager):
        iterator = variables["data_iterator"]
        checkpointing.save_checkpoint(
            manager, step, device_state["state"], config, iterator, force=True
        )
        checkpointing.wait_until_finished(manager)
