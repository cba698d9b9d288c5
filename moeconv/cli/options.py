"""Options that several commands share, declared once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from moeconv.cli.output import Output

F = TypeVar("F", bound=Callable[..., Any])

CKPT = click.argument("ckpt", metavar="CKPT")

CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="MaxText YAML of the run; keys it leaves out have MaxText's defaults. Without it the "
    "run's moeconv.json is looked for beside the checkpoint.",
)

SET = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="One field, by its MaxText name (or bos_token_id, eos_token_id, pad_token_id); wins over "
    "--config. May be given several times.",
)

JSON = click.option("--json", "json_mode", is_flag=True, help="Data on stdout, as JSON.")

QUIET = click.option("--quiet", "-q", is_flag=True, help="Say nothing but warnings and errors.")


def output_of(json_mode: bool, quiet: bool = False) -> Output:
    """The output object for these flags."""
    return Output(json_mode=json_mode, quiet=quiet)
