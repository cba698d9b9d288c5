"""The plots of a report, from the report's own figures: what is drawn is what verify.json says."""

import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moeconv.verification.checks import Check
from moeconv.verification.levels import RUNNING, Level
from moeconv.verification.report.report import Report

KL_PLOT, ERROR_PLOT, LOGIT_PLOT = (
    "verify_kl_by_position.png",
    "verify_error_by_layer.png",
    "verify_logits.png",
)
PLOTS = (KL_PLOT, ERROR_PLOT, LOGIT_PLOT)
# A logarithmic axis has no 0.
_FLOOR = 1e-18


def find(report: Report, level: Level, name: str) -> Check | None:
    """A check of a report."""
    return next((c for c in report.checks if (c.level, c.name) == (level, name)), None)


def parity_of(report: Report) -> Check | None:
    """The logits that the report shows: those of the whole models, else of the layers."""
    return next((found for level in RUNNING if (found := find(report, level, "parity"))), None)


def draw_plots(report: Report, folder: Path) -> list[Path]:
    """Draws what the levels that ran gave figures for; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    drawn = []
    if (parity := parity_of(report)) is not None:
        drawn += [_kl(parity, folder / KL_PLOT), _logits(parity, folder / LOGIT_PLOT)]
    if (hidden := find(report, Level.LAYERS, "hidden")) is not None:
        drawn.append(_errors(hidden, folder / ERROR_PLOT))
    return drawn


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=90)
    return path


def _drawn(values: Iterable[float | None]) -> list[float]:
    """Values for a logarithmic axis; a gap where one is NaN or infinite."""
    return [math.nan if value is None else max(value, _FLOOR) for value in values]


def _kl(parity: Check, path: Path) -> Path:
    figure, axes = _axes("KL by position", "position in the row", "KL (nats)")
    for key, name in (
        ("kl_by_position_stock", "MaxText as it is"),
        ("kl_by_position", "MaxText, head unrounded"),
    ):
        if (found := parity.metrics.get(key)) is None:
            continue
        (line,) = axes.plot(found["position"], _drawn(found["mean"]), label=f"{name}: mean")
        largest = _drawn(found["max"])
        axes.plot(found["position"], largest, ":", color=line.get_color(), label=f"{name}: largest")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return _save(figure, path)


def _logits(parity: Check, path: Path) -> Path:
    pairs = [pair for pair in parity.metrics["logit_pairs"] if None not in pair]
    figure, axes = _axes("Logits", "reference", "converted model")
    axes.plot([p[0] for p in pairs], [p[1] for p in pairs], ".", markersize=2)
    if pairs:
        ends = [min(min(p) for p in pairs), max(max(p) for p in pairs)]
        axes.plot(ends, ends, linewidth=0.8, color="black", label="equal")
        axes.legend(fontsize=8)
    return _save(figure, path)


def _errors(hidden: Check, path: Path) -> Path:
    from matplotlib.ticker import MaxNLocator

    places = [p for p in hidden.metrics["places"] if p["part"] == "output"]
    layers = [p["layer"] for p in places]
    figure, axes = _axes("Difference of hidden states by layer", "layer", "relative difference")
    for key, name in (
        ("own", "grown so far"),
        ("local", "arising in the layer"),
        ("rounding", "rounding alone, in the layer"),
    ):
        values = [p[key]["largest"] for p in places if p[key] is not None]
        if len(values) == len(layers):
            axes.plot(layers, _drawn(values), "o-", markersize=3, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return _save(figure, path)
