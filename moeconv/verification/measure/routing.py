"""Expert choice of both models: the same experts for every token, or near-ties that flipped.

Two experts whose scores differ by less than rounding may come out in another order. From
there on that position computes something else, and so, a little, does everything after it in its
row. Such positions are judged apart; a flip that rounding does not explain is a mistake.

In fp32 such a flip is rare, and everything behind it in its row is set apart. In a rounded output
they are everywhere; what they do to later positions is of the order of the rounding itself, so that
only the flipped positions are set apart, in the output and in the measured rounding alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moeconv.tensor.axes import Array
from moeconv.verification.checks import Status, more_severe
from moeconv.verification.measure.limits import ROUTER
from moeconv.verification.measure.metrics import demand_finite


@dataclass(frozen=True)
class Choice:
    """How a model chooses experts: those with the highest scores, among all or some.

    Attributes:
        top_k: Experts a token goes to.
        eligible: Scores [..., E] to a mask of those that may be chosen; None where all may.
    """

    top_k: int
    eligible: Callable[[Array], Array] | None = None

    def ranked(self, scores: Array) -> Array:
        """Scores [..., E], minus infinity where an expert cannot be chosen."""
        if self.eligible is None:
            return scores
        return np.where(self.eligible(scores), scores, -np.inf)

    def chosen(self, scores: Array) -> Array:
        """True for the chosen ones of experts with these scores [..., E]."""
        chosen = np.zeros(scores.shape, bool)
        top_k = min(self.top_k, scores.shape[-1])
        best = np.argpartition(-self.ranked(scores), top_k - 1, axis=-1)[..., :top_k]
        np.put_along_axis(chosen, best, True, axis=-1)
        return chosen

    def margin(self, scores: Array) -> float | None:
        """Smallest distance between the last chosen and the next; None where there is no next."""
        if self.top_k >= scores.shape[-1]:
            return None
        ordered = np.sort(self.ranked(scores), axis=-1)[..., ::-1]
        next_one = ordered[..., self.top_k]
        apart = (ordered[..., self.top_k - 1] - next_one)[np.isfinite(next_one)]
        return float(apart.min()) if apart.size else None


@dataclass(frozen=True)
class LayerRouting:
    """Routing of one layer.

    Attributes:
        layer: Its number.
        agreement: Share of positions with the same set of experts.
        flips: Positions with another set.
        difference: Largest difference of a router logit where nothing had flipped before, in
            standard deviations of the reference's.
        rms: Root mean square of those differences, in the same unit.
        margin: Smallest distance of the k-th logit from the next, in the same unit; None where
            every expert is chosen, so that there is no next.
        status: The verdict, given what rounding alone does.
    """

    layer: int
    agreement: float
    flips: int
    difference: float
    rms: float
    margin: float | None
    status: Status


@dataclass(frozen=True)
class Routing:
    """Routing of all layers.

    Attributes:
        layers: The Mixture-of-Experts layers, in order.
        settled: [B, T], True where no near-tie flipped in any layer: here, or in fp32 before in
            the row.
    """

    layers: tuple[LayerRouting, ...]
    settled: Array

    @property
    def first_wrong(self) -> LayerRouting | None:
        """The first layer that does not pass."""
        return next((one for one in self.layers if one.status is not Status.PASS), None)


def compare_routing(
    reference: Mapping[int, Array],
    candidate: Mapping[int, Array],
    *,
    choice: Choice,
    shape: tuple[int, int],
    rounded: bool = False,
    rounding: "Routing | None" = None,
) -> Routing:
    """Compares router logits [B, T, E] by layer, where both models have them.

    Args:
        reference: MaxText's.
        candidate: The converted model's; a dense layer written as copies has an idle router here,
            and none there.
        choice: How both choose experts.
        shape: (B, T).
        rounded: True if the candidate's weights or arithmetic are rounded.
        rounding: The same of a reference that was moved as much as rounding does; without it all
            flips of a rounded candidate count as explained.

    Raises:
        TensorError: A logit of the reference is NaN or infinite; of the candidate that is an
            infinite difference.
    """
    settled = np.ones(shape, bool)
    baseline = {one.layer: one for one in rounding.layers} if rounding is not None else {}
    found = []
    for layer in sorted(set(reference) & set(candidate)):
        left, right = (side[layer].astype(np.float64) for side in (reference, candidate))
        demand_finite(left, f"the reference's router logits of layer {layer}")
        whole = bool(np.isfinite(right).all())
        unit = float(left.std()) or 1.0
        absolute = np.abs(right - left).max(axis=-1) / unit if whole else np.full(shape, np.inf)
        margin = choice.margin(left)
        flipped = (choice.chosen(left) != choice.chosen(right)).any(axis=-1)
        seen = absolute[settled] if settled.any() else absolute
        difference, rms = float(seen.max()), float(np.sqrt((seen**2).mean()))
        if rounded and rounding is None and whole:
            status = Status.PASS
        elif (moved := baseline.get(layer)) is None:
            status = ROUTER.grade(difference)
        else:
            status = more_severe(
                ROUTER.grade(difference, moved.difference), ROUTER.grade(rms, moved.rms)
            )
        found.append(
            LayerRouting(
                layer=layer,
                agreement=float(1 - flipped.mean()),
                flips=int(flipped.sum()),
                difference=difference,
                rms=rms,
                margin=None if margin is None else margin / unit,
                status=status,
            )
        )
        if status is Status.PASS:
            settled &= ~(flipped if rounded else np.logical_or.accumulate(flipped, axis=1))
    return Routing(tuple(found), settled)


def status_of(routing: Routing) -> Status:
    """The worst of all layers."""
    status = Status.PASS
    for one in routing.layers:
        status = more_severe(status, one.status)
    return status
