"""A plot of a run from its metrics.jsonl, for its directory."""

from pathlib import Path

from moeconv_train.logs.metrics import read_metrics

PLOT = "loss.png"


def write_plot(run_dir: Path) -> Path | None:
    """Training and validation loss, learning rate, and with FP16 the loss scale.

    Returns:
        The file; None where there is nothing to show.
    """
    import numpy as np
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.ticker import MaxNLocator

    lines = read_metrics(run_dir)
    trained = [line for line in lines if line.kind == "train"]
    if not trained:
        return None
    evaluated = [(line.step, line.loss) for line in lines if line.kind == "eval"]
    steps, losses = [line.step for line in trained], [line.loss for line in trained]
    below = {"learning rate": [line.learning_rate for line in trained]}
    if any(line.loss_scale for line in trained):
        below["loss scale"] = [line.loss_scale for line in trained]

    figure = Figure(figsize=(8, 4 + len(below)), layout="constrained")
    top, *rest = figure.subplots(1 + len(below), sharex=True, height_ratios=[3] + len(below) * [1])
    top.plot(steps, losses, color="0.8", linewidth=0.8, label="training")
    window = max(1, len(losses) // 100)
    mean = np.convolve(losses, np.full(window, 1 / window), "valid")
    top.plot(steps[window - 1 :], mean, label=f"training, mean of {window} steps")
    if evaluated:
        top.plot(*zip(*evaluated, strict=True), "o", color="C3", label="validation")
    top.set_ylabel("cross entropy per token, nats")
    top.legend()
    for axis, (label, values) in zip(rest, below.items(), strict=True):
        axis.step(steps, values, where="post", color="C2")
        axis.set_ylabel(label)
    if "loss scale" in below:
        rest[-1].set_yscale("log", base=2)
    rest[-1].set_xlabel("step")
    rest[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (top, *rest):
        axis.grid(alpha=0.3)
    figure.savefig(run_dir / PLOT, dpi=120, metadata={"Software": None})
    return run_dir / PLOT
