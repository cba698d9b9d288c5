"""`moeconv data prepare`: stories to the tokenised, packed and counted rows that MaxText reads."""

import importlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import click

from moeconv.cli.options import JSON, QUIET, LocalPath, Revision, Text, output_of
from moeconv.cli.output import Output
from moeconv.cli.streams import say
from moeconv.errors import MissingPackageError, to_install

_REPORT_EVERY = 5.0


@click.group("data")
def command() -> None:
    """Prepare the data that a model is trained on."""


@command.command("prepare")
@click.argument("source", default="roneneldan/TinyStories")
@click.option(
    "--out",
    required=True,
    type=LocalPath(file_okay=False),
    metavar="DIR",
    help="Becomes the dataset, once it is whole.",
)
@click.option(
    "--tokenizer",
    default="llama3",
    show_default=True,
    metavar="DIR|llama3|HUB_ID",
    help="A directory with a tokenizer.json, a file of tiktoken ranks, llama3 (needs no network), "
    "or a repository on the Hub (with HF_TOKEN from the environment).",
)
@click.option(
    "--seq-length",
    "sequence_length",
    type=click.IntRange(2),
    default=2048,
    show_default=True,
    metavar="N",
    help="Tokens of a row: MaxText's max_target_length.",
)
@click.option(
    "--validation-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.01,
    show_default=True,
    metavar="F",
    help="Share of the stories to hold out where SOURCE has no validation split.",
)
@click.option(
    "--column",
    type=Text(),
    default="text",
    show_default=True,
    metavar="NAME",
    help="Column (parquet) or field (jsonl) of the text.",
)
@click.option(
    "--separator",
    type=Text(),
    default="<|endoftext|>",
    show_default=True,
    metavar="TEXT",
    help=r"What stands between the stories of a text file; \n is a line's end.",
)
@click.option(
    "--revision",
    type=Revision(),
    metavar="REV",
    help="Commit, branch or tag of a dataset on the Hub.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="Fixes the order of the rows in training (data_shuffle_seed) and which stories are held "
    "out.",
)
@JSON
@QUIET
def prepare(
    source: str,
    out: Path,
    separator: str,
    json_mode: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Tokenise SOURCE into ArrayRecord shards for MaxText's grain pipeline.

    SOURCE is a dataset on the Hugging Face Hub (default: roneneldan/TinyStories), or a parquet,
    jsonl or text file (the last two also .gz or .zst), or a folder of them. DIR gets the shards,
    the tokenizer, and data.json with all counts and SHA-256s.
    """
    if importlib.util.find_spec("array_record") is None:
        raise MissingPackageError(f"preparing data needs array_record; {to_install('train')}")
    data = importlib.import_module("moeconv_train.data")
    output = output_of(json_mode, quiet)
    separator = separator.replace("\\n", "\n").replace("\\t", "\t")
    try:
        dataset = data.prepare_dataset(
            source,
            out,
            data.PrepareOptions(separator=separator, **options),
            progress=_Report(output),
            note=output.note,
            quiet=quiet or json_mode,
        )
    except KeyboardInterrupt:
        say("interrupted: nothing was written")
        sys.exit(130)
    output.data(describe(dataset))
    _print(output, dataset)


def describe(dataset: Any) -> dict[str, Any]:
    """A dataset as data: everything in data.json but the shards, and what follows from it."""
    return {
        "out": str(dataset.directory),
        "digest": dataset.digest,
        **dataset.manifest.model_dump(mode="json", exclude={"shards"}),
        "fill": {split: dataset.fill(split) for split in dataset.manifest.splits},
        "shards": len(dataset.manifest.shards),
        "bytes": sum(shard.bytes for shard in dataset.manifest.shards),
        "overrides": dataset.overrides(),
    }


def progress_report(output: Output) -> Any:
    """What prints the progress of a preparation; `moeconv train` prepares data too."""
    return _Report(output)


class _Report:
    """Progress as a line now and then on stderr."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._last > _REPORT_EVERY:
            self._last = time.monotonic()
            self._output.note(text)


def _print(output: Output, dataset: Any) -> None:
    from moeconv.sizes import format_size

    request = dataset.manifest.request
    size = sum(shard.bytes for shard in dataset.manifest.shards)
    output.print(
        f"{dataset.directory}: rows of {request.sequence_length} tokens, "
        f"{len(dataset.manifest.shards)} shards, {format_size(size)}"
    )
    for split, counts in dataset.manifest.splits.items():
        if not counts.rows:
            continue
        line = (
            f"{split}: {counts.stories:,} stories, {counts.tokens:,} tokens in {counts.rows:,} "
            f"rows, {dataset.fill(split):.2%} of the positions are targets"
        )
        if counts.cut:
            line += f"; {counts.cut:,} stories were longer than a row"
        if counts.empty:
            line += f"; {counts.empty:,} empty ones left out"
        output.print(line)
    output.print(
        f"one epoch is {dataset.steps_for_epochs(1, 8):,} steps of 8 rows, two are "
        f"{dataset.steps_for_epochs(2, 8):,}; vocab_size must be at least {request.tokenizer.size}"
    )
