"""What the tests of levels logits and layers share: running one on a row, breaking an output."""

import json
from typing import ClassVar

import numpy as np

from moeconv.verification.candidate import Subject
from moeconv.verification.levels.layers import check_layers
from moeconv.verification.levels.logits import check_logits
from moeconv.verification.measure.tokens import RANDOM, Rows
from moeconv.verification.models.maxtext_layers import MaxTextLayers
from moeconv.verification.settings import ParityOptions

# One row of the whole context is enough to see every mistake below.
LENGTH = 64


def rows_for(vocab: int) -> Rows:
    tokens = np.random.default_rng(3).integers(0, vocab, (1, LENGTH)).astype(np.int32)
    return Rows(tokens, (RANDOM,), "none")


def check(level, out, options=None):
    function = {"logits": check_logits, "layers": check_layers}[level]
    subject = Subject.open(out)
    rows = rows_for(subject.model.vocab_size)
    found = function(subject, rows, options or ParityOptions(), lambda text: None)
    return {one.name: one for one in found}


class Compiled(MaxTextLayers):
    """MaxText's side, built and compiled once for each config: the weights are read anew."""

    _made: ClassVar[dict[str, MaxTextLayers]] = {}

    def __init__(self, config, read, layout, *, dtype="float32"):
        key = repr((sorted(config.items()), dtype))
        if key not in self._made:
            super().__init__(config, read, layout, dtype=dtype)
            self._made[key] = self
        self.__dict__ |= self._made[key].__dict__ | {"_read": read, "_globals": None}


def edit(**changes):
    def change(out):
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | changes))

    return change
