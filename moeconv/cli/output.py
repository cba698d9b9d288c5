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
from moeconv.untrusted.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_EVERY = 5.0  # seconds between two lines of progress


class Output:
    """Where a command's words go."""

    def __init__(self, *, json_mode: bool = False, quiet: bool = False) -> None:
        self.json_mode = json_mode
        self.quiet = quiet
        # The spinner, while there is one.
        self._turning: Progress | None = None

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
            with self._still(), _bar(console(sys.stderr), meter, what):
                yield meter
        else:
            meter.report = self.note
            yield meter
            meter.report_now()

    @contextmanager
    def working(self) -> Iterator[Callable[[str], None]]:
        """Gives what to call with what is being done, one sentence at a time.

        On a terminal the last one turns, with its seconds, until the next; elsewhere each is a
        note.
        """
        if self.quiet or not sys.stderr.isatty():
            yield self.note
            return
        with _spinner(console(sys.stderr)) as (shown, begin):
            self._turning = shown
            try:
                yield begin
            finally:
                self._turning = None

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Without the spinner: a terminal shows one thing that moves."""
        if (shown := self._turning) is None:
            yield
            return
        shown.stop()
        try:
            yield
        finally:
            shown.start()


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


@contextmanager
def _spinner(console: "Console") -> Iterator[tuple["Progress", Callable[[str], None]]]:
    """A spinner that is not seen yet, and what begins another thing that it says."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    # What others print is theirs: MaxText's stdout is taken aside while this turns.
    own = Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    )
    task, begun = own.add_task("", total=None, visible=False), time.monotonic()
    doing: str | None = None

    def begin(text: str | None) -> None:
        nonlocal doing, begun
        if text is not None and text.startswith("warning: "):
            show(console, text)
            return
        if doing is not None:
            show(console, f"{doing} ({time.monotonic() - begun:.0f} s)")
        doing, begun = text, time.monotonic()
        own.reset(task, description=printable(text or ""), visible=text is not None)

    with own:
        yield own, begin
        begin(None)
