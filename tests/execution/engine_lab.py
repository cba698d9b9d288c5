"""What the tests of the engine share: converting, what it left, and interrupting it."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cli_runner
from safetensors import safe_open

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion

MIB = 2**20


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def beside(out: Path) -> list[str]:
    """What moeconv has left beside OUT."""
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}."))


def partial(out: Path) -> Path:
    return out.parent / f".{out.name}.moeconv-partial"


def tensors(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            names = file.keys()
            found |= {name: file.get_tensor(name).tobytes() for name in names}
    return found


def options(checkpoint, **more) -> ConvertOptions:
    return ConvertOptions(config=checkpoint.run / "config.yml", **{"jobs": 2, **more})


def to(checkpoint, out: Path, **more):
    """Converts in this process."""
    return convert(plan_conversion(str(checkpoint.run), options(checkpoint, **more)), out)


def journaled(out: Path) -> int:
    """Units that the journal has."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return (partial(out) / "journal.jsonl").read_bytes().count(b"\n") - 1
    return -1


MOMENTS = {
    "claimed": lambda out: partial(out).exists(),
    "begun": lambda out: journaled(out) >= 1,
    "early": lambda out: journaled(out) >= 8,
    "middle": lambda out: journaled(out) >= 40,
    "late": lambda out: journaled(out) >= 75,
    "publishing": lambda out: (partial(out) / "config.json").exists() or out.exists(),
}


def interrupted(checkpoint, out: Path, moment: str, number: int, *flags: str) -> cli_runner.Ran:
    """Starts a conversion and sends it a signal at a moment; again, if that came too late."""
    config = checkpoint.run / "config.yml"
    args = ("convert", checkpoint.run, out, "--config", config, "--jobs", 1, "--quiet", *flags)
    for _ in range(10):
        process = cli_runner.spawn(*args)
        while process.poll() is None and not MOMENTS[moment](out):
            time.sleep(0.0003)
        process.send_signal(number)
        said, err = process.communicate(timeout=60)
        if process.returncode != 0 or moment == "publishing":
            break
        shutil.rmtree(out)
    return cli_runner.Ran(process.returncode, said, err)


class Crashes:
    """`crash_server.py`, asked from here."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", Path(__file__).with_name("crash_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=cli_runner.environment(),
        )

    def convert(self, checkpoint, out: Path, *flags: str, die=None, swap=True):
        config = checkpoint.run / "config.yml"
        argv = ["convert", checkpoint.run, out, "--config", config, "--jobs", 2, *flags]
        request = {"argv": [str(a) for a in argv], "die": die, "swap": swap}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def leave_unfinished(self, checkpoint, out: Path, *flags: str) -> None:
        """Dies when every unit is in the journal and config.json is about to be synced."""
        units = len(checkpoint.arrays)
        self.convert(checkpoint, out, *flags, die=["fsync", units + 1])
        assert journaled(out) == units

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)
