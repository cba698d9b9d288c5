"""`moeconv verify`: evidence that the output is the model of the checkpoint."""

import os
import sys
from pathlib import Path

import click

from moeconv.cli.options import JSON, output_of

LEVELS = ("structure", "weights")
FAILED = 1


@click.command("verify")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--source",
    metavar="CKPT",
    help="Checkpoint to compare with. Default: the one that OUT's manifest names.",
)
@click.option(
    "--level",
    type=click.Choice([*LEVELS, "all"]),
    default="all",
    show_default=True,
    help="structure: files, tensors, config and tokenizer, without the checkpoint; weights: every "
    "value against the checkpoint.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for verify.json. Default: OUT.",
)
@click.option("--max-memory", default="4GiB", show_default=True, metavar="SIZE")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=lambda: os.cpu_count() or 1,
    show_default="number of processors",
    metavar="N",
)
@JSON
def command(
    out: Path,
    source: str | None,
    level: str,
    report: Path | None,
    max_memory: str,
    jobs: int,
    json_mode: bool,
) -> None:
    """Verify a converted model: exit 0 pass, 1 fail, 2 and above could not run.

    The verdict is written to verify.json, bound to the SHA-256 of every file.
    """
    from moeconv.convert.sizes import parse_size
    from moeconv.hf.config import to_json
    from moeconv.verify.outcome import Status
    from moeconv.verify.report import REPORT_NAME, make_report
    from moeconv.verify.structure import check_structure
    from moeconv.verify.subject import Subject
    from moeconv.verify.weights import check_weights

    output = output_of(json_mode)
    subject = Subject.open(out, source=source)
    checks = []
    if level in ("structure", "all"):
        checks += check_structure(subject)
    if level in ("weights", "all"):
        checks += check_weights(subject, jobs=jobs, memory=parse_size(max_memory))
    verdict = make_report(subject, checks)
    content = verdict.model_dump(mode="json")
    folder = report or out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_NAME).write_bytes(to_json(content))
    output.data(content)
    for check in checks:
        output.print(f"{check.status:8} {check.level:10} {check.name:13} {check.summary}")
        for name in check.tensors[:10] if check.status is not Status.PASS else ():
            output.print(f"{'':33}{name}")
    output.print(f"{verdict.verdict}: {folder / REPORT_NAME}")
    sys.exit(FAILED if verdict.verdict is Status.FAIL else 0)
