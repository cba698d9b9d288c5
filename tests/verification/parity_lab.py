"""What the tests of levels logits and layers share: running one on a row, breaking an output."""

import json
from typing import ClassVar

import numpy as np

from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import CandidateError, CheckFactory
from moeconv.verification.context import Verification
from moeconv.verification.levels import Level, runner
from moeconv.verification.measure.tokens import RANDOM, Rows
from moeconv.verification.models.maxtext_beside import Beside
from moeconv.verification.models.maxtext_layers import MaxTextLayers
from moeconv.verification.settings import ParityOptions, VerifyOptions, unseen

# One row of the whole context is enough to see every mistake below.
LENGTH = 64


def rows_for(vocab: int) -> Rows:
    tokens = np.random.default_rng(3).integers(0, vocab, (1, LENGTH)).astype(np.int32)
    return Rows(tokens, (RANDOM,), "none")


def check(level, out, options=None):
    """The checks of a level, of whatever model OUT now is."""
    options = VerifyOptions(parity=options or ParityOptions())
    run = Verification(Candidate.open(out), options, lambda text: None, unseen)
    run.__dict__["rows"] = rows_for(run.candidate.model.vocab_size)
    try:
        found = runner(Level(level))(run)
    except CandidateError as error:
        found = [CheckFactory(Level(level)).failed(error.check, str(error))]
    return {one.name: one for one in found}


class Compiled(MaxTextLayers):
    """MaxText's side, built and compiled once for each config: the weights are read anew."""

    _made: ClassVar[dict[str, MaxTextLayers]] = {}

    def __init__(self, config, read, layout, *, dtype="float32"):
        key = repr((sorted(config.items()), dtype))
        if key not in self._made:
            super().__init__(config, read, layout, dtype=dtype)
            self._made[key] = self
        self.__dict__ |= self._made[key].__dict__ | {
            "_read": read,
            "_globals": None,
            "_beside": Beside(),
        }


def edit(**changes):
    def change(out):
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | changes))

    return change
