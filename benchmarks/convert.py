"""`moeconv convert` against its floors and against MaxText's own exporter, in one run.

    python benchmarks/convert.py [--quick] [--repeat 3] [--work DIR] [--json FILE]

Contenders take turns (A B C, A B C, …), each a whole process; figures are medians. What is measured
and how: benchmarks/README.md.
"""

import argparse
import hashlib
import importlib.util
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

HERE = Path(__file__).resolve().parent
MOECONV = (sys.executable, "-m", "moeconv.cli.main")
ENV = {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
MB, GB = 10**6, 10**9

REFERENCE: Mapping[str, Any] = {
    "base_emb_dim": 768,
    "base_num_query_heads": 12,
    "base_num_kv_heads": 12,
    "head_dim": 64,
    "base_mlp_dim": 3072,
    "base_moe_mlp_dim": 3072,
    "base_num_decoder_layers": 6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 128256,
    "max_target_length": 2048,
    "logits_via_embedding": True,
}
INTERLEAVED: Mapping[str, Any] = {
    "decoder_block": "envy",
    "interleave_moe_layer_step": 2,
    "inhomogeneous_layer_cycle_interval": 2,
    "use_qk_norm": False,
    "use_post_ffw_norm": False,
}
ALL_MOE: Mapping[str, Any] = {"decoder_block": "mixtral"}
# One chunk an array and layer: with more layers there are more chunks, none is larger.
NARROW: Mapping[str, Any] = {
    **REFERENCE,
    **ALL_MOE,
    "base_emb_dim": 512,
    "base_num_query_heads": 8,
    "base_num_kv_heads": 8,
    "base_mlp_dim": 1024,
    "base_moe_mlp_dim": 1024,
    "vocab_size": 32000,
    "scan_layers": False,
}
TINY: Mapping[str, Any] = {
    "base_emb_dim": 64,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 4,
    "head_dim": 16,
    "base_mlp_dim": 128,
    "base_moe_mlp_dim": 128,
    "base_num_decoder_layers": 2,
    "num_experts": 4,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Model:
    """A checkpoint to convert."""

    title: str
    overrides: Mapping[str, Any]
    full_state: bool = False
    exporter: bool = False  # MaxText's exporter has a mapping for it

    def tiny(self) -> "Model":
        """The same in a fraction of a second, to test the bench itself."""
        overrides = {**self.overrides, **TINY}
        return Model(f"{self.title}, tiny", overrides, self.full_state, self.exporter)

    def layers(self, count: int) -> "Model":
        return Model(f"{count} layers", {**self.overrides, "base_num_decoder_layers": count})


MODELS = (
    Model("reference, interleaved, train state", {**REFERENCE, **INTERLEAVED}, full_state=True),
    Model("all-MoE, parameters only", {**REFERENCE, **ALL_MOE}, exporter=True),
)
GROWING = Model("growing", NARROW)


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
            self._make(f"{model.title} by MaxText", run, "maxtext", spec)
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

    def convert(self, made: Checkpoint) -> Callable[[], Run]:
        options = ("--config", made.config, "--tokenizer", self.tokenizer, "--quiet")
        command = [*MOECONV, "convert", made.run, self.out, *options]
        return lambda: measure(command, self.work / "convert.log", ENV)

    def floor(self, *words: object) -> Callable[[], Run]:
        command = [sys.executable, HERE / "_floors.py", *map(str, words)]
        return lambda: measure(command, self.work / "floor.log")

    def exporter(self, made: Checkpoint) -> Callable[[], Run]:
        """MaxText's own, as its users call it; only the tokenizer comes from a folder."""
        (package,) = importlib.util.find_spec("maxtext").submodule_search_locations
        settings = {
            **made.model.overrides,
            "model_name": "mixtral-8x7b",
            "override_model_config": True,
            "load_parameters_path": made.items,
            "base_output_directory": self.out,
            "scan_layers": True,
            "weight_dtype": "float32",
            "attention": "dot_product",
            "hardware": "cpu",
            "skip_jax_distributed_system": True,
        }
        command = [
            *(sys.executable, "-m", "maxtext.checkpoint_conversion.to_huggingface"),
            Path(package, "configs", "base.yml"),
            *(f"{key}={value}" for key, value in settings.items()),
            *("--override_model_architecture", f"--hf_model_path={self.tokenizer}"),
        ]
        return lambda: self._whole(measure(command, self.work / "exporter.log", ENV), made)

    def _whole(self, run: Run, made: Checkpoint) -> Run:
        """Refuses a contender that wrote less than the model."""
        written = sum(file.stat().st_size for file in self.out.glob("*.safetensors"))
        if written < 0.99 * made.plan["write_bytes"]:
            sys.exit(f"bench: MaxText's exporter wrote {written:,} bytes, which is no whole model")
        return run


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


def compare(bench: Bench, made: Checkpoint) -> tuple[dict[str, Runs], list[Goal]]:
    """One checkpoint: moeconv, both floors, and the exporter where it can."""
    warm(made)
    sizes = [file["bytes"] for file in made.plan["files"]]
    contenders = {
        "moeconv convert": bench.convert(made),
        "read floor": bench.floor("read", made.items),
        "write floor": bench.floor("write", bench.out, *sizes),
    }
    if made.model.exporter:
        contenders["MaxText to_huggingface"] = bench.exporter(made)
    found = bench.turns(contenders)
    ours, read, write = (found[n] for n in ("moeconv convert", "read floor", "write floor"))
    goals = [
        Goal("wall / (read + write floor)", ours.wall / (read.wall + write.wall), 1.3),
        Goal("wall / the slower floor", ours.wall / max(read.wall, write.wall)),
        Goal("peak memory / read floor's", ours.rss / read.rss, 1.3),
        Goal("peak memory / planned", ours.rss / made.plan["memory_budget"], 1.0),
    ]
    if theirs := found.get("MaxText to_huggingface"):
        goals.insert(2, Goal("wall / MaxText's exporter", ours.wall / theirs.wall, 0.2))
        goals.append(Goal("peak memory / MaxText's exporter", ours.rss / theirs.rss))
    return found, goals


def grow(bench: Bench, models: Iterable[Model]) -> tuple[list[Checkpoint], dict[str, Runs], Goal]:
    """The same model with more layers: chunks stay as large as they were."""
    made = [bench.checkpoint(model) for model in models]
    for each in made:
        warm(each)
    found = bench.turns({each.model.title: bench.convert(each) for each in made})
    first, last = (found[each.model.title].rss for each in (made[0], made[-1]))
    return made, found, Goal("peak memory, most layers / fewest", last / first, 1.1)


def warm(made: Checkpoint) -> None:
    """Reads every file once, so that nobody waits for the disk to read."""
    buffer = bytearray(8 << 20)
    for path in made.run.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def start_up(bench: Bench) -> tuple[dict[str, Runs], Goal]:
    """How long a command takes to say anything."""
    log = bench.work / "help.log"
    found = bench.turns(
        {
            "moeconv --help": lambda: measure([*MOECONV, "--help"], log, ENV),
            "python -c pass": lambda: measure([sys.executable, "-c", "pass"], log),
        }
    )
    return found, Goal("moeconv --help, seconds", found["moeconv --help"].wall, 0.3)


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


def show_growth(made: Iterable[Checkpoint], found: Mapping[str, Runs]) -> None:
    rows = [("layers", "parameters", "read + written", "wall s", "s per GB", "peak MB")]
    for each in made:
        runs = found[each.model.title]
        moved = (each.plan["read_bytes"] + each.plan["write_bytes"]) / GB
        rows.append(
            (
                str(each.model.overrides["base_num_decoder_layers"]),
                f"{each.parameters / MB:,.0f}M",
                f"{moved:.2f} GB",
                f"{runs.wall:.2f}",
                f"{runs.wall / moved:.2f}",
                f"{runs.rss / MB:,.0f}",
            )
        )
    say(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models: a test of the bench")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default 3)")
    parser.add_argument("--work", type=Path, default=Path("bench-out"), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single run, as JSON")
    told = parser.parse_args()
    models, growing, layers = MODELS, GROWING, (6, 12, 24)
    if told.quick:
        models, growing, layers = tuple(m.tiny() for m in MODELS), GROWING.tiny(), (1, 2)

    bench = Bench(told.work.resolve(), told.repeat)
    report: dict[str, Any] = {"machine": machine(bench.work), "models": {}}
    for key, value in report["machine"].items():
        say(f"{key}: {value}")
    say(f"medians of {told.repeat} in turn, whole processes, page cache warm")
    if told.quick:
        say("--quick: models so small that only start-up counts; no figure below means anything")

    say()
    found, goal = start_up(bench)
    show(found)
    show_goals([goal])
    report["start-up"] = {name: runs.as_json() for name, runs in found.items()}

    for model in models:
        say()
        made = bench.checkpoint(model)
        read, written = made.plan["read_bytes"] / GB, made.plan["write_bytes"] / GB
        title = f"{model.title}: {made.parameters / MB:,.0f}M parameters"
        say(f"## {title}, reads {read:.2f} GB, writes {written:.2f} GB\n")
        found, goals = compare(bench, made)
        show(found)
        show_goals(goals)
        report["models"][model.title] = {
            "parameters": made.parameters,
            "plan": {k: v for k, v in made.plan.items() if k not in ("tensors", "warnings")},
            "runs": {name: runs.as_json() for name, runs in found.items()},
            "ratios": {g.what: {"value": g.value, "goal": g.limit} for g in goals},
        }

    say("\n## growing with the model, chunks of one size\n")
    grown, found, goal = grow(bench, [growing.layers(count) for count in layers])
    show_growth(grown, found)
    show_goals([goal])
    report["growth"] = {name: runs.as_json() for name, runs in found.items()}

    others = [run.others for run in bench.runs]
    say(
        f"\nmeanwhile other processes kept {statistics.median(others):.1f} of {os.cpu_count()} "
        f"processors busy (median; at most {max(others):.1f})"
    )
    if told.json:
        told.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
