"""Options that several commands share, declared once."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from moeconv.cli.output import Output
from moeconv.untrusted.files import is_address, without_access

F = TypeVar("F", bound=Callable[..., Any])

_NO_REF = re.compile(
    r"^[-/]|^@?$|\.\.|//|@\{|(?:^|/)\.|[\x00-\x20\x7f-\x9f\s~^:?*\[\\]|\.lock(?:/|$)|[./]$"
)


class LocalPath(click.Path):
    """A path on this machine: an address would be taken for a folder of that name."""

    def __init__(self, *, file_okay: bool = True, dir_okay: bool = True) -> None:
        super().__init__(file_okay=file_okay, dir_okay=dir_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        try:
            str(value).encode()
        except UnicodeEncodeError:
            self.fail("a path that is not UTF-8 can stand in no JSON file; rename it", param, ctx)
        if is_address(value):
            self.fail(
                f"{without_access(value)} is an address; give a path on this machine, and "
                "copy from or to the store yourself",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class Mesh(click.ParamType[dict[str, int]]):
    """Sizes of a mesh's axes, `fsdp=8,expert=4`."""

    name = "mesh"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, int]:
        """See `click.ParamType`."""
        if isinstance(value, dict):
            return value
        found: dict[str, int] = {}
        for pair in str(value).split(","):
            name, _, size = pair.strip().partition("=")
            if not name or not size.isdecimal() or int(size) < 1 or name in found:
                self.fail(f"{pair!r} is no AXIS=N; write fsdp=8,expert=4", param, ctx)
            found[name] = int(size)
        return found


class Text(click.types.StringParamType):
    """A text that can be stored and sent: the shell may hand over bytes that are no UTF-8."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See `click.ParamType`."""
        try:
            str(value).encode()
        except UnicodeEncodeError:
            self.fail("is not UTF-8; give a text in UTF-8", param, ctx)
        return str(value)


class Revision(Text):
    """A name that git takes for a branch or tag (git-check-ref-format)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See `click.ParamType`."""
        text = super().convert(value, param, ctx)
        if _NO_REF.search(text):
            self.fail(f"{text!r} can be no name of a branch in git; give another", param, ctx)
        return text


CKPT = click.argument("ckpt", metavar="SRC")

CONFIG = click.option(
    "--config",
    type=LocalPath(dir_okay=False),
    help="The run's settings: its MaxText YAML (keys it leaves out have MaxText's defaults), "
    "MaxText's own log, or W&B's config.yaml. Without it the run's moeconv_run.json is looked for "
    "beside the checkpoint, then a log or a resolved config.",
)

SET = click.option(
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    help="One field, by its MaxText name (or bos_token_id, eos_token_id, pad_token_id); wins over "
    "--config. May be given several times, or be a whole command line of MaxText.",
)

ACCEPT = click.option(
    "--accept-key",
    "accept_keys",
    multiple=True,
    metavar="KEY",
    help="A setting in the run's config that moeconv does not know, of a newer MaxText or a fork, "
    "and that does not change the model. verify can then warn at best. May be given several times.",
)

JOBS = click.option(
    "--jobs",
    type=int,
    default=lambda: os.cpu_count() or 1,
    show_default="number of processors",
    metavar="N",
    help="Chunks worked on at the same time; the result does not depend on it.",
)

JSON = click.option("--json", "json_mode", is_flag=True, help="Data on stdout, as JSON.")

QUIET = click.option("--quiet", "-q", is_flag=True, help="Say nothing but warnings and errors.")


def tell_of_store(output: Output, ckpt: str) -> None:
    """A word before a store is asked, which may take seconds."""
    if is_address(ckpt):
        output.note(f"reading {without_access(ckpt)}")


def output_of(json_mode: bool, quiet: bool = False) -> Output:
    """The output object for these flags."""
    return Output(json_mode=json_mode, quiet=quiet)
