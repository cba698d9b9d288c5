"""`moeconv.verify`: evidence that a converted model is the one that was trained."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeconv.api.arguments import (
    Note,
    Progress,
    Size,
    StrPath,
    jobs_of,
    log,
    optional_path,
    size_of,
    unseen,
)
from moeconv.errors import UsageError
from moeconv.printing import Printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moeconv.verification.checks import Status
    from moeconv.verification.report.report import Report

_COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}
# Tensors at fault that are shown; the report has them all.
_SHOWN = 10
# With fewer, a row is no text.
_LEAST_TOKENS = 8


@dataclass(frozen=True)
class Verification(Printable):
    """What was found, and where it is written.

    Attributes:
        report: The levels that ran this time.
        written: What `verify.json` holds: also the levels that ran earlier on the same bytes.
        files: `verify.json`, `verify.md` and the plots.
    """

    report: "Report"
    written: "Report"
    files: tuple[Path, ...]

    @property
    def verdict(self) -> "Status":
        """The worst of all checks that ran this time: `pass`, `warn`, `fail` or `skipped`."""
        return self.report.verdict

    @property
    def failed(self) -> bool:
        """True if a check failed: the model is not the one that was trained."""
        return self.verdict == "fail"

    def as_dict(self) -> dict[str, Any]:
        """What `moeconv verify --json` prints."""
        return self.report.model_dump(mode="json")

    def parts(self) -> "Iterator[RenderableType]":
        """What `moeconv verify` prints: a line a check, the tensors at fault, and the verdict."""
        from rich.table import Table
        from rich.text import Text

        from moeconv.verification.report.markdown import verdict_line

        table = Table(box=None, show_header=False, pad_edge=False)
        for column in range(4):
            table.add_column(overflow="fold", no_wrap=column < 3)
        for check in self.report.checks:
            status = Text(check.status.value, style=_COLOURS.get(check.status, "dim"))
            table.add_row(status, check.level, check.name, Text(check.summary))
            for name in check.tensors[:_SHOWN] if check.status != "pass" else ():
                table.add_row("", "", "", Text(name))
        yield table
        yield verdict_line(self.report)
        kept = [
            f"{name} {status}"
            for name, status in self.written.levels.items()
            if name not in self.report.levels
        ]
        if kept:
            yield f"kept in the report, of the same bytes: {', '.join(kept)}"
        yield f"report: {', '.join(map(str, self.files))}"


def verify(
    out: StrPath,
    *,
    levels: Sequence[str] | None = None,
    source: StrPath | None = None,
    config: StrPath | None = None,
    accept_keys: Sequence[str] = (),
    against: str = "maxtext",
    prompts: StrPath | None = None,
    tokens: int = 512,
    dtype: str = "float32",
    report: StrPath | None = None,
    jobs: int | None = None,
    max_memory: Size = "4GiB",
    progress: Progress = unseen,
    note: Note = log,
) -> Verification:
    """Verifies a converted model against its checkpoint, and writes the report.

    MaxText is computed on the CPU, unless this process has imported jax already.

    Args:
        out: An output of `convert`.
        levels: Of `structure`, `weights`, `logits` and `layers`; see docs/parity.md. By default
            all, and what cannot run here is skipped, with the reason.
        source: The checkpoint, by default the one that the manifest names.
        config: MaxText YAML of the run, by default what the run or the manifest says.
        accept_keys: Settings in the config that moeconv does not know; see `open_checkpoint`.
        against: `maxtext`, or `hf:DIR` for another Hugging Face model.
        prompts: A text file to run, by default a sample of the run's own data.
        tokens: Positions of text, and as many of random ids; at least 8.
        dtype: What the converted model is computed in: `float32`, `bfloat16` or `float16`.
        report: The folder for `verify.json`, `verify.md` and the plots, by default `out`.
        jobs: Chunks worked on at the same time, by default the number of processors.
        max_memory: What level weights may take, in bytes or as `4GiB`.
        progress: Of level weights; see `convert`.
        note: Called with what is being done, one sentence at a time; see `convert`.

    Returns:
        The verdict and the checks; one that failed is no exception. `print` shows them as
        `moeconv verify` does.

    Raises:
        MoeconvError: There is no verdict: something that is needed is missing or cannot be read.
    """
    from moeconv.verification import run
    from moeconv.verification.levels import LEVELS
    from moeconv.verification.report.files import demand_writable, earlier_report, write_report
    from moeconv.verification.settings import (
        DTYPES,
        ParityOptions,
        VerifyOptions,
        parse_against,
    )

    if unknown := [name for name in levels or () if name not in LEVELS]:
        raise UsageError(f"--level {unknown[0]} is none of {', '.join(LEVELS)}, all")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is none of {', '.join(DTYPES)}")
    if tokens < _LEAST_TOKENS:
        raise UsageError(f"--tokens takes a whole number from {_LEAST_TOKENS}")
    options = VerifyOptions(
        levels=[level for level in LEVELS if levels is None or level in levels],
        jobs=jobs_of(jobs),
        memory=size_of(max_memory),
        parity=ParityOptions(
            tokens=tokens,
            prompts=optional_path(prompts),
            dtype=dtype,
            against=parse_against(against),
            config=optional_path(config),
            accept=tuple(accept_keys),
        ),
        skip=levels is None,
    )
    if "jax" not in sys.modules:  # it would take a GPU, and most of its memory
        os.environ.setdefault("JAX_PLATFORMS", "cpu")

    @contextmanager
    def meter(total: int) -> Iterator[Callable[[int], None]]:
        with progress(total, 0) as advance:
            yield lambda done: advance(done, 0)

    folder = Path(out if report is None else report)
    demand_writable(folder)  # before minutes of work
    checkpoint = None if source is None else os.fspath(source)
    found = run.verify(Path(out), source=checkpoint, options=options, note=note, meter=meter)
    earlier = earlier_report(folder)
    written = found if earlier is None else found.with_earlier(earlier)
    return Verification(found, written, tuple(write_report(written, folder)))
