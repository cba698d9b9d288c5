"""`moeconv verify`: evidence that the output is the model of the checkpoint."""

import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from moeconv.cli.options import ACCEPT, JOBS, JSON, QUIET, LocalPath, output_of
from moeconv.cli.streams import say
from moeconv.errors import MoeconvError
from moeconv.verification.levels import LEVELS
from moeconv.verification.settings import DTYPES

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
    help="MaxText YAML that the reference is built from. Default: the run's sidecar, else the "
    "settings that the manifest records.",
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
    type=click.Choice(DTYPES),
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
@JOBS
@JSON
@QUIET
def command(out: Path, level: str, json_mode: bool, quiet: bool, **options: Any) -> None:
    """Verify a converted model: exit 0 pass, 1 fail, 2 could not run.

    The verdict is written to verify.json, bound to the SHA-256 of every file, and for people to
    verify.md with its plots. Levels that ran earlier on the same bytes stay in the report.
    """
    # Both models run on the CPU, also where jax would take a GPU and most of its memory.
    os.environ["JAX_PLATFORMS"] = "cpu"
    output = output_of(json_mode, quiet)
    try:
        from moeconv.api.verify import verify

        with output.working() as note:
            found = verify(
                out,
                levels=None if level == "all" else [level],
                progress=partial(output.progress, what="comparing"),
                note=note,
                **options,
            )
    # One code for every reason: scripts ask whether there is a verdict.
    except MoeconvError as error:
        _no_verdict(f"error: no verdict: {error}")
    except Exception:
        _no_verdict(f"{traceback.format_exc()}error: no verdict: this is a bug of moeconv")
    output.answer(found)
    sys.exit(FAILED if found.failed else 0)


def _no_verdict(why: str) -> NoReturn:
    say(why)
    sys.exit(COULD_NOT_RUN)
