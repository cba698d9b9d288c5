"""`moeconv train`: the door to moeconv_train, which trains with MaxText's own loop."""

import importlib
import importlib.util
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

import click

from moeconv.cli.options import JSON, QUIET, output_of
from moeconv.cli.start import INTERRUPTED
from moeconv.cli.streams import say
from moeconv.errors import MissingPackageError, TimeLimitError, to_install

if TYPE_CHECKING:
    from moeconv.cli.output import Output


@click.command("train")
@click.argument("words", nargs=-1, metavar="[RECIPE|FILE.yml] [KEY=VALUE]...")
@click.option(
    "--check",
    is_flag=True,
    help="Only check: settings, dataset, tokenizer, disk, GPUs, and the memory of the "
    "compiled train and evaluation step (about a minute; needs no GPU). Trains nothing.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be trained. Writes nothing.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="auto: go on where the run of this name stopped. never: refuse if there is such a run.",
)
@click.option(
    "--time-limit",
    metavar="TIME",
    help="Save and leave after this long, such as 8h30m (exit code 14; the same command goes on).",
)
@click.option(
    "--trial",
    is_flag=True,
    help="Only try a new run's patches against MaxText's own step on these devices, some minutes: "
    "the run keeps what is right and faster, and trial.json in its folder has the numbers.",
)
@JSON
@QUIET
def command(
    words: tuple[str, ...],
    check: bool,
    dry_run: bool,
    resume: str,
    time_limit: str | None,
    trial: bool,
    json_mode: bool,
    quiet: bool,
) -> None:
    """Train a model with MaxText, from its data to its last checkpoint.

    RECIPE is llama3_moe_200m_tinystories (the default: 2 T4 GPUs, FP16),
    llama3_moe_200m_tinystories_all_moe or tiny_cpu (minutes on two CPU cores, no network);
    FILE.yml is a MaxText config of your own. KEY=VALUE is any MaxText setting, or one of the run
    that MaxText has not: run.epochs=1, run.data.source=stories.jsonl, run.wandb.enabled=false.

    The run is stored in runs/<run_name> (base_output_directory, run_name). The same command goes on
    where it was interrupted: to the bit on CPUs; on GPUs the last bits may differ.
    """
    if importlib.util.find_spec("maxtext") is None:
        raise MissingPackageError(f"training needs MaxText; {to_install('train')}")
    # Preparing data counts for the time limit: a session has no more than that.
    since = time.monotonic()
    start = importlib.import_module("moeconv_train.start")
    output = output_of(json_mode, quiet)
    if time_limit is not None:
        words = (*words, f"run.time_limit={time_limit}")
    begun = start.plan_run(words, memory=check, network=not dry_run, progress=output.note)
    if check or dry_run:
        output.answer(start.Preview(begun, settings=not check))
        begun.refuse()
        return
    for text in begun.sentences():
        output.note(text)
    begun.refuse()
    outcome = _train(output, start, begun, since, resume, quiet, words if trial else None)
    if trial:
        output.data({"trial": outcome and outcome.model_dump()})
        return
    output.answer(outcome)
    if outcome.status == "time limit":
        raise TimeLimitError(f"{outcome.reached}; the same command goes on")
    if outcome.status == "interrupted":
        _interrupted(outcome.reached)
    if outcome.status == "stopped":
        output.warn(f"{outcome.reached}: {outcome.message}")


def _train(
    output: "Output",
    start: Any,
    begun: Any,
    since: float,
    resume: str,
    quiet: bool,
    trial: tuple[str, ...] | None,
) -> Any:
    trainer = importlib.import_module("moeconv_train.trainer")
    report, run_dir = output.now_and_then(), begun.plan.run_dir
    limit = begun.plan.run.time_limit

    def prepared(state: Any) -> None:
        report(state)
        if limit is not None and time.monotonic() - since >= limit:
            raise TimeLimitError(
                f"{begun.plan.feed.directory}: the data were not prepared before the time limit; "
                "the same command goes on"
            )

    try:
        ready = start.with_data(begun, note=output.note, progress=prepared, quiet=quiet)
        for text in ready.sentences(known=begun.findings):
            output.note(text)
        for text in ready.plan.notes:
            output.note(f"note: {text}")
        if trial is not None:
            tries = importlib.import_module("moeconv_train.trial")
            return tries.begin(ready.plan, trial, output.note)
        output.note(start.describe(ready.plan))
        return trainer.train(ready.plan, resume=resume, note=output.note, quiet=quiet, begun=since)
    except KeyboardInterrupt:
        saved = importlib.import_module("moeconv_train.run_dir").saved_step(run_dir)
        last = "nothing was saved" if saved is None else f"checkpoint {saved} is the last one saved"
        _interrupted(f"{run_dir}: {last}")


def _interrupted(reached: str) -> NoReturn:
    say(f"interrupted: {reached}; the same command goes on")
    sys.exit(INTERRUPTED)
