"""The plot of a run's losses, from the points that the manifest holds."""

import importlib.util
import io
from collections.abc import Sequence
from typing import TypeGuard

from moeconv.maxtext.run_record import Measured, RunRecord


def has_curve(run: RunRecord | None) -> TypeGuard[RunRecord]:
    """True if there is something to draw."""
    return run is not None and len(run.train_curve) > 1


def draw_losses(run: RunRecord | None) -> bytes | None:
    """A PNG; None without a curve, or without matplotlib."""
    if not has_curve(run) or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.6), layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title="Loss", xlabel="step", ylabel="cross entropy (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.plot(*_xy(run.train_curve), linewidth=1, label="training")
    if run.evaluation_curve:
        axes.plot(*_xy(run.evaluation_curve), "o-", markersize=4, label="evaluation")
    axes.legend(fontsize=8)
    image = io.BytesIO()
    # Without the version that matplotlib would write: the same losses give the same bytes.
    canvas.print_png(image, metadata={"Software": None})
    return image.getvalue()


def _xy(curve: Sequence[Measured]) -> tuple[list[int], list[float]]:
    return [point.step for point in curve], [point.loss for point in curve]
