"""How far two models' logits are apart, position by position, in float64.

Logits of the reference that are NaN or infinite say nothing of the other model: an error. Those of
the candidate are a difference like any other, an infinite one.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from moeconv.errors import TensorError, UsageError
from moeconv.tensor.axes import Array

_TOP = 5
# Logits taken together: 2 MB in float64, so that a dozen such arrays stay in the cache, and the
# allocator, which keeps what a thread has freed, keeps little.
_BLOCK = 1 << 18
# Pairs of logits kept of each position, for a plot.
_SAMPLED = 16


@dataclass(frozen=True)
class Positions:
    """Metrics of N positions, in the order of the rows; all of length N.

    Where a logit of the candidate is NaN or infinite, every distance is infinite.

    Attributes:
        kl: KL of the candidate's distribution from the reference's, in nats.
        max_abs: Largest difference of a logit.
        mean_abs: Mean difference of a logit.
        top1: True where both have the same likeliest token.
        top5: Share of the reference's five likeliest tokens that are among the candidate's.
        margin: The reference's likeliest logit above its second.
        largest: The reference's largest absolute logit.
        variance: Variance of the reference's logits.
        nll_reference: Negative log likelihood of the next token, NaN where there is none.
        nll_candidate: The same of the candidate.
        sample: [N, S, 2] pairs of logits, reference first, always the same tokens of a position.
    """

    kl: Array
    max_abs: Array
    mean_abs: Array
    top1: Array
    top5: Array
    margin: Array
    largest: Array
    variance: Array
    nll_reference: Array
    nll_candidate: Array
    sample: Array

    @property
    def lost(self) -> int:
        """Positions at which a logit of the candidate is NaN or infinite."""
        return int((~np.isfinite(self.kl)).sum())

    def demand_finite(self, who: str) -> "Positions":
        """These positions, of a model that others are held against.

        Raises:
            TensorError: Some are lost.
        """
        if self.lost:
            raise _not_finite(who, self.lost, len(self.kl))
        return self

    @np.errstate(over="ignore", invalid="ignore")
    def summary(self) -> dict[str, float]:
        """The figures of a report; a perplexity may be infinite."""
        known = ~np.isnan(self.nll_reference)
        figures = {
            "positions": float(len(self.kl)),
            "max_abs": float(self.max_abs.max()),
            "mean_abs": float(self.mean_abs.mean()),
            "kl_max": float(self.kl.max()),
            "kl_mean": float(self.kl.mean()),
            "kl_median": float(np.median(self.kl)),
            "top1_agreement": float(self.top1.mean()),
            "top5_agreement": float(self.top5.mean()),
            "largest_logit": float(self.largest.max()),
            "std_reference": float(np.sqrt(self.variance.mean())),
        }
        if known.any():
            figures["perplexity_reference"] = float(np.exp(self.nll_reference[known].mean()))
            figures["perplexity_candidate"] = float(np.exp(self.nll_candidate[known].mean()))
        return figures

    def take(self, mask: Array) -> "Positions":
        """Only the positions of a boolean mask [N]."""
        return Positions(**{f.name: getattr(self, f.name)[mask] for f in fields(self)})


def join(parts: Iterable[Positions]) -> Positions:
    """One after the other."""
    held = list(parts)
    return Positions(
        **{f.name: np.concatenate([getattr(p, f.name) for p in held]) for f in fields(Positions)}
    )


def compare_logits(
    reference: Array, candidate: Array, targets: Array | None = None, *, jobs: int = 2
) -> Positions:
    """Compares logits [..., V]; positions come in C order.

    Args:
        reference: The model that is right.
        candidate: The other.
        targets: Next token of every position, -1 where there is none.
        jobs: Blocks worked on at the same time.

    Raises:
        UsageError: The shapes differ, or are empty.
        TensorError: A logit of the reference is NaN or infinite.
    """
    return compare_pairs([reference, candidate], [(0, 1)], targets, jobs=jobs)[0]


def compare_pairs(
    logits: Sequence[Array],
    pairs: Sequence[tuple[int, int]],
    targets: Array | None = None,
    *,
    jobs: int = 2,
) -> list[Positions]:
    """Compares several logits [..., V] of the same positions, each of which is worked on once.

    Args:
        logits: Of each model.
        pairs: Which are compared: the one that is right, and the other.
        targets: As for `compare_logits`.
        jobs: Likewise.

    Raises:
        UsageError: The shapes differ, or are empty.
        TensorError: A logit of one that is right is NaN or infinite.
    """
    shape = logits[0].shape
    for other in logits:
        if shape != other.shape or len(shape) < 1 or not other.size:
            raise UsageError(
                "Only logits of one shape can be compared, "
                f"not {list(shape)} with {list(other.shape)}."
            )
    flat = [one.reshape(-1, shape[-1]) for one in logits]
    count, right = len(flat[0]), {one for one, _ in pairs}
    wanted = np.full(count, -1) if targets is None else np.asarray(targets).reshape(-1)
    rows = max(1, _BLOCK // shape[-1])

    def block(start: int) -> list[Positions]:
        part = slice(start, start + rows)
        for one in right:
            demand_finite(flat[one][part], "the reference's logits")
        sides = [_Side.of(values[part]) for values in flat]
        return [_compare(sides[one], sides[other], wanted[part]) for one, other in pairs]

    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(block, range(0, count, rows)))
    return [join(parts) for parts in zip(*found, strict=True)]


def demand_finite(values: Array, who: str) -> None:
    """What a model that is right computes are numbers.

    Raises:
        TensorError: [..., N] holds NaN or Inf.
    """
    bad = ~np.isfinite(values).all(axis=-1)
    if bad.any():
        raise _not_finite(who, int(bad.sum()), bad.size)


def _not_finite(who: str, lost: int, count: int) -> TensorError:
    return TensorError(
        f"{who} are not all finite (NaN or infinite at {lost} of {count} positions), so nothing "
        "can be held against them"
    )


@dataclass(frozen=True)
class _Side:
    """One model's logits of a block of N positions, and what follows from them alone.

    Attributes:
        given: [N, V] as they are.
        logits: [N, V] in float64; those of lost positions are 0.
        lost: [N] True where one of them is NaN or infinite.
        log: [N, V] logarithms of the probabilities.
        weights: [N, V] the probabilities times `total`.
        total: [N].
        best: [N] the likeliest token.
        likeliest: [N, T] the likeliest ones, in any order.
    """

    given: Array
    logits: Array
    lost: Array
    log: Array
    weights: Array
    total: Array
    best: Array
    likeliest: Array

    @classmethod
    def of(cls, values: Array) -> "_Side":
        """Of logits [N, V]."""
        given, lost = values, ~np.isfinite(values).all(axis=-1)
        if lost.any():
            values = np.where(lost[:, None], 0, given)
        logits = values.astype(np.float64)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        weights = np.exp(shifted)
        total = weights.sum(axis=-1)
        shifted -= np.log(total)[:, None]
        top = min(_TOP, logits.shape[-1])
        likeliest = np.argpartition(values, -top, axis=-1)[:, -top:]
        best = values.argmax(axis=-1)
        return cls(given, logits, lost, shifted, weights, total, best, likeliest)


def _compare(reference: _Side, candidate: _Side, targets: Array) -> Positions:
    left, right, lost = reference.logits, candidate.logits, candidate.lost
    sampled = np.random.default_rng(0).integers(0, left.shape[-1], (len(left), _SAMPLED))
    sample = [np.take_along_axis(one.given, sampled, axis=-1) for one in (reference, candidate)]
    apart = reference.log - candidate.log
    apart *= reference.weights
    kl = apart.sum(axis=-1) / reference.total
    absolute = np.abs(np.subtract(right, left, out=apart), out=apart)
    both = reference.likeliest[:, :, None] == candidate.likeliest[:, None, :]
    top = reference.likeliest.shape[-1]
    best = np.take_along_axis(left, reference.likeliest, axis=-1)
    best.sort(axis=-1)
    rows = np.arange(len(left))
    known = np.where(targets >= 0, targets, 0)
    nll = -candidate.log[rows, known]
    return Positions(
        # Rounding can leave a divergence of 0 slightly negative.
        kl=np.where(lost, np.inf, np.maximum(kl, 0.0)),
        max_abs=np.where(lost, np.inf, absolute.max(axis=-1)),
        mean_abs=np.where(lost, np.inf, absolute.mean(axis=-1)),
        top1=~lost & (reference.best == candidate.best),
        top5=np.where(lost, 0.0, both.any(axis=-1).mean(axis=-1)),
        margin=best[:, -1] - best[:, -2] if top > 1 else np.full(len(left), np.inf),
        largest=np.abs(left).max(axis=-1),
        variance=left.var(axis=-1),
        nll_reference=np.where(targets >= 0, -reference.log[rows, known], np.nan),
        nll_candidate=np.where(targets >= 0, np.where(lost, np.inf, nll), np.nan),
        sample=np.stack(sample, axis=-1).astype(np.float32),
    )
