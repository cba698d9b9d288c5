"""From the last hidden states to logits, block by block, one model's head in memory at a time."""

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import IO

import numpy as np

from moeconv.errors import OutputError
from moeconv.tensor.axes import Array
from moeconv.verification.levels.lockstep import Hidden, Models
from moeconv.verification.measure.metrics import Positions, compare_logits, compare_pairs, join
from moeconv.verification.models.run_layers import BLOCK, blocks


class Logits:
    """The reference's logits in a scratch file, since a vocabulary of them is no small thing."""

    def __init__(self, file: IO[bytes], hidden: Array) -> None:
        """An empty file for the logits of hidden states [B, T, D]."""
        self._file, self._positions = file, math.prod(hidden.shape[:-1])

    def append(self, logits: Array) -> None:
        """The next block, float32 [1, N, V]."""
        self._file.write(np.ascontiguousarray(logits, np.float32))

    def __iter__(self) -> Iterator[Array]:
        """Blocks [N, V]; every one but the last has `BLOCK` positions."""
        vocabulary = self._file.seek(0, os.SEEK_END) // 4 // self._positions
        for start in range(0, self._positions, BLOCK):
            count = min(BLOCK, self._positions - start)
            self._file.seek(start * vocabulary * 4)
            yield np.fromfile(self._file, np.float32, count * vocabulary).reshape(count, -1)


def compare_heads(
    models: Models, hidden: Hidden, targets: Array, *, stock: bool, scratch: Path | None
) -> tuple[Positions, Positions | None, Positions | None, Positions | None]:
    """Compares logits, each model's from its own hidden states.

    Args:
        models: What runs.
        hidden: After the last layer.
        targets: [B, T] the next token of every position, -1 where there is none.
        stock: True if the reference rounds its head, so that it has two kinds of logits.
        scratch: Folder for logits, None for the system's temporary one.

    Returns:
        The converted model against the reference; against the reference as it is; that one against
        the reference with its head unrounded (None for both without `stock`); and the rounded
        reference against the reference (None without one).

    Raises:
        OutputError: The scratch folder has no room.
        TensorError: Logits of the reference are NaN or infinite.
    """
    try:
        return _compare(models, hidden, targets.reshape(-1), stock, scratch)
    except OSError as error:  # of the files that logits wait in
        raise OutputError(
            f"level layers cannot keep logits in {scratch or gettempdir()}: {error.strerror}; set "
            "TMPDIR to a folder with room"
        ) from None


def _compare(
    models: Models, hidden: Hidden, targets: Array, stock: bool, scratch: Path | None
) -> tuple[Positions, Positions | None, Positions | None, Positions | None]:
    wanted = [targets[i : i + BLOCK] for i in range(0, len(targets), BLOCK)]
    with ExitStack() as stack:
        exact, plain = (
            Logits(stack.enter_context(TemporaryFile(dir=scratch)), hidden.reference)
            for _ in range(2)
        )
        for block in blocks(hidden.reference):
            normed = models.reference.norm(block)
            exact.append(models.reference.logits(normed, "unrounded"))
            if stock:
                plain.append(models.reference.logits(normed, "stock"))
        models.reference.release()
        rounding = None
        if models.rounded is not None and hidden.rounded is not None:
            parts = []
            for block, right, next_ones in zip(blocks(hidden.rounded), exact, wanted, strict=True):
                other = models.rounded.logits(models.rounded.norm(block), "unrounded")[0]
                parts.append(compare_logits(right, other, next_ones))
            rounding = join(parts).demand_finite(f"logits of {models.name}, rounded,")
            models.rounded.release()
        kinds: tuple[list[Positions], ...] = ([], [], [])
        found, against_stock, head = kinds
        plain_blocks = iter(plain) if stock else None
        for block, right, next_ones in zip(blocks(hidden.converted), exact, wanted, strict=True):
            got = models.converted.logits(models.converted.norm(block), "unrounded")[0]
            each, pairs = [right, got], [(0, 1)]
            if plain_blocks is not None:
                each, pairs = [*each, next(plain_blocks)], [*pairs, (2, 1), (2, 0)]
            compared = compare_pairs(each, pairs, next_ones)
            for kept, part in zip(kinds, compared, strict=False):
                kept.append(part)
        models.converted.release()
    return (
        join(found),
        join(against_stock) if stock else None,
        join(head) if stock else None,
        rounding,
    )
