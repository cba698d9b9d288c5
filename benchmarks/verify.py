"""`moeconv verify`: level weights against the read floor; time and memory of logits and layers.

    python benchmarks/verify.py [--quick] [--large [NAME] [--experts N]] [--repeat 3] [--work DIR]
        [--json FILE]

`--large` measures level layers on one layer of a large model's size instead: Mixtral 8x7B's takes
16 GB, Qwen3-235B-A22B's and DeepSeek-V3's are computed in groups of experts. What is measured and
how: benchmarks/README.md.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _bench import (
    ENV,
    GB,
    HERE,
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
from _measure import Run, measure, table
from _models import DEEPSEEK_V3, LARGE, MODELS, QWEN3_235B, Model

TOKENS = 512
# By the name that `--large` takes: the most memory that level layers may hold, in GB in all.
LAYERS = {"mixtral": (LARGE, 24), "qwen3": (QWEN3_235B, 12), "deepseek": (DEEPSEEK_V3, 12)}


class Verifying(Bench):
    """Converts once, and verifies."""

    def converted(self, made: Checkpoint, *options: str) -> Path:
        """The output of a checkpoint, made anew."""
        out = self.work / "verified"
        shutil.rmtree(out, ignore_errors=True)
        told = ("--config", made.config, "--tokenizer", self.tokenizer, "--quiet")
        command = [*MOECONV, "convert", made.run, out, *told, *options]
        measure(command, self.work / "convert.log", ENV)
        return out

    def weights(self, made: Checkpoint, out: Path) -> Run:
        command = [*MOECONV, "verify", out, "--level", "weights", "--report", self.work / "report"]
        return measure([*command, "--source", made.run], self.work / "verify.log", ENV)

    def inside(self, level: str, made: Checkpoint, out: Path) -> dict[str, Any]:
        """A level in a process that has imported everything beforehand."""
        scratch = self.work / "scratch"
        scratch.mkdir(exist_ok=True)
        log = self.work / f"{level}.log"
        words = [level, out, made.run, made.config, TOKENS, scratch]
        run = measure([sys.executable, HERE / "_verify.py", *words], log, ENV)
        found: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
        if found["verdict"] != "pass":
            sys.exit(f"bench: level {level} says {found['verdict']}: {found['checks']}")
        self.runs.append(run)
        return {**found, "whole": run.rss}


def weights(bench: Verifying, made: Checkpoint, out: Path) -> list[Goal]:
    """As fast as half of what reading the checkpoint alone takes."""
    found = bench.turns(
        {
            "moeconv verify --level weights": lambda: bench.weights(made, out),
            "read floor": bench.floor("read", made.items),
        }
    )
    show(found)
    ours, floor = found.values()
    return [Goal("level weights, wall / read floor", ours.wall / floor.wall, 2.0)]


def models(bench: Verifying, chosen: Sequence[tuple[str, Checkpoint, Path]]) -> list[Goal]:
    """Both forward passes, after the imports."""
    rows = [("", "parameters", "seconds", "peak MB", "without mapped files", "imports")]
    goals = []
    for level, made, out in chosen:
        found = bench.inside(level, made, out)
        rows.append(
            (
                f"level {level}, {made.model.title}",
                f"{made.parameters / MB:,.0f}M",
                f"{found['seconds']:.0f}",
                *(f"{found[key] / MB:,.0f}" for key in ("rss", "anonymous", "imports")),
            )
        )
        if level == "logits":
            goals.append(Goal("level logits, seconds", found["seconds"], 180))
        elif most := next((gb for one, gb in LAYERS.values() if made.model.is_of(one)), None):
            goals.append(Goal(f"{made.model.title}, GB in all", found["whole"] / GB, most))
        else:
            goals.append(Goal("level layers, GB beyond imports", found["rss"] / GB, 2.0))
    say(table(rows))
    return goals


def demand_room(work: Path, model: Model) -> None:
    """Ends the bench where the checkpoint, the output and 4 GB more do not fit on the disk."""
    given = model.overrides
    experts = 3 * given["num_experts"] * given["base_moe_mlp_dim"] * given["base_emb_dim"]
    needed, free = 2 * experts * 2 + 4 * GB, shutil.disk_usage(work).free
    if free < needed:
        sys.exit(
            f"bench: {model.title} takes {needed / GB:.0f} GB of disk, checkpoint and output; "
            f"{work} has {free / GB:.0f} GB left, so nothing is measured; --work names another disk"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models: a test of the bench")
    parser.add_argument(
        "--large", nargs="?", const="all", choices=[*LAYERS, "all"], help="layers of large models"
    )
    parser.add_argument("--experts", type=int, metavar="N", help="only so many of a large layer")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default 3)")
    parser.add_argument("--work", type=Path, default=Path("bench-out"), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, as JSON")
    told = parser.parse_args()
    interleaved, all_moe = (replace(model, full_state=False) for model in MODELS)
    if told.quick:
        interleaved, all_moe = interleaved.tiny(), all_moe.tiny()

    bench = Verifying(told.work.resolve(), told.repeat)
    report: dict[str, Any] = {"machine": machine(bench.work), "goals": {}}
    for key, value in report["machine"].items():
        say(f"{key}: {value}")
    cases: list[tuple[Model, list[str], list[str]]] = [
        (interleaved, ["logits"], []),
        (all_moe, ["weights", "layers"], []),
    ]
    if told.large:
        named = LAYERS if told.large == "all" else [told.large]
        chosen = [LAYERS[name][0] for name in named]
        if told.experts:
            chosen = [model.with_experts(told.experts) for model in chosen]
        cases = [(model, ["layers"], ["--dtype", "bfloat16"]) for model in chosen]
    for model, levels, options in cases:
        say(f"\n## {model.title}\n")
        if told.large:
            demand_room(bench.work, model)
        made = bench.checkpoint(model)
        out = bench.converted(made, *options)
        warm(made)
        goals = weights(bench, made, out) if "weights" in levels else []
        chosen = [(level, made, out) for level in levels if level != "weights"]
        goals += models(bench, chosen)
        show_goals(goals)
        if told.large:  # of tens of GB nothing is kept
            shutil.rmtree(made.run)
            shutil.rmtree(out)
        report["goals"] |= {g.what: {"value": g.value, "goal": g.limit} for g in goals}
    bench.show_noise()
    if told.json:
        told.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
