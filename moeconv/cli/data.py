"""`moeconv data prepare`: stories to the tokenised, packed and counted rows that MaxText reads."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import click

from moeconv.cli.options import JSON, QUIET, LocalPath, Revision, Text, output_of
from moeconv.cli.streams import interruptible
from moeconv.errors import MissingPackageError, to_install


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
    with interruptible("nothing was written"):
        dataset = data.prepare_dataset(
            source,
            out,
            data.PrepareOptions(separator=separator, **options),
            progress=output.now_and_then(),
            note=output.note,
            quiet=quiet or json_mode,
        )
    output.answer(dataset)
