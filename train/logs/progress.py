"""How far a run is: now and then a line."""

import contextlib
import datetime
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from moeconv.maxtext.sidecar import MetricsLine
from moeconv.untrusted.text import printable

_SECONDS = 10.0  # between two lines
# Steps that a rate is the mean of.
_WINDOW = 200
_GONE = (OSError, ValueError)


class Progress:
    """Counts target tokens (padding is none) over the steps whose time is known.

    Attributes:
        stream: Where to; None once nobody reads it.
        peak: Tokens a second if the model's own FLOPs (its active parameters') were the devices'
            peak; None if not known.
    """

    def __init__(
        self,
        stream: IO[str] | None,
        steps: int,
        peak: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream, self.peak, self._steps, self._clock = stream, peak, steps, clock
        self._window: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._last: float | None = None
        self._shown = float("-inf")

    def lap(self, late: bool = False) -> float | None:
        """Seconds from the step before's result to this one's; None where that is not known.

        The first step of a process has a compilation in it, so it says nothing about the pace.

        Args:
            late: The result was there for longer than since now: neither this step nor the next
                one has a known time.
        """
        now = self._clock()
        begun, self._last = self._last, None if late else now
        return None if begun is None or late else now - begun

    def step(self, line: MetricsLine, tokens: int) -> None:
        """A training step is done; `tokens` are its targets."""
        if line.seconds:
            self._window.append((line.seconds, tokens))
        now = self._clock()
        if line.step >= self._steps or not self._window or now - self._shown >= _SECONDS:
            self._shown = now
            self.note(self._text(line))

    def evaluation(self, line: MetricsLine) -> None:
        """An evaluation is done: a line of its own."""
        took = "" if line.seconds is None else f" in {_time(line.seconds)}"
        self.note(f"step {line.step:,}: validation loss {line.loss:.4f}{took}")

    def note(self, text: str) -> None:
        """A line; the reader may be gone (`moeconv train 2>&1 | head`), no reason to fail."""
        if self.stream is None:
            return
        try:
            print(printable(text), file=self.stream, flush=True)
        except _GONE as error:
            stream, self.stream = self.stream, None
            logging.warning("nobody reads the progress any more (%s); the run goes on", error)
            # It still holds what it could not write, and would fail again when it is closed.
            with contextlib.suppress(*_GONE), Path(os.devnull).open("w") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())

    def _text(self, line: MetricsLine) -> str:
        parts = [
            f"step {line.step:,} of {self._steps:,} ({line.step / self._steps:.1%})",
            f"loss {line.loss:.4f}",
        ]
        if line.loss_scale is not None:
            skipped = f" ({line.skipped_steps} skipped)" if line.skipped_steps else ""
            parts.append(f"scale {line.loss_scale:g}{skipped}")
        if self._window:
            seconds = sum(taken for taken, _ in self._window)
            rate = sum(tokens for _, tokens in self._window) / seconds
            parts.append(f"{rate:,.0f} tokens/s")
            if self.peak:
                parts.append(f"MFU {rate / self.peak:.1%}")
            if line.step < self._steps:
                left = seconds / len(self._window) * (self._steps - line.step)
                parts.append(f"{_time(left)} left")
        return "  ".join(parts)


def _time(seconds: float) -> str:
    """As `17:05:00`; of what is short, tenths of a second."""
    return f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))
