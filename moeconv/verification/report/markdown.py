"""`verify.md`: the report for people, with every number from verify.json."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moeconv.verification.checks import Check, Status
from moeconv.verification.levels import RUNNING, Level
from moeconv.verification.measure.limits import LIMITS, PASS_ROUNDING, WARN_ROUNDING
from moeconv.verification.report.plots import ERROR_PLOT, KL_PLOT, LOGIT_PLOT, find
from moeconv.verification.report.report import Report
from moeconv.verification.report.tables import code, plain, table

_FIGURES = (
    ("positions", "positions"),
    ("max_abs", "largest difference of a logit"),
    ("mean_abs", "mean difference of a logit"),
    ("largest_logit", "largest logit"),
    ("kl_mean", "KL mean (nats)"),
    ("kl_median", "KL median (nats)"),
    ("kl_max", "KL largest (nats)"),
    ("top1_agreement", "same top token"),
    ("top5_agreement", "shared top five"),
    ("perplexity_reference", "perplexity, reference"),
    ("perplexity_candidate", "perplexity, converted"),
)
_COLUMNS = (("text", "text"), ("random", "random ids"), ("rounding", "rounding alone"))
_PARTS = ("attention", "router", "experts", "output")
_ABSENT = "—"


def verdict_line(report: Report) -> str:
    """The verdict in one sentence."""
    ran = [name for name, status in report.levels.items() if status is not Status.SKIP]
    if report.verdict is Status.PASS:
        levels = f"level{'s' if len(ran) > 1 else ''} {', '.join(ran)}"
        if report.proves:
            return f"PASS: the converted model is the one that was trained ({levels})."
        return (
            f"PASS: nothing is wrong at {levels}; that it is the model that was trained is proven "
            "by weights together with logits or layers."
        )
    if report.verdict is Status.SKIP:
        return "SKIPPED: nothing could be checked here."
    check = next((c for c in report.checks if c.status is report.verdict), None)
    if check is None:  # of a report that contradicts itself, which push refuses
        return f"{report.verdict.upper()}: no check says why."
    where = f", layer {check.layer}" if check.layer is not None else ""
    tensors = f" ({', '.join(check.tensors[:3])})" if check.tensors else ""
    word = "FAIL" if report.verdict is Status.FAIL else "WARN"
    return f"{word}: {check.level}/{check.name}{where}: {check.summary}{tensors}"


def to_markdown(report: Report, plots: Iterable[Path]) -> str:
    """The whole page."""
    drawn = {path.name for path in plots}
    parts = [
        "# Verification",
        f"**{plain(verdict_line(report))}**",
        f"moeconv {plain(report.moeconv_version)}; checkpoint digest {code(report.source)}; bound "
        f"to the "
        f"SHA-256 of {len(report.files)} files in verify.json: a change of one byte voids it.",
        "## Checks",
        table(
            ("level", "check", "verdict", "what was found"),
            [(c.level, c.name, c.status.value, plain(c.summary)) for c in report.checks],
        ),
    ]
    if wrong := [c for c in report.checks if c.tensors and c.status is not Status.PASS]:
        rows = [(f"{c.level}/{c.name}", code(t)) for c in wrong for t in c.tensors[:10]]
        parts += ["## Tensors and files at fault", table(("check", "name"), rows)]
    for level in RUNNING:
        if (parity := find(report, level, "parity")) is not None:
            parts += _parity(report, level, parity)
    if (hidden := find(report, Level.LAYERS, "hidden")) is not None:
        parts += ["## Hidden states, layer by layer", _hidden(hidden)]
    parts += [f"![{name}]({name})" for name in (KL_PLOT, ERROR_PLOT, LOGIT_PLOT) if name in drawn]
    parts += ["## Limits", limits_table()]
    return "\n\n".join(parts) + "\n"


def limits_table() -> str:
    """The limits, as docs/parity.md and every report print them."""
    rows = [(li.name, f"{li.passing:g}", f"{li.warning:g}", li.meaning) for li in LIMITS]
    note = (
        f"\n\nA rounded output, or a computation below fp32, may differ by {PASS_ROUNDING:g} times "
        f"(warning: {WARN_ROUNDING:g} times) what rounding alone does to the reference besides; "
        "that is measured in the same run."
    )
    return table(("figure", "passes up to", "warns up to", "meaning"), rows) + note


def _parity(report: Report, level: Level, parity: Check) -> list[str]:
    columns: list[tuple[str, Mapping[str, float | None]]] = [
        (name, parity.metrics[key])
        for key, name in _COLUMNS
        if isinstance(parity.metrics.get(key), Mapping)
    ]
    if (stock := find(report, level, "stock")) is not None:
        columns.append(("MaxText as it is", stock.metrics["all"]))
        columns.append(("its head's rounding alone", stock.metrics["head_rounding"]))
    rows = [
        (text, *(_number(c[key]) if key in c else _ABSENT for _, c in columns))
        for key, text in _FIGURES
    ]
    parts = [
        f"## Logits (level {level})",
        f"Text: {plain(parity.metrics['origin'])}.",
        table(("", *(name for name, _ in columns)), rows),
    ]
    if (router := find(report, level, "router")) is not None:
        rows = [
            (
                str(one["layer"]),
                f"{one['agreement']:.2%}",
                str(one["flips"]),
                _ABSENT if one["margin"] is None else _number(one["margin"]),
                _number(one["difference"]),
            )
            for one in router.metrics["layers"]
        ]
        heads = ("layer", "same experts", "flips", "smallest margin (std)", "largest Δ (std)")
        parts += [f"### Routers (level {level})", table(heads, rows)]
    return parts


def _hidden(hidden: Check) -> str:
    """One row a layer: what arises in each part, and what has grown."""
    by_layer: dict[str, dict[str, Any]] = {}
    for place in hidden.metrics["places"]:
        layer = plain(place["part"] if place["layer"] is None else place["layer"])
        part = "output" if place["layer"] is None else place["part"]
        by_layer.setdefault(layer, {})[part] = place
    rows = []
    for layer, parts in by_layer.items():
        cells = [_cell(parts.get(part)) for part in _PARTS]
        rounding = parts["output"]["rounding"]
        grown = _number(parts["output"]["own"]["largest"])
        rows.append((layer, *cells, grown, _number(rounding["largest"]) if rounding else _ABSENT))
    return table(("layer", *_PARTS, "grown so far", "rounding alone"), rows)


def _cell(place: Mapping[str, Any] | None) -> str:
    if place is None:
        return _ABSENT
    mark = "" if place["status"] == Status.PASS else f" **{plain(place['status'])}**"
    return _number(place["local"]["largest"]) + mark


def _number(value: float | None) -> str:
    if value is None:  # as the report has NaN and Inf
        return "not finite"
    return f"{value:,.0f}" if value >= 1000 and value == int(value) else f"{value:.3g}"
