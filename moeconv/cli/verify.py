"""`moeconv verify`: evidence that the output is the model of the checkpoint."""

import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from moeconv.cli.options import ACCEPT, JSON, QUIET, LocalPath, output_of
from moeconv.cli.streams import say
from moeconv.errors import MoeconvError
from moeconv.verification.levels import LEVELS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moeconv.cli.output import Output
    from moeconv.verification.report.report import Report
    from moeconv.verification.settings import Meter, Progress

FAILED, COULD_NOT_RUN = 1, 2


@click.command("verify")
@click.argument("out", metavar="OUT", type=LocalPath(file_okay=False))
@click.option(
    "--source",
    metavar="CKPT",
    help="Checkpoint to compare with. Default: the one that OUT's manifest names.",
)
@click.option(
    "--config",
    metavar="FILE",
    type=LocalPath(dir_okay=False),
    help="MaxText YAML that the reference is built from. Default: the run's sidecar, else what "
    "the manifest says the conversion was told.",
)
@ACCEPT
@click.option(
    "--against",
    metavar="maxtext|hf:DIR",
    default="maxtext",
    show_default=True,
    help="What logits and layers are compared with: MaxText itself on the checkpoint, or another "
    "Hugging Face model.",
)
@click.option(
    "--level",
    type=click.Choice([*(level.value for level in LEVELS), "all"]),
    default="all",
    show_default=True,
    help="; ".join(f"{level}: {spec.summary}" for level, spec in LEVELS.items())
    + ". `all` skips, and says so, what cannot run here.",
)
@click.option(
    "--prompts",
    metavar="FILE",
    type=LocalPath(dir_okay=False),
    help="Text to run, documents separated by empty lines. Default: a sample of the run's own "
    "corpus if its sidecar names one, else a text that comes with moeconv.",
)
@click.option(
    "--tokens",
    type=click.IntRange(8),
    default=512,
    show_default=True,
    metavar="N",
    help="Positions of text, and as many of random ids, in rows as long as the context allows.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="What the converted model is computed in; MaxText is always computed in float32.",
)
@click.option(
    "--report",
    type=LocalPath(file_okay=False),
    help="Folder for verify.json, verify.md and the plots. Default: OUT.",
)
@click.option(
    "--max-memory",
    default="4GiB",
    show_default=True,
    metavar="SIZE",
    help="What level weights may take.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=lambda: os.cpu_count() or 1,
    show_default="number of processors",
    metavar="N",
)
@JSON
@QUIET
def command(
    out: Path,
    source: str | None,
    config: Path | None,
    accept: tuple[str, ...],
    against: str,
    level: str,
    prompts: Path | None,
    tokens: int,
    dtype: str,
    report: Path | None,
    max_memory: str,
    jobs: int,
    json_mode: bool,
    quiet: bool,
) -> None:
    """Verify a converted model: exit 0 pass, 1 fail, 2 could not run.

    The verdict is written to verify.json, bound to the SHA-256 of every file, and for people to
    verify.md with its plots. Levels that ran earlier on the same bytes stay in the report.
    """
    # Both models run on the CPU, also where jax would take a GPU and most of its memory.
    os.environ["JAX_PLATFORMS"] = "cpu"
    output = output_of(json_mode, quiet)
    try:
        from moeconv.sizes import parse_size
        from moeconv.verification.checks import Status
        from moeconv.verification.report.files import demand_writable, earlier_report, write_report
        from moeconv.verification.run import verify
        from moeconv.verification.settings import ParityOptions, VerifyOptions, parse_against

        options = VerifyOptions(
            levels=[name for name in LEVELS if level in (name, "all")],
            jobs=jobs,
            memory=parse_size(max_memory),
            parity=ParityOptions(
                tokens=tokens,
                prompts=prompts,
                dtype=dtype,
                against=parse_against(against),
                config=config,
                accept=accept,
            ),
            skip=level == "all",
        )
        folder = report or out
        demand_writable(folder)  # before minutes of work
        found = verify(out, source=source, options=options, note=output.note, meter=_meter(output))
        whole = found
        if (earlier := earlier_report(folder)) is not None:
            whole = found.with_earlier(earlier)
        files = write_report(whole, folder)
    # One code for every reason: scripts ask whether there is a verdict.
    except MoeconvError as error:
        _no_verdict(f"error: no verdict: {error}")
    except Exception:
        _no_verdict(f"{traceback.format_exc()}error: no verdict: this is a bug of moeconv")
    _tell(output, found, whole, files)
    sys.exit(FAILED if found.verdict is Status.FAIL else 0)


def _no_verdict(why: str) -> NoReturn:
    say(why)
    sys.exit(COULD_NOT_RUN)


def _tell(output: "Output", found: "Report", whole: "Report", files: list[Path]) -> None:
    """The verdict, for machines or for people."""
    from moeconv.verification.report.markdown import verdict_line

    output.data(found.model_dump(mode="json"))
    _print(output, found)
    output.print(verdict_line(found))
    kept = [f"{name} {status}" for name, status in whole.levels.items() if name not in found.levels]
    if kept:
        output.print(f"kept in the report, of the same bytes: {', '.join(kept)}")
    output.print(f"report: {', '.join(map(str, files))}")


def _meter(output: "Output") -> "Meter":
    @contextmanager
    def meter(total: int) -> "Iterator[Progress]":
        with output.progress(total, 0, "comparing") as seen:
            yield lambda done: seen(done, 0)

    return meter


def _print(output: "Output", report: "Report") -> None:
    """A line a check, and the tensors at fault."""
    from rich.table import Table
    from rich.text import Text

    from moeconv.verification.checks import Status

    colours = {Status.PASS: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in range(4):
        table.add_column(overflow="fold", no_wrap=column < 3)
    for check in report.checks:
        status = Text(check.status.value, style=colours.get(check.status, "dim"))
        table.add_row(status, check.level, check.name, Text(check.summary))
        for name in check.tensors[:10] if check.status is not Status.PASS else ():
            table.add_row("", "", "", Text(name))
    output.print(table)
