"""Loss curves of fp32, fp16 with loss scaling and fp16 without, in one run of MaxText's own loop.

    python benchmarks/fp16_curve.py [--steps 200] [--quick] [--work DIR] [--plot PNG] [--replot]

The embedded stories and the blocks of train/configs/tiny_cpu.yml, made narrower, but as many
positions a step as the reference run (16,384): the loss is their mean, so each one's share of the
gradient is as small as there. Everything but dtype and loss scale is the same in all three,
weights and batches too. `--replot` draws the last run's numbers again. Needs matplotlib.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "train" / "configs" / "tiny_cpu.yml"
PLOT = ROOT / "docs" / "images" / "fp16_loss.png"
MODEL = {
    "base_num_decoder_layers": 2,
    "base_emb_dim": 64,
    "head_dim": 16,
    "base_mlp_dim": 128,
    "base_moe_mlp_dim": 128,
    "per_device_batch_size": 128,
    "ici_data_parallelism": 1,
    "float32_logits": True,
    "float32_gate_logits": True,
    "enable_checkpointing": False,
    "save_checkpoint_on_completion": False,
}
# name, dtype, the loss scale's mode, colour
RUNS = (
    ("fp32", "float32", "off", "#1f2937"),
    ("fp16, dynamic loss scale", "float16", "dynamic", "#0f9d58"),
    ("fp16, no loss scale", "float16", "off", "#d93025"),
)


def data(directory: Path) -> dict[str, Path | str]:
    """The embedded stories as stock MaxText reads them: one a row, which it pads."""
    from moeconv_train.data.records import write_shard
    from moeconv_train.tokenizer import TOKENIZER, read_stories
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|end_of_text|>")
    rows = [[*e.ids, eos] for e in tokenizer.encode_batch(read_stories())]
    write_shard(directory / "stories.array_record", [{"text": row} for row in rows])
    return {
        "tokenizer_type": "huggingface",
        "tokenizer_path": TOKENIZER,
        "grain_train_files": directory / "stories.array_record",
    }


def run(name: str, dtype: str, mode: str, steps: int, work: Path, quick: bool) -> dict[str, Any]:
    """One training run; its loss at every step and what else the table shows."""
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train
    from moeconv_train import fp16_head, loss_scaling

    slug = name.replace(",", "").replace(" ", "_")
    log = work / f"{slug}.jsonl"
    log.unlink(missing_ok=True)
    keys: Mapping[str, Any] = {
        **MODEL,
        **data(work / "data"),
        **({"per_device_batch_size": 8} if quick else {}),
        "dtype": dtype,
        "steps": steps,
        "run_name": slug,
        "base_output_directory": work,
        "metrics_file": log,
    }
    with contextlib.redirect_stdout(sys.stderr):
        config = pyconfig.initialize(["", str(CONFIG), *(f"{k}={v}" for k, v in keys.items())])
        begin = time.monotonic()
        settings = loss_scaling.LossScaleSettings(mode=mode)
        with loss_scaling.install(settings), fp16_head.install():
            train.train_loop(config, None)
        seconds = time.monotonic() - begin
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {
        "name": name,
        "loss": [row["learning/lm_loss"] for row in rows],
        "tokens": statistics.mean(row["learning/total_weights"] for row in rows),
        "loss_scale": [row.get("learning/loss_scale") for row in rows],
        "skipped": rows[-1].get("learning/skipped_steps", 0),
        "seconds": seconds,
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: the loss along the way, and how far it is from fp32's."""
    reference = runs[0]["loss"]
    steps = len(reference)
    shown = [round(steps * part) - 1 for part in (0.1, 0.25, 0.5, 0.75, 1.0)]
    heads = [f"step {step + 1}" for step in shown]
    lines = [
        f"| | {' | '.join(heads)} | mean distance from fp32 | largest | skipped |",
        "| --- |" + " ---: |" * (len(heads) + 3),
    ]
    for each in runs:
        away = [abs(a - b) for a, b in zip(each["loss"], reference, strict=True)]
        cells = [f"{each['loss'][step]:.4f}" for step in shown]
        cells += [f"{statistics.mean(away):.4f}", f"{max(away):.4f}", f"{each['skipped']:.0f}"]
        lines.append(f"| {each['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """The three curves, and below them the distance from fp32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {name: colour for name, _, _, colour in RUNS}
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7.2, 5.4), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    for each in runs:
        name, steps = each["name"], range(1, len(each["loss"]) + 1)
        above.plot(
            steps,
            each["loss"],
            label=name,
            color=colours[name],
            linewidth=3.5 if name == "fp32" else 1.3,
            alpha=0.35 if name == "fp32" else 1,
        )
        if each is not runs[0]:
            away = [a - b for a, b in zip(each["loss"], runs[0]["loss"], strict=True)]
            below.plot(steps, away, color=colours[name], linewidth=1.3)
    above.set_ylabel("training loss")
    above.legend(frameon=False)
    below.axhline(0, color="#9ca3af", linewidth=0.8)
    below.set_ylabel("minus fp32's")
    below.set_xlabel("step")
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Runs, prints the table, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="1,024 positions a step, 10 steps")
    parser.add_argument("--work", type=Path, default=Path("bench-out", "fp16_curve"))
    parser.add_argument("--plot", type=Path, help=f"default: {PLOT.relative_to(ROOT)}")
    parser.add_argument("--replot", action="store_true", help="from the numbers of the last run")
    args = parser.parse_args()
    work = args.work.absolute()
    numbers = work / "curves.json"
    if not args.replot:
        work.mkdir(parents=True, exist_ok=True)
        steps = 10 if args.quick else args.steps
        runs = [run(name, dtype, mode, steps, work, args.quick) for name, dtype, mode, _ in RUNS]
        numbers.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    elif not numbers.is_file():
        parser.error(f"there are no numbers in {numbers}")
    runs = json.loads(numbers.read_text(encoding="utf-8"))
    print(f"{len(runs[0]['loss'])} steps of {runs[0]['tokens']:.0f} tokens on average\n")
    print(table(runs))
    if args.plot or not args.quick:
        plot(runs, args.plot or PLOT)


if __name__ == "__main__":
    main()
