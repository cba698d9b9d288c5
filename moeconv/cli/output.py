"""One output object with three modes: human, quiet, json (data on stdout, all else on stderr)."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moeconv.cli.streams import say
from moeconv.errors import ConfigError
from moeconv.printing import Printable, console, show
from moeconv.untrusted import strict_json

if TYPE_CHECKING:
    from rich.console import Console

_EVERY = 5.0  # seconds between two lines of progress


class Output:
    """Where a command's words go."""

    def __init__(self, *, json_mode: bool = False, quiet: bool = False) -> None:
        self.json_mode = json_mode
        self.quiet = quiet

    def print(self, renderable: Any = "") -> None:
        """The command's answer, for people; nothing in json or quiet mode."""
        if not self.json_mode and not self.quiet:
            show(console(sys.stdout), renderable)

    def answer(self, value: Printable) -> None:
        """The command's answer, for people or for machines."""
        if self.json_mode:
            self.data(value.as_dict())
        elif not self.quiet:
            for part in value.parts():
                self.print(part)

    def data(self, content: Any) -> None:
        """The command's answer, for machines; only in json mode.

        Raises:
            ConfigError: It holds what JSON cannot.
        """
        if not self.json_mode:
            return
        try:
            text = strict_json.dumps(content, ascii_only=True).decode()
        except ValueError as error:
            raise ConfigError(f"the answer cannot be given as JSON: {error}") from None
        sys.stdout.write(text)

    def note(self, text: str) -> None:
        """Something on the way, on stderr; the library says warnings here too."""
        if not self.quiet or text.startswith("warning: "):
            say(text)

    def warn(self, text: str) -> None:
        """A warning, on stderr, in every mode."""
        say(f"warning: {text}")

    def now_and_then(self) -> Callable[[str], None]:
        """What says how far something is, a note every few seconds, however often it is called."""
        last = time.monotonic()

        def report(text: str) -> None:
            nonlocal last
            if time.monotonic() - last > _EVERY:
                last = time.monotonic()
                self.note(text)

        return report

    @contextmanager
    def progress(
        self, read_bytes: int, write_bytes: int, what: str = "converting"
    ) -> Iterator["Meter"]:
        """A progress display: a bar on a terminal, a line now and then elsewhere."""
        meter = Meter(read_bytes, write_bytes)
        if self.quiet:
            yield meter
        elif sys.stderr.isatty():
            with _bar(console(sys.stderr), meter, what):
                yield meter
        else:
            meter.report = self.note
            yield meter
            meter.report_now()


class Meter:
    """Counts bytes read and written, from any thread."""

    def __init__(self, read_total: int, write_total: int) -> None:
        self.read_total, self.write_total = read_total, write_total
        self.read = self.written = 0
        self.begun = time.monotonic()
        self.report: Any = None
        self.update: Any = None
        self._last = self.begun
        self._lock = threading.Lock()

    def __call__(self, read: int, written: int) -> None:
        """Adds bytes."""
        with self._lock:
            self.read += read
            self.written += written
            if self.update is not None:
                self.update(self.read + self.written)
            due = self.report is not None and time.monotonic() - self._last > _EVERY
            if due:
                self._last = time.monotonic()
        if due:
            self.report_now()

    def report_now(self) -> None:
        """One plain line: done, total, rate, time left."""
        from moeconv.sizes import format_size

        done, total = self.read + self.written, self.read_total + self.write_total
        seconds = max(1e-3, time.monotonic() - self.begun)
        rate = done / seconds
        left = f", {(total - done) / rate:.0f} s left" if 0 < done < total else ""
        wrote = (
            f", wrote {format_size(self.written)} of {format_size(self.write_total)}"
            if self.write_total
            else ""
        )
        self.report(
            f"read {format_size(self.read)} of {format_size(self.read_total)}{wrote} "
            f"in {seconds:.1f} s ({format_size(rate)}/s{left})"
        )


@contextmanager
def _bar(console: "Console", meter: Meter, what: str) -> Iterator[None]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=meter.read_total + meter.write_total)
        meter.update = lambda done: progress.update(task, completed=done)
        yield
        meter.update = None
