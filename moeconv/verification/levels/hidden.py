"""Hidden states of both models, part by part: how far apart they are, and where that began."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from moeconv.tensor.axes import Array
from moeconv.verification.checks import Check, CheckFactory, Status, more_severe
from moeconv.verification.measure.limits import HIDDEN, ROUTER

# The parts of a layer, as attributes of `LayerTrace`.
PARTS = ("attention", "router", "experts", "output")


@dataclass(frozen=True)
class Difference:
    """The largest vector of a difference and its root mean square, relative to the reference's."""

    largest: float
    rms: float


@dataclass(frozen=True)
class Place:
    """One tensor of hidden states, of one layer or outside them.

    Attributes:
        part: `embedding`, one of `PARTS`, or `final norm`.
        layer: Its layer, None outside.
        local: The difference that arose here: both were given the reference's hidden states.
        own: The difference with all that came before.
        rounding: What rounding alone does here, None where the output is not rounded.
        status: The verdict on `local`.
    """

    part: str
    layer: int | None
    local: Difference
    own: Difference
    rounding: Difference | None
    status: Status

    @classmethod
    def compare(
        cls,
        part: str,
        layer: int | None,
        reference: Array,
        local: Array,
        own: Array,
        rounded: Array | None,
        masks: tuple[Array | None, Array | None] = (None, None),
    ) -> "Place":
        """Measures and grades one tensor.

        Args:
            part: See the attributes.
            layer: See the attributes.
            reference: What is right.
            local: The converted model's, given the reference's hidden states.
            own: The converted model's, given its own.
            rounded: The rounded reference's, given the reference's hidden states.
            masks: Positions at which `local` and `rounded` count, None for all.
        """
        measure = _router_difference if part == "router" else difference
        limit = ROUTER if part == "router" else HIDDEN
        here, grown = measure(reference, local, masks[0]), measure(reference, own, None)
        rounding = measure(reference, rounded, masks[1]) if rounded is not None else None
        status = more_severe(
            limit.grade(here.largest, rounding.largest if rounding is not None else 0.0),
            limit.grade(here.rms, rounding.rms if rounding is not None else 0.0),
        )
        return cls(part, layer, here, grown, rounding, status)

    @property
    def where(self) -> str:
        """The place in words."""
        if self.layer is None:
            return self.part
        return f"layer {self.layer}" + (f" {self.part}" if self.part != "output" else "")


def hidden_check(of: CheckFactory, places: Sequence[Place], reference: str) -> Check:
    """The hidden states, and the first place that diverges.

    Args:
        of: The level.
        places: All of them, in order.
        reference: The name of the right model.
    """
    status = Status.PASS
    for place in places:
        status = more_severe(status, place.status)
    layers = 1 + max((p.layer for p in places if p.layer is not None), default=-1)
    metrics = {"places": [asdict(place) for place in places]}
    if status is Status.PASS:
        worst = max(places, key=lambda p: p.local.largest)
        outputs = [p for p in places if p.part == "output"]
        end = f"; {outputs[-1].own.largest:.1e} at the end" if outputs else ""
        summary = (
            f"{len(places)} tensors of {layers} layers: at most {worst.local.largest:.1e} arises "
            f"in one place ({worst.where}){end}"
        )
        return of.passed("hidden", summary, metrics=metrics)
    first = next(p for p in places if p.status is status)
    others = [p.where for p in places if p.status is status and p is not first]
    # The output of a layer differs because a part of it does: naming it again says nothing.
    others = [w for w in others if f"{w} " not in first.where + " "][:5]
    summary = (
        f"the first place that is not {reference}'s is {first.where}: {first.local.largest:.1e} "
        "arises there" + (f"; also {', '.join(others)}" if others else "")
    )
    return of.graded(status, "hidden", summary, layer=first.layer, metrics=metrics)


def difference(reference: Array, other: Array, mask: Array | None) -> Difference:
    """Vectors [B, T, D] against the mean length of the reference's, where the mask [B, T] is."""
    if not np.isfinite(other).all():  # also at a position that is judged apart
        return Difference(math.inf, math.inf)
    expected, got = reference.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(got - expected, axis=-1)
    if mask is not None:
        lengths = lengths[mask]
    unit = float(np.sqrt((np.linalg.norm(expected, axis=-1) ** 2).mean())) or 1.0
    if not lengths.size:
        return Difference(0.0, 0.0)
    return Difference(float(lengths.max()) / unit, float(np.sqrt((lengths**2).mean())) / unit)


def _router_difference(reference: Array, other: Array, mask: Array | None) -> Difference:
    """Router scores [B, T, E] against their standard deviation."""
    if not np.isfinite(other).all():
        return Difference(math.inf, math.inf)
    expected, got = reference.astype(np.float64), other.astype(np.float64)
    apart = np.abs(got - expected)
    unit = float(expected.std()) or 1.0
    return Difference(float(apart.max()) / unit, float(np.sqrt((apart**2).mean())) / unit)
