"""How tokenised stories become rows, and rows the columns that MaxText trains on.

A story is `BOS … EOS`; each of its tokens but BOS is to be a training target exactly once an epoch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from moeconv_train.data.records import LENGTHS, TOKENS, Row

# How many of the next stories a gap at a row's end may be filled from. 1024 leave 0.3 % of the
# positions empty on TinyStories' lengths, 4096 hardly less.
LOOK_AHEAD = 1024


def pack(stories: Sequence[np.ndarray], length: int) -> list[Row]:
    """Puts `stories` (`BOS … EOS` each) into rows of `length` positions.

    A story of n tokens takes n - 1 positions: inputs are all but EOS, targets all but BOS.
    """
    pieces = [piece for story in stories for piece in windows(story, length)]
    sizes = np.array([len(piece) - 1 for piece in pieces], np.int64)
    return [
        {
            TOKENS: np.concatenate([pieces[i] for i in row]),
            LENGTHS: np.array([len(pieces[i]) for i in row]),
        }
        for row in fill_rows(sizes, length)
    ]


def windows(tokens: np.ndarray, inputs: int) -> Iterator[np.ndarray]:
    """Pieces of at most `inputs + 1` tokens; each begins with the last token of the one before.

    So every token but the first is a target once: it is predicted from inputs in its own piece.
    """
    for start in range(0, len(tokens) - 1, inputs):
        yield tokens[start : start + inputs + 1]


def fill_rows(sizes: np.ndarray, length: int) -> Iterator[list[int]]:
    """Which pieces go into which row: in order, gaps filled from a little further on.

    The next piece goes in while it fits; what is left of the row gets the longest one that fits
    among the following LOOK_AHEAD, until none does. So rows hold neighbours of the source in their
    order, but for the fillers, whatever the machine.

    Args:
        sizes: Positions that each piece takes, from 1 to `length`.
        length: Positions of a row.

    Yields:
        Indices into `sizes`; each occurs once.
    """
    placed = np.zeros(len(sizes), bool)
    head = 0
    while head < len(sizes):
        row: list[int] = []
        gap = length
        while head < len(sizes):
            if placed[head]:
                head += 1
                continue
            chosen = head
            if sizes[head] > gap:
                ahead = slice(head, head + LOOK_AHEAD)
                fitting = np.where(placed[ahead] | (sizes[ahead] > gap), 0, sizes[ahead])
                chosen = head + int(fitting.argmax())
                if not fitting[chosen - head]:
                    break
            placed[chosen] = True
            row.append(chosen)
            gap -= int(sizes[chosen])
        if row:
            yield row


def unpack(row: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """A packed row as the batch columns that MaxText's train step takes.

    Inputs are a piece without its last token, targets the same without its first, so each position
    predicts the next token of its own story. Segments count from 1 and padding is 0 in every
    column: MaxText attends only within a segment (attentions.py, `generate_attention_mask`), and a
    target counts where `targets_segmentation` is not 0 (train.py, `loss_fn`), never by its value.
    """
    tokens, lengths = row[TOKENS], row[LENGTHS]
    used = int((lengths - 1).sum())
    if used > length or int(lengths.sum()) != len(tokens):
        raise ValueError(
            f"a packed row takes {used} positions and max_target_length is {length}; "
            "prepare the data with that --seq-length"
        )
    last = np.cumsum(lengths) - 1
    first = last - lengths + 1
    begins = np.cumsum(lengths - 1) - (lengths - 1)
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths - 1)
    positions = np.arange(used) - np.repeat(begins, lengths - 1)

    def padded(values: np.ndarray) -> np.ndarray:
        column = np.zeros(length, np.int32)
        column[:used] = values
        return column

    return {
        "inputs": padded(np.delete(tokens, last)),
        "inputs_segmentation": padded(segments),
        "inputs_position": padded(positions),
        "targets": padded(np.delete(tokens, first)),
        "targets_segmentation": padded(segments),
        "targets_position": padded(positions),
    }
