"""Runs moeconv in forked children, which may die at the n-th change they make to the disk.

Reads one JSON request a line, `{"argv": […], "die": N or [NAME, N] or null, "swap": true}`, answers
with one line: the exit status (negative: the signal) and how many calls were made. The child dies
instead of call N (from 0) of all, or of those to NAME. `fdatasync` has no number among all: how
often the background thread comes to it depends on the machine, and without it every run makes
equally many calls. With `swap` false, the file system is one that cannot exchange two folders.
Only functions of `os` are counted, which is what moeconv writes with; forking spares each run the
imports.
"""

import importlib
import itertools
import json
import os
import signal
import sys
import threading
from collections import Counter

CALLS = ("mkdir", "open", "posix_fallocate", "ftruncate", "pwrite", "fdatasync", "fsync",
         "unlink", "rmdir", "rename", "replace")  # fmt: skip
BY_NAME_ONLY = "fdatasync"


def watch(die: int | tuple[str, int] | None, log: int) -> None:
    """Notes every numbered call in `log`, and dies instead of the one that `die` names."""
    lock, made, numbered = threading.Lock(), Counter(), itertools.count()

    def watched(name):
        original = getattr(os, name)

        def call(*args, **kwargs):
            with lock:
                number = None if name == BY_NAME_ONLY else next(numbered)
                if die is not None and die in (number, (name, made[name])):
                    os.kill(os.getpid(), signal.SIGKILL)
                made[name] += 1
                if number is not None:
                    os.write(log, b".")
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, watched(name))


def serve() -> None:
    from moeconv.cli.main import main
    from moeconv.families import blocks, targets

    for name in (
        "api.convert",
        "cli.convert",
        "conversion.api",
        "execution.engine",
        "execution.staging",
        "hf.tokenizer",
    ):
        importlib.import_module(f"moeconv.{name}")
    for name in ("huggingface_hub.serialization", "rich.console", "rich.themes"):
        importlib.import_module(name)
    blocks(), targets()  # which imports the pages
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            silence = os.open(os.devnull, os.O_RDWR)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            if not request.get("swap", True):
                sys.modules["moeconv.execution.staging"]._exchange = lambda *names: False
            die = request["die"]
            watch(tuple(die) if isinstance(die, list) else die, write)
            sys.argv = ["moeconv", *request["argv"]]
            try:
                main()
            except SystemExit as end:
                os._exit(end.code or 0)
            finally:
                os._exit(99)
        os.close(write)
        with os.fdopen(read) as calls:
            made = len(calls.read())
        _, status = os.waitpid(child, 0)
        answer = {"code": os.waitstatus_to_exitcode(status), "calls": made}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
