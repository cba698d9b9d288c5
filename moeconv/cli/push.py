"""`moeconv push`: a verified model to the Hub, in one commit."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from moeconv.cli.options import JSON, QUIET, LocalPath, Revision, Text, output_of
from moeconv.cli.streams import interruptible


@click.command("push")
@click.argument("out", metavar="[OUT]", required=False, type=LocalPath())
@click.option(
    "--repo-id",
    metavar="NAMESPACE/NAME",
    help="Where to. Default: the repository that the run's config names.",
)
@click.option("--private", is_flag=True, help="If the repository has to be made, make it private.")
@click.option(
    "--revision",
    type=Revision(),
    default="main",
    show_default=True,
    metavar="BRANCH",
    help="Made if needed.",
)
@click.option(
    "--create-pr",
    is_flag=True,
    help="Open a pull request; while it is open, later runs go on with it.",
)
@click.option("--dry-run", is_flag=True, help="Say what would happen, and change nothing.")
@click.option(
    "--unverified",
    is_flag=True,
    help="Push what is not proven to be the model; its card says so.",
)
@click.option("--message", type=Text(), metavar="TEXT", help="Of the commit.")
@click.option(
    "--license",
    metavar="ID",
    help="License of the model, as the Hub names it. Default: what the run says.",
)
@click.option(
    "--endpoint",
    metavar="URL",
    help="Address of the Hub. Default: HF_ENDPOINT, else https://huggingface.co.",
)
@JSON
@QUIET
def command(
    out: Path | None, endpoint: str | None, json_mode: bool, quiet: bool, **options: Any
) -> None:
    """Publish a verified model on the Hugging Face Hub.

    OUT is an output of `moeconv convert`; the newest one below the current directory is taken
    unless one is named. The token comes from HF_TOKEN or `hf auth login`. Everything lands in one
    commit, or nothing does; after a broken run the same command goes on.
    """
    output = output_of(json_mode, quiet)
    if not sys.stderr.isatty():
        # Read by tqdm when it is imported: into a file, bars say something every few seconds.
        os.environ.setdefault("TQDM_MININTERVAL", "5")
    from huggingface_hub.utils import disable_progress_bars

    from moeconv.api.push import push
    from moeconv.hf.hub_address import read_address
    from moeconv.hub.prepare import find_output

    if json_mode or quiet:
        disable_progress_bars()
    read_address(endpoint)  # one that is none, before anything else
    folder = find_output(out, output.warn if quiet else output.note)
    with interruptible("a commit lands whole or not at all; the same command goes on"):
        done = push(folder, endpoint=endpoint, note=output.note, **options)
    output.answer(done)
