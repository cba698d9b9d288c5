"""What the checks of running models have measured, as verify.json holds it and the page shows it.

A report, which anybody can have written, is validated against this before its figures are used.
"""

from typing import Annotated, Any, NotRequired, TypedDict

from pydantic import Field, TypeAdapter

from moeconv.verification.checks import Check, Status
from moeconv.verification.levels import RUNNING

# Null is what is NaN or infinite; what a length or a position is never is.
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Number = Finite | None
Count = Annotated[int, Field(strict=True, ge=0)]


class Curve(TypedDict):
    """Mean and largest KL of stretches of positions; the lists are equally long."""

    position: list[Count]
    mean: list[Number]
    max: list[Number]


class Parity(TypedDict):
    """Metrics of check `parity`; other summaries of `measure/metrics.py` beside `all`."""

    all: dict[str, Number]
    origin: str
    text: NotRequired[dict[str, Number]]
    random: NotRequired[dict[str, Number]]
    rounding: NotRequired[dict[str, Number]]
    kl_by_position: Curve
    kl_by_position_stock: NotRequired[Curve]
    logit_pairs: list[tuple[Number, Number]]


class Stock(TypedDict):
    """Metrics of check `stock`."""

    all: dict[str, Number]
    head_rounding: dict[str, Number]


class Layer(TypedDict):
    """One layer of `Router`."""

    layer: Count
    agreement: Finite
    flips: Count
    margin: Number
    difference: Number


class Router(TypedDict):
    """Metrics of check `router`."""

    layers: list[Layer]


class Difference(TypedDict):
    """See `levels/hidden.py`."""

    largest: Number


class Place(TypedDict):
    """See `levels/hidden.py`."""

    part: str
    layer: Count | None
    local: Difference
    own: Difference
    rounding: Difference | None
    status: Status


class Hidden(TypedDict):
    """Metrics of check `hidden`."""

    places: list[Place]


_METRICS: dict[str, TypeAdapter[Any]] = {
    "parity": TypeAdapter(Parity),
    "stock": TypeAdapter(Stock),
    "router": TypeAdapter(Router),
    "hidden": TypeAdapter(Hidden),
}


def demand_figures(check: Check) -> None:
    """Looks for the metrics of a check that others read.

    Raises:
        ValueError: One is missing or of another form.
    """
    if check.level not in RUNNING or check.name not in _METRICS:
        return
    found = _METRICS[check.name].validate_python(check.metrics)
    for curve in (found.get("kl_by_position"), found.get("kl_by_position_stock")):
        if curve is not None and len({len(values) for values in curve.values()}) != 1:
            raise ValueError("a curve has points without a value")
    if check.name == "hidden":
        layers = {(p["layer"], p["part"]) for p in found["places"]}
        if any((layer, "output") not in layers for layer, _ in layers if layer is not None):
            raise ValueError("a layer has no output")
