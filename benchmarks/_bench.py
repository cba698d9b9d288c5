"""What every bench of whole processes shares: checkpoints, turns, goals, and how all is printed."""

import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _measure import Run, Runs, measure, table
from _models import Model

HERE = Path(__file__).resolve().parent
MOECONV = (sys.executable, "-m", "moeconv.cli.main")
ENV = {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
MB, GB = 10**6, 10**9


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, and what moeconv plans for it."""

    model: Model
    run: Path
    plan: Mapping[str, Any]
    parameters: int

    @property
    def items(self) -> Path:
        return self.run / "checkpoints" / "1" / "items"

    @property
    def config(self) -> Path:
        return self.run / "config.yml"


class Bench:
    """Makes checkpoints, and measures processes in turn."""

    def __init__(self, work: Path, repeat: int) -> None:
        self.work, self.repeat = work, repeat
        self.out = work / "out"
        self.tokenizer = work / "tokenizer"
        self.runs: list[Run] = []
        work.mkdir(parents=True, exist_ok=True)
        if not self.tokenizer.exists():
            self._make("a tokenizer", self.tokenizer, "tokenizer")

    def _make(self, what: str, place: Path, kind: str, *spec: str) -> None:
        say(f"  making {what}")
        part = place.with_name(f"part-{place.name}")
        shutil.rmtree(part, ignore_errors=True)
        log = self.work / "make.log"
        measure([sys.executable, HERE / "_checkpoints.py", kind, part, *spec], log)
        part.rename(place)

    def checkpoint(self, model: Model) -> Checkpoint:
        """Made by MaxText, or found from an earlier run."""
        spec = json.dumps({"overrides": dict(model.overrides), "full_state": model.full_state})
        key = hashlib.sha256(f"{version('maxtext')} {spec}".encode()).hexdigest()[:12]
        run = self.work / f"checkpoint-{key}"
        if not run.exists():
            kind = "streamed" if model.streamed else "maxtext"
            self._make(model.title, run, kind, spec)
        told = ("--config", run / "config.yml", "--json")
        inspected = _json([*MOECONV, "inspect", run, *told])
        plan = _json([*MOECONV, "convert", run, self.out, *told, "--dry-run"])
        return Checkpoint(model, run, plan, inspected["num_parameters"])

    def turns(self, contenders: Mapping[str, Callable[[], Run]]) -> dict[str, Runs]:
        """All of them once, then all of them again."""
        found: dict[str, list[Run]] = {name: [] for name in contenders}
        for _ in range(self.repeat):
            for name, contend in contenders.items():
                shutil.rmtree(self.out, ignore_errors=True)
                os.sync()  # nobody pays for what another has left to write
                found[name].append(contend())
        shutil.rmtree(self.out, ignore_errors=True)
        self.runs += [run for runs in found.values() for run in runs]
        return {name: Runs(tuple(runs)) for name, runs in found.items()}

    def show_noise(self) -> None:
        others = [run.others for run in self.runs]
        say(
            f"\nmeanwhile other processes kept {statistics.median(others):.1f} of "
            f"{os.cpu_count()} processors busy (median; at most {max(others):.1f})"
        )

    def floor(self, *words: object) -> Callable[[], Run]:
        command = [sys.executable, HERE / "_floors.py", *map(str, words)]
        return lambda: measure(command, self.work / "floor.log")


@dataclass(frozen=True)
class Goal:
    """A number that was promised."""

    what: str
    value: float
    limit: float | None = None

    def line(self) -> tuple[str, str, str, str]:
        if self.limit is None:
            return self.what, f"{self.value:.2f}", "", ""
        met = "yes" if self.value <= self.limit else "no"
        return self.what, f"{self.value:.2f}", f"≤ {self.limit:.2f}", met


def warm(made: Checkpoint) -> None:
    """Reads every file once, so that nobody waits for the disk to read."""
    buffer = bytearray(8 << 20)
    for path in made.run.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def machine(work: Path) -> dict[str, str]:
    """Where all this was measured."""
    info = Path("/proc/cpuinfo").read_text()
    names = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [m for m in mounts if work.is_relative_to(m[1])]
    packages = ("moeconv", "maxtext", "jax", "orbax-checkpoint", "tensorstore", "numpy")
    return {
        "processor": f"{os.cpu_count()} × {names[0] if names else platform.machine()}",
        "memory": f"{memory / 2**30:.0f} GiB",
        "file system": max(inside, key=lambda m: len(m[1]))[2],
        "kernel": platform.release(),
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {_version(p)}" for p in packages)]
        ),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "from source"


def _json(command: list[Any]) -> dict[str, Any]:
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **ENV}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stderr}bench: `{' '.join(map(str, command))}` failed")
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def say(text: str = "") -> None:
    print(text, flush=True)


def show(found: Mapping[str, Runs]) -> None:
    rows = [("", "wall s", "(from … to)", "CPU s", "peak MB")]
    rows += [
        (name, f"{r.wall:.2f}", r.span(), f"{r.cpu:.2f}", f"{r.rss / MB:,.0f}")
        for name, r in found.items()
    ]
    say(table(rows))


def show_goals(goals: Iterable[Goal]) -> None:
    say()
    say(table([("", "measured", "goal", "met"), *(goal.line() for goal in goals)]))
