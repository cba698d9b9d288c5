"""The verdict on logits and routers, however they were computed: whole models or layer by layer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, overload

import numpy as np

from moeconv.tensor.axes import Array
from moeconv.verification.checks import Check, CheckFactory, Status, more_severe
from moeconv.verification.measure.limits import KL, LOGITS
from moeconv.verification.measure.metrics import Positions
from moeconv.verification.measure.routing import Choice, Routing, compare_routing, status_of
from moeconv.verification.measure.tokens import Rows

# Positions drawn in the plot of KL by position.
_BINS = 128
# Pairs of logits kept for the scatter plot.
_PAIRS = 4000


@dataclass(frozen=True)
class Parity:
    """What was measured over all rows; positions are those of the rows in C order.

    Attributes:
        rows: What was run.
        unrounded: The converted model against MaxText without the bf16 rounding of its tied head.
        stock: Against MaxText as it is; None where the head is not tied, so that both are the same.
        head: MaxText as it is against itself without that rounding: what the rounding does alone.
        routing: Routers of both.
        rounding: MaxText with its weights moved as the output rounds them, against MaxText; None
            where the output is not rounded.
        rounding_routing: The same of its routers.
    """

    rows: Rows
    unrounded: Positions
    stock: Positions | None
    head: Positions | None
    routing: Routing
    rounding: Positions | None = None
    rounding_routing: Routing | None = None


def compare_routers(
    choice: Choice,
    rows: Rows,
    reference: Mapping[int, Array],
    converted: Mapping[int, Array],
    rounded: Mapping[int, Array] | None,
) -> tuple[Routing, Routing | None]:
    """Routing of the converted model, and of a reference that is rounded as the output is.

    Args:
        choice: How the model chooses experts.
        rows: What was run.
        reference: Router scores [B, T, E] by layer.
        converted: The same of the converted model.
        rounded: The same of the rounded reference, None where rounding plays no part.

    Raises:
        TensorError: A score of the reference is NaN or infinite.
    """
    batch, length = rows.tokens.shape
    baseline = None
    if rounded is not None:
        baseline = compare_routing(
            reference, rounded, choice=choice, shape=(batch, length), rounded=True
        )
    found = compare_routing(
        reference,
        converted,
        choice=choice,
        shape=(batch, length),
        rounded=baseline is not None,
        rounding=baseline,
    )
    return found, baseline


def parity_checks(of: CheckFactory, parity: Parity, *, reference: str) -> list[Check]:
    """The checks of a level: `parity`, `stock` (a tied head), `router` (a Mixture of Experts)."""
    checks = [_parity(of, parity, reference)]
    if parity.stock is not None and parity.head is not None:
        checks.append(_stock(of, parity))
    if parity.routing.layers:
        checks.append(_router(of, parity))
    return checks


def _parity(of: CheckFactory, parity: Parity, reference: str) -> Check:
    found, moved = parity.unrounded, parity.rounding
    settled = parity.routing.settled.reshape(-1)
    strict, by_rounding = _strict(found, parity.routing), _strict(moved, parity.rounding_routing)
    largest = float(found.largest.max()) or 1.0  # a final norm of zeros gives no other logits
    status = Status.PASS
    for limit, value, allowed in zip(
        (KL, KL, LOGITS), _graded(strict, largest), _graded(by_rounding, largest), strict=True
    ):
        status = more_severe(status, limit.grade(value, allowed))
    share = float(settled.mean())
    if share < 0.5:
        status = more_severe(status, Status.WARN)
    if found.lost:  # also where a near-tie flipped
        status = Status.FAIL
    first = parity.routing.first_wrong
    summary = (
        f"KL {found.kl.max():.1e} at most, {found.kl.mean():.1e} on average; max |Δ| "
        f"{found.max_abs.max():.1e} of logits up to {found.largest.max():.1f}; same top token at "
        f"{found.top1.mean():.2%} of {len(found.kl)} positions"
    )
    if share < 1:
        summary += (
            f"; near-ties of experts flipped, {1 - share:.1%} of positions judged apart, KL "
            f"{strict.kl.max():.1e} at most without them"
        )
    if by_rounding is not None:
        summary += f"; rounding alone does {by_rounding.kl.max():.1e}"
    if found.lost:
        summary = f"its logits are NaN or infinite at {found.lost} of {len(found.kl)} positions"
    if status is Status.FAIL:
        summary = f"the converted model is not {reference}'s: {summary}"
    return of.graded(
        status,
        "parity",
        summary,
        layer=first.layer if status is Status.FAIL and first is not None else None,
        metrics=_figures(parity, found, moved) | {"settled": share},
    )


def _graded(positions: Positions | None, largest: float) -> tuple[float, float, float]:
    """Largest and mean KL, and the largest difference as a share of the largest logit."""
    if positions is None:
        return 0.0, 0.0, 0.0
    kl, apart = positions.kl, positions.max_abs
    return float(kl.max()), float(kl.mean()), float(apart.max()) / largest


@overload
def _strict(positions: Positions, routing: Routing | None) -> Positions: ...
@overload
def _strict(positions: Positions | None, routing: Routing | None) -> Positions | None: ...
def _strict(positions: Positions | None, routing: Routing | None) -> Positions | None:
    """The positions at which no near-tie flipped; all, if it did everywhere."""
    if positions is None or routing is None or not routing.settled.any():
        return positions
    return positions.take(routing.settled.reshape(-1))


def _figures(parity: Parity, found: Positions, moved: Positions | None) -> dict[str, Any]:
    """Everything for the report: figures of all rows, of each kind, and what the plots draw."""
    figures: dict[str, Any] = {"all": found.summary(), "origin": parity.rows.text}
    for kind in dict.fromkeys(parity.rows.kinds):
        figures[kind] = found.take(parity.rows.mask(kind)).summary()
    if moved is not None:
        figures["rounding"] = moved.summary()
    batch, length = parity.rows.tokens.shape
    figures["kl_by_position"] = _by_position(found.kl.reshape(batch, length))
    if parity.stock is not None:
        figures["kl_by_position_stock"] = _by_position(parity.stock.kl.reshape(batch, length))
    pairs = found.sample.reshape(-1, 2)
    step = max(1, len(pairs) // _PAIRS)
    figures["logit_pairs"] = [[round(float(v), 6) for v in pair] for pair in pairs[::step]]
    return figures


def _by_position(kl: Array) -> dict[str, list[float]]:
    """Mean and largest KL of up to `_BINS` stretches of positions, over the rows [B, T]."""
    parts = np.array_split(kl, min(_BINS, kl.shape[1]), axis=1)
    starts = np.cumsum([0, *(p.shape[1] for p in parts[:-1])])
    return {
        "position": [int(s) for s in starts],
        "mean": [float(p.mean()) for p in parts],
        "max": [float(p.max()) for p in parts],
    }


def _stock(of: CheckFactory, parity: Parity) -> Check:
    """Against MaxText as it is: no further than the rounding of its head takes MaxText itself."""
    assert parity.stock is not None
    assert parity.head is not None
    found, head = parity.stock, parity.head
    kl = float(_strict(found, parity.routing).kl.mean())
    moved = _strict(parity.rounding, parity.rounding_routing)
    allowed = float(head.kl.mean()) + (float(moved.kl.mean()) if moved is not None else 0.0)
    status = Status.FAIL if found.lost else KL.grade(kl, allowed)
    return of.graded(
        status,
        "stock",
        f"against MaxText as it is, whose tied head rounds to bfloat16: KL {kl:.1e} on "
        f"average; that rounding alone does {head.kl.mean():.1e}; same top token at "
        f"{found.top1.mean():.2%}",
        metrics={"all": found.summary(), "head_rounding": head.summary()},
    )


def _router(of: CheckFactory, parity: Parity) -> Check:
    """Both send every token to the same experts."""
    routing = parity.routing
    status, first = status_of(routing), routing.first_wrong
    worst = min(routing.layers, key=lambda one: one.agreement)
    flips = sum(one.flips for one in routing.layers)
    if first is not None:
        summary = (
            f"router logits of layer {first.layer} differ by {first.difference:.1e} std (rms "
            f"{first.rms:.1e}), more than rounding explains; same experts for "
            f"{first.agreement:.2%} of tokens"
        )
    else:
        summary = (
            f"same experts for {worst.agreement:.2%} of tokens or more in {len(routing.layers)} "
            "layers"
        )
        if margins := [one.margin for one in routing.layers if one.margin is not None]:
            summary += f"; smallest margin {min(margins):.1e} std"
        if flips:
            summary += f"; {flips} near-ties flipped, as rounding explains"
    metrics: dict[str, Any] = {"layers": [asdict(one) for one in routing.layers]}
    if parity.rounding_routing is not None:
        metrics["rounding"] = [asdict(one) for one in parity.rounding_routing.layers]
    return of.graded(
        status,
        "router",
        summary,
        layer=first.layer if first is not None else None,
        metrics=metrics,
    )
