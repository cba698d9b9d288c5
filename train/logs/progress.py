"""One line that says how far a run is: rewritten on a terminal, now and then elsewhere."""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from moeconv.arch.sidecar import MetricsLine

# Lines into a file or a pipe are this far apart, rewritten ones on a terminal that far.
_LINES, _REWRITES = 10.0, 0.2
# Steps that a rate is the mean of.
_WINDOW = 200


@dataclass
class Progress:
    """Counts target tokens (padding is none) over the steps whose time is known.

    Attributes:
        stream: Where to; None once nobody reads it.
        steps: Of the whole run.
        completed: Steps that were done before this process.
        flops_per_token: Of training, by the model's active parameters; None if not known.
        peak: FLOP/s of all devices together; None if not known.
    """

    stream: IO[str] | None
    steps: int
    completed: int = 0
    flops_per_token: float | None = None
    peak: float | None = None
    clock: Callable[[], float] = time.monotonic
    _window: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _last: float | None = None
    _shown: float = float("-inf")
    _width: int = 0

    @property
    def rate(self) -> float | None:
        """Tokens a second."""
        seconds = sum(taken for taken, _ in self._window)
        return sum(tokens for _, tokens in self._window) / seconds if seconds else None

    @property
    def mfu(self) -> float | None:
        """The share of the devices' peak that the model's own FLOPs are."""
        if not (self.rate and self.flops_per_token and self.peak):
            return None
        return self.rate * self.flops_per_token / self.peak

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the last steps."""
        if not self._window:
            return None
        mean = sum(taken for taken, _ in self._window) / len(self._window)
        return mean * (self.steps - self.completed)

    def lap(self, late: bool = False) -> float | None:
        """Seconds from the step before's result to this one's; None where that is not known.

        The first step of a process has a compilation in it, so it says nothing about the pace.

        Args:
            late: The result was there for longer than since now: neither this step nor the next
                one has a known time.
        """
        now = self.clock()
        begun, self._last = self._last, None if late else now
        return None if begun is None or late else now - begun

    def step(self, line: MetricsLine, tokens: int) -> None:
        """A training step is done; `tokens` are its targets."""
        if line.seconds:
            self._window.append((line.seconds, tokens))
        self.completed = line.step
        self._show(self._text(line), final=line.step >= self.steps or not self._window)

    def evaluation(self, line: MetricsLine) -> None:
        """An evaluation is done: a line of its own."""
        took = "" if line.seconds is None else f" in {duration(line.seconds)}"
        self.note(f"step {line.step:,}: validation loss {line.loss:.4f}{took}")

    def note(self, text: str) -> None:
        """A line that stays."""
        wiped = "\r" + " " * self._width + "\r" if self._width else ""
        self._width = 0
        self._write(f"{wiped}{text}\n")

    def close(self) -> None:
        """Leaves a rewritten line where it is."""
        if self._width:
            self._width = 0
            self._write("\n")

    def _write(self, text: str) -> None:
        """Never a reason to fail: whoever listened may be gone (`moeconv train 2>&1 | head`)."""
        if self.stream is None:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError, RuntimeError) as error:
            stream, self.stream = self.stream, None
            logging.warning("nobody reads the progress any more (%s); the run goes on", error)
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                _forget(stream)

    def _text(self, line: MetricsLine) -> str:
        parts = [
            f"step {line.step:,} of {self.steps:,} ({line.step / self.steps:.1%})",
            f"loss {line.loss:.4f}",
        ]
        if line.loss_scale is not None:
            skipped = f" ({line.skipped_steps} skipped)" if line.skipped_steps else ""
            parts.append(f"scale {line.loss_scale:g}{skipped}")
        if self.rate:
            parts.append(f"{self.rate:,.0f} tokens/s")
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.1%}")
        if self.seconds_left is not None and line.step < self.steps:
            parts.append(f"{duration(self.seconds_left)} left")
        return "  ".join(parts)

    def _show(self, text: str, *, final: bool) -> None:
        now = self.clock()
        if self.stream is None:
            return
        terminal = not self.stream.closed and self.stream.isatty()
        if not final and now - self._shown < (_REWRITES if terminal else _LINES):
            return
        self._shown = now
        if not terminal:
            self._write(text + "\n")
        else:
            padded = text.ljust(self._width)
            self._width = max(self._width, len(text))
            self._write("\r" + padded)


def _forget(stream: IO[str]) -> None:
    """Points it at nothing, or what it still holds would fail again when it is closed."""
    with Path(os.devnull).open("w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), stream.fileno())


def duration(seconds: float) -> str:
    """Two units at most: `3 h 05 min`, `12 min`, `8.1 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
