"""`moeconv`: the group of commands, imported one at a time, and the one place that meets errors."""

import importlib
import io
import os
import re
import sys

import click

from moeconv import __version__
from moeconv.cli import streams
from moeconv.cli.start import INTERRUPTED, end_as_ctrl_c
from moeconv.errors import MoeconvError, UsageError

# Command -> module; a module is imported when its command is used or its help is shown.
COMMANDS = {
    "train": (
        "moeconv.cli.train",
        "Train a model with MaxText; the same command resumes it.",
    ),
    "inspect": (
        "moeconv.cli.inspect",
        "Show a MaxText checkpoint as moeconv understands it.",
    ),
    "families": (
        "moeconv.cli.families",
        "List the decoder blocks that convert, and to what.",
    ),
    "convert": (
        "moeconv.cli.convert",
        "Convert a MaxText checkpoint to a Hugging Face model.",
    ),
    "verify": (
        "moeconv.cli.verify",
        "Prove a converted model against its checkpoint: files, weights, logits, layers.",
    ),
    "push": (
        "moeconv.cli.push",
        "Publish a verified model on the Hugging Face Hub.",
    ),
    "data": (
        "moeconv.cli.data",
        "Prepare the data that a model is trained on.",
    ),
}


class _Lazy(click.Group):
    """A group that imports a command only when it is needed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for before, word in zip(["moeconv", *args], args, strict=False):
            if not word:
                what = f"the argument after {before}"
            elif re.fullmatch("--[^=]+=", word):
                what = f"the value of {word}"
            else:
                continue
            # An empty path would mean the current directory.
            raise UsageError(f"{what} is empty; is a shell variable not set?")
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moeconv")
def cli() -> None:
    """Mixture-of-Experts checkpoints from MaxText to Hugging Face."""


def main() -> None:
    """Runs the command line; a user's mistake ends in one sentence and a documented exit code."""
    end_as_ctrl_c()
    # A notebook's, which matplotlib refuses where that is not installed; we draw only files.
    os.environ.pop("MPLBACKEND", None)
    below = streams.guard()
    code = _run()
    if (why := streams.lost(below)) is not None and code == 0:
        streams.say(f"error: the answer cannot be written to stdout ({why}); all else is done")
        code = UsageError.exit_code
    sys.exit(code)


def _run() -> int:
    try:
        code = cli.main(standalone_mode=False)
    except SystemExit as end:
        code = end.code
    except MoeconvError as error:
        streams.say(f"error: {error}")
        return error.exit_code
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        streams.say(shown.getvalue().rstrip("\n"))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        streams.say("interrupted")
        return INTERRUPTED
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
