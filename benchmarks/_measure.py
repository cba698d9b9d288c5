"""One process, measured: wall time and the kernel's own high-water mark of its memory.

The caller has to stay small (standard library only): Linux carries a parent's peak over into the
child that it starts, so a fat bench would measure itself.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Run:
    """What one process took.

    `others` is how many processors everybody else kept busy meanwhile: the noise.
    """

    wall: float
    rss: int
    cpu: float
    others: float


@dataclass(frozen=True)
class Runs:
    """The runs of one contender; its figures are medians."""

    runs: tuple[Run, ...]

    @property
    def wall(self) -> float:
        return statistics.median(r.wall for r in self.runs)

    @property
    def rss(self) -> float:
        return statistics.median(r.rss for r in self.runs)

    @property
    def cpu(self) -> float:
        return statistics.median(r.cpu for r in self.runs)

    def span(self) -> str:
        walls = [r.wall for r in self.runs]
        return f"{min(walls):.2f} to {max(walls):.2f}"

    def as_json(self) -> dict[str, Any]:
        medians = {"wall": self.wall, "rss": self.rss, "cpu": self.cpu}
        return {"median": medians, "runs": [asdict(r) for r in self.runs]}


def measure(command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> Run:
    """Runs a command to its end, its output into `log`; a failure ends the bench.

    Memory is `ru_maxrss`, the peak of the largest process of the tree; every contender here is a
    single process.
    """
    words = [str(word) for word in command]
    with log.open("wb") as out:
        busy, begin = _busy(), time.perf_counter()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall, busy = time.perf_counter() - begin, _busy() - busy
    process.returncode = code = os.waitstatus_to_exitcode(status)
    if code:
        tail = log.read_text(errors="replace").splitlines()[-25:]
        sys.exit("\n".join([*tail, f"bench: `{' '.join(words)}` ended with {code}; see {log}"]))
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall, usage.ru_maxrss * 1024, cpu, max(0.0, busy - cpu) / wall)


def _busy() -> float:
    """Processor seconds that the machine has spent on anything so far."""
    user, nice, system, _, _, irq, softirq, *_ = (
        int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / _TICKS


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown with aligned columns; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(_aligned(cell, i, widths[i]) for i, cell in enumerate(row)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths))
    return "\n".join([lines[0], rule + "|", *lines[1:]])


def _aligned(cell: str, column: int, width: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)
