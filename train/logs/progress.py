"""How far a run is: one line that is rewritten on a terminal, now and then a line elsewhere."""

import contextlib
import datetime
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from moeconv.arch.sidecar import MetricsLine
from moeconv.untrusted.text import printable

# Lines into a file or a pipe are this far apart, rewritten ones on a terminal that far.
_LINES, _REWRITES = 10.0, 0.2
# Steps that a rate is the mean of.
_WINDOW = 200
_GONE = (OSError, ValueError, RuntimeError)


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
        self._live: Live | None = None
        if stream is not None and stream.isatty():
            console = Console(file=stream, force_terminal=True)
            if console.is_interactive:  # not TERM=dumb
                self._live = Live(
                    console=console,
                    auto_refresh=False,
                    redirect_stdout=False,  # the log has it
                    redirect_stderr=False,
                )

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
        now, every = self._clock(), _REWRITES if self._live else _LINES
        final = line.step >= self._steps or not self._window
        if final or now - self._shown >= every:
            self._shown = now
            self._say(self._text(line), self._live)

    def evaluation(self, line: MetricsLine) -> None:
        """An evaluation is done: a line of its own."""
        took = "" if line.seconds is None else f" in {_time(line.seconds)}"
        self.note(f"step {line.step:,}: validation loss {line.loss:.4f}{took}")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._say(printable(text))

    def close(self) -> None:
        """Leaves the rewritten line where it is."""
        if self._live:
            with contextlib.suppress(*_GONE):
                self._live.stop()

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

    def _say(self, text: str, rewritten: Live | None = None) -> None:
        """Never a reason to fail: whoever listened may be gone (`moeconv train 2>&1 | head`)."""
        if self.stream is None:
            return
        try:
            if rewritten:
                rewritten.start()
                rewritten.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
            elif self._live:
                self._live.console.print(Text(text), soft_wrap=True)
            else:
                print(text, file=self.stream, flush=True)
        except _GONE as error:
            stream, self.stream = self.stream, None
            logging.warning("nobody reads the progress any more (%s); the run goes on", error)
            # It still holds what it could not write, and would fail again when it is closed.
            with contextlib.suppress(*_GONE), Path(os.devnull).open("w") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())


def _time(seconds: float) -> str:
    """As `17:05:00`; of what is short, tenths of a second."""
    return f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))
