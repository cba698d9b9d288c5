"""How far two models' logits lie apart, position by position, in float64."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from moeconv.errors import TensorError, UsageError
from moeconv.mapping.axes import Array

_TOP = 5
# Logits taken together: 2 MB in float64, so that a dozen such arrays stay in the cache, and the
# allocator, which keeps what a thread has freed, keeps little.
_BLOCK = 1 << 18
# Pairs of logits kept of each position, for a plot.
_SAMPLED = 16


@dataclass(frozen=True)
class Positions:
    """Metrics of N positions, in the order of the rows; all of length N.

    Attributes:
        kl: KL of the candidate's distribution from the reference's, in nats.
        max_abs: Largest difference of a logit.
        mean_abs: Mean difference of a logit.
        top1: Whether both think the same token likeliest.
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

    def summary(self) -> dict[str, float]:
        """The figures of a report."""
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
        TensorError: A logit is NaN or infinite.
    """
    if reference.shape != candidate.shape or reference.ndim < 1 or not reference.size:
        raise UsageError(
            "Only logits of one shape can be compared, "
            f"not {list(reference.shape)} with {list(candidate.shape)}."
        )
    vocabulary = reference.shape[-1]
    left, right = reference.reshape(-1, vocabulary), candidate.reshape(-1, vocabulary)
    wanted = np.full(len(left), -1) if targets is None else np.asarray(targets).reshape(-1)
    rows = max(1, _BLOCK // vocabulary)
    blocks = [slice(i, i + rows) for i in range(0, len(left), rows)]
    with ThreadPoolExecutor(jobs) as pool:
        return join(pool.map(lambda s: _block(left[s], right[s], wanted[s]), blocks))


def _block(reference: Array, candidate: Array, targets: Array) -> Positions:
    left, right = reference.astype(np.float64), candidate.astype(np.float64)
    for name, logits in (("reference", left), ("candidate", right)):
        if not np.isfinite(logits).all():
            raise TensorError(f"The logits of the {name} model are not all finite.")
    difference = right - left
    absolute = np.abs(difference)
    log_left, log_right = _log_softmax(left), _log_softmax(right)
    kl = (np.exp(log_left) * (log_left - log_right)).sum(axis=-1)
    top = min(_TOP, left.shape[-1])
    likeliest = [_likeliest(logits, top) for logits in (left, right)]
    shared = (likeliest[0][:, :, None] == likeliest[1][:, None, :]).any(axis=-1).mean(axis=-1)
    best = np.take_along_axis(left, likeliest[0], axis=-1)
    best.sort(axis=-1)
    rows = np.arange(len(left))
    known = np.where(targets >= 0, targets, 0)
    chosen = np.random.default_rng(0).integers(0, left.shape[-1], (len(left), _SAMPLED))
    return Positions(
        # Rounding can leave a divergence of 0 slightly negative.
        kl=np.maximum(kl, 0.0),
        max_abs=absolute.max(axis=-1),
        mean_abs=absolute.mean(axis=-1),
        top1=left.argmax(axis=-1) == right.argmax(axis=-1),
        top5=shared,
        margin=best[:, -1] - best[:, -2] if top > 1 else np.full(len(left), np.inf),
        largest=np.abs(left).max(axis=-1),
        variance=left.var(axis=-1),
        nll_reference=np.where(targets >= 0, -log_left[rows, known], np.nan),
        nll_candidate=np.where(targets >= 0, -log_right[rows, known], np.nan),
        sample=np.stack(
            [np.take_along_axis(a, chosen, axis=-1) for a in (left, right)], axis=-1
        ).astype(np.float32),
    )


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _likeliest(logits: Array, top: int) -> Array:
    return np.argpartition(-logits, top - 1, axis=-1)[:, :top]
