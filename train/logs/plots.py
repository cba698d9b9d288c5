"""Plots of a run's losses, from its metrics.jsonl, for its directory and the model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeconv_train.logs.metrics import read_metrics

from moeconv.arch.sidecar import MetricsLine

LOSS, SCALE = "loss.png", "loss_scale.png"


def write_plots(run_dir: Path) -> list[Path]:
    """Training and validation loss, learning rate, and with FP16 the loss scale.

    Returns:
        The files; none where there is nothing to show.

    Raises:
        ImportError: matplotlib is not installed.
    """
    lines = list(read_metrics(run_dir))
    trained = [line for line in lines if line.kind == "train"]
    if not trained:
        return []
    made = [_loss(run_dir / LOSS, trained, [line for line in lines if line.kind == "eval"])]
    scaled = [line for line in trained if line.loss_scale is not None]
    if scaled:
        made.append(_scale(run_dir / SCALE, scaled))
    return made


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values at each."""
    sums, found = 0.0, []
    for i, value in enumerate(values):
        sums += value - (values[i - window] if i >= window else 0.0)
        found.append(sums / min(i + 1, window))
    return found


def _loss(path: Path, trained: list[MetricsLine], evaluated: list[MetricsLine]) -> Path:
    figure, axes = _axes(2, "cross entropy per token, nats")
    steps = [line.step for line in trained]
    losses = [line.loss for line in trained]
    window = max(1, len(losses) // 100)
    top, bottom = axes
    top.plot(steps, losses, color="0.8" if window > 1 else "C0", linewidth=0.8, label="training")
    if window > 1:
        label = f"training, mean of {window} steps"
        top.plot(steps, smooth(losses, window), color="C0", label=label)
    if evaluated:
        points = [line.step for line in evaluated], [line.loss for line in evaluated]
        top.plot(*points, "o", color="C3", markersize=4, label="validation")
    top.legend()
    rates = [(line.step, line.learning_rate) for line in trained if line.learning_rate is not None]
    bottom.plot([step for step, _ in rates], [rate for _, rate in rates], color="C2")
    bottom.set_ylabel("learning rate")
    return _save(figure, axes, path)


def _scale(path: Path, scaled: list[MetricsLine]) -> Path:
    figure, axes = _axes(2, "loss scale")
    steps = [line.step for line in scaled]
    top, bottom = axes
    top.step(steps, [line.loss_scale or 0 for line in scaled], where="post")
    top.set_yscale("log", base=2)
    bottom.step(steps, [line.skipped_steps or 0 for line in scaled], where="post", color="C3")
    bottom.set_ylabel("steps left out")
    return _save(figure, axes, path)


def _axes(count: int, label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots(count, sharex=True, height_ratios=[3, 1])
    axes[0].set_ylabel(label)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib.ticker import MaxNLocator

    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for each in axes:
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path
