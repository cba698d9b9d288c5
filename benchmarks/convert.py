"""`moeconv convert` against its floors and against MaxText's own exporter, in one run.

    python benchmarks/convert.py [--quick] [--repeat 3] [--work DIR] [--json FILE]

Contenders take turns (A B C, A B C, …), each a whole process; figures are medians. What is measured
and how: benchmarks/README.md.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from _bench import (
    ENV,
    GB,
    MB,
    MOECONV,
    Bench,
    Checkpoint,
    Goal,
    machine,
    say,
    show,
    show_goals,
    warm,
)
from _measure import Run, Runs, measure, table
from _models import GROWING, MODELS, Model


class Converting(Bench):
    """Contenders for a conversion."""

    def convert(self, made: Checkpoint) -> Callable[[], Run]:
        options = ("--config", made.config, "--tokenizer", self.tokenizer, "--quiet")
        command = [*MOECONV, "convert", made.run, self.out, *options]
        return lambda: measure(command, self.work / "convert.log", ENV)

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


def compare(bench: Converting, made: Checkpoint) -> tuple[dict[str, Runs], list[Goal]]:
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


def grow(
    bench: Converting, models: Iterable[Model]
) -> tuple[list[Checkpoint], dict[str, Runs], Goal]:
    """The same model with more layers: chunks stay as large as they were."""
    made = [bench.checkpoint(model) for model in models]
    for each in made:
        warm(each)
    found = bench.turns({each.model.title: bench.convert(each) for each in made})
    first, last = (found[each.model.title].rss for each in (made[0], made[-1]))
    return made, found, Goal("peak memory, most layers / fewest", last / first, 1.1)


def start_up(bench: Converting) -> tuple[dict[str, Runs], Goal]:
    """How long a command takes to say anything."""
    log = bench.work / "help.log"
    found = bench.turns(
        {
            "moeconv --help": lambda: measure([*MOECONV, "--help"], log, ENV),
            "python -c pass": lambda: measure([sys.executable, "-c", "pass"], log),
        }
    )
    return found, Goal("moeconv --help, seconds", found["moeconv --help"].wall, 0.3)


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

    bench = Converting(told.work.resolve(), told.repeat)
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

    bench.show_noise()
    if told.json:
        told.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
