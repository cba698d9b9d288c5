"""The real command line, in this process (fast) or as a process of its own (for signals)."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from moeconv.cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """Lines on stderr but for warnings."""
        return [line for line in self.err.splitlines() if not line.startswith("warning: ")]

    @property
    def error(self) -> str:
        """The one sentence of a failure (with its list, if it has one)."""
        assert self.err.count("error: ") == 1, self.err
        assert "Traceback" not in self.err, self.err
        return self.err.split("error: ", 1)[1].strip()


def moeconv(*args: object) -> Ran:
    """Runs `moeconv ARGS` as a user would, in this process."""
    argv, handlers = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["moeconv", *map(str, args)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Ran(code, out.getvalue(), err.getvalue())


def commands_but(*used: str) -> list[str]:
    """The files of the other commands: `main` names them, and imports what is run (proofs)."""
    others = [module for command, (module, _) in COMMANDS.items() if command not in used]
    return [f"{module.replace('.', '/')}.py" for module in others]


def command(*args: object) -> list[str]:
    """The command line of a process that runs `moeconv ARGS`."""
    return [sys.executable, "-m", "moeconv.cli.main", *map(str, args)]


def environment(**extra: str) -> dict[str, str]:
    """This environment, with the checkout importable from anywhere."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **extra}


def spawn(*args: object, **extra: str) -> "subprocess.Popen[str]":
    """Starts `moeconv ARGS` as a process of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(*args), stdout=pipe, stderr=pipe, errors="replace", env=environment(**extra)
    )


def run(*args: object, **extra: str) -> Ran:
    """Runs `moeconv ARGS` as a process of its own."""
    process = spawn(*args, **extra)
    out, err = process.communicate(timeout=300)
    return Ran(process.returncode, out, err)
