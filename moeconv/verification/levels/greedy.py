"""Greedy generation: the same tokens with the KV cache, without it, and by the reference.

A sequence is greedy when each of its tokens is the likeliest after those before it, so that one
forward pass over the whole answers for every step.
"""

from collections.abc import Callable, Mapping

import numpy as np

from moeconv.tensor.axes import Array
from moeconv.verification.checks import Check, CheckFactory
from moeconv.verification.models.transformers import HfModel

_PROMPT, _NEW = 16, 32


def greedy_check(
    of: CheckFactory,
    converted: HfModel,
    row: Array,
    others: Mapping[str, Callable[[Array], Array]],
    *,
    tie: float,
) -> Check:
    """Continues the beginning of `row` with the cache and holds the outcome against `others`.

    Args:
        of: The level.
        converted: The converted model.
        row: [T] ids whose first ones are the prompt.
        others: Logits [1, T, V] of tokens [1, T], by name.
        tie: Two likeliest tokens closer than this are a tie, at which the comparison ends.
    """
    prompt = row[: max(1, min(_PROMPT, len(row) - 1))]
    count = max(1, min(_NEW, len(row) - len(prompt)))
    made = converted.generate(prompt, count)
    chosen = made[len(prompt) :]
    same = {}
    for name, forward in others.items():
        logits = forward(made[None, :-1].astype(np.int32))[0, len(prompt) - 1 :].astype(np.float64)
        best = logits.argmax(axis=-1)
        behind = logits.max(axis=-1) - logits[np.arange(count), chosen]
        differing = np.flatnonzero(best != chosen)
        same[name] = int(differing[0]) if len(differing) else count
        if len(differing) and behind[same[name]] > tie:
            return of.failed(
                "greedy",
                f"greedy token {same[name] + 1} of {count} is {chosen[same[name]]} with the KV "
                f"cache, {best[same[name]]} {name}",
                metrics={"prompt": prompt.tolist(), "tokens": chosen.tolist(), "same": same},
            )
    short = min(same.values())
    text = f"all {count} greedy tokens are" if short == count else f"{short} greedy tokens are"
    rest = "" if short == count else "; then two tokens tie"
    return of.passed(
        "greedy",
        f"{text} the same with the KV cache, {' and '.join(others)}{rest}",
        metrics={"prompt": prompt.tolist(), "tokens": chosen.tolist(), "same": same},
    )
