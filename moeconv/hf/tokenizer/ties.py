"""Pieces of a BPE model that have the same score.

Sentencepiece merges the leftmost of equal pairs (`SymbolPairComparator`, `src/bpe_model.cc`), while
a `tokenizer.json` has an order of merges. Llama 2's and Mistral's runs of spaces are such pieces.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from moeconv.hf.tokenizer.sentencepiece import Piece


def unequal_tie(normal: Sequence[Piece], merges: Sequence[tuple[str, str]]) -> str | None:
    """Looks for pieces of the same score that the order of merges may choose among differently.

    A group is the same either way if its pieces are runs of one character, no other piece has two
    of that character in a row (so that runs meet nothing but runs), and both ways split every run
    of up to four times the longest alike.

    Args:
        normal: All pieces that merges may make.
        merges: The merges in order.

    Returns:
        What is wrong, for people; None if the order of merges is right.
    """
    groups: dict[float, list[str]] = {}
    for piece in normal:
        if len(piece.text) > 1:
            groups.setdefault(piece.score, []).append(piece.text)
    for group in (texts for texts in groups.values() if len(texts) > 1):
        wrong = f"{group[0]!r} and {group[1]!r} have the same score"
        letter = group[0][0]
        if any(set(text) != {letter} for text in group):
            return wrong
        runs, double = set(group), 2 * letter
        if any(double in piece.text and piece.text not in runs for piece in normal):
            return wrong
        lengths = {len(text) for text in group}
        ranks = {
            (len(left), len(right)): rank
            for rank, (left, right) in enumerate(merges)
            if left + right in runs
        }
        for length in range(1, 4 * max(lengths) + 1):
            if _split(length, lengths, lambda pair: 0) != _split(
                length, lengths, ranks.__getitem__
            ):
                return f"{wrong}, and the runs of {letter!r} do not follow from an order of merges"
    return None


def _split(
    length: int, lengths: set[int], rank: Callable[[tuple[int, int]], int]
) -> tuple[int, ...]:
    """Lengths of a run's pieces; the pair of the lowest rank is merged first, then the leftmost."""
    parts = [1] * length
    while True:
        pairs = [
            (rank((left, right)), at)
            for at, (left, right) in enumerate(pairwise(parts))
            if left + right in lengths
        ]
        if not pairs:
            return tuple(parts)
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
