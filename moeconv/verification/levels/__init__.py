"""The levels of verify: the one table of them, in the order in which they run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeconv.verification.checks import Check
    from moeconv.verification.context import Verification


class Level(StrEnum):
    """A level by its name, which is that of its module too."""

    STRUCTURE = "structure"
    WEIGHTS = "weights"
    LOGITS = "logits"
    LAYERS = "layers"


@dataclass(frozen=True)
class LevelSpec:
    """What is known of a level before it runs.

    Attributes:
        summary: What it looks at, for `moeconv verify --help`.
        always: The checks that it has whenever it ran and did not fail.
        at_times: Checks that it may have besides.
        can_skip: Those of `always` that need packages or files that may be absent.
        reads_source: True if it reads the checkpoint.
        packages: What it imports, and the extra of moeconv that brings it.
        maxtext_packages: The same where the reference is MaxText.
    """

    summary: str
    always: tuple[str, ...]
    at_times: tuple[str, ...] = ()
    can_skip: tuple[str, ...] = ()
    reads_source: bool = True
    packages: Mapping[str, str] = field(default_factory=dict)
    maxtext_packages: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs_models(self) -> bool:
        """True if it runs both models and compares what they compute."""
        return bool(self.packages)


_HF = {"torch": "verify", "transformers": "verify", "tokenizers": "verify"}
_MAXTEXT = {"maxtext": "train"}

LEVELS: Mapping[Level, LevelSpec] = {
    Level.STRUCTURE: LevelSpec(
        "files, tensors, config and tokenizer, without the checkpoint",
        ("files", "tensors", "dtypes", "index", "tying", "finite", "config", "readers",
         "transformers", "tokenizer"),
        ("maxtext",),
        can_skip=("readers", "transformers", "tokenizer"),
        reads_source=False,
    ),
    Level.WEIGHTS: LevelSpec(
        "every value against the checkpoint",
        ("source", "values"),
        ("tensors", "tokenizer", "description"),
    ),
    Level.LOGITS: LevelSpec(
        "whole models, side by side",
        ("reference", "parity", "greedy"),
        ("description", "stock", "router"),
        packages=_HF,
        maxtext_packages=_MAXTEXT,
    ),
    Level.LAYERS: LevelSpec(
        "the same one layer at a time, for models larger than memory",
        ("reference", "hidden", "parity"),
        ("description", "depth", "stock", "router"),
        packages=_HF,
        maxtext_packages=_MAXTEXT,
    ),
}  # fmt: skip
# Those of which one has to prove that both models compute the same.
RUNNING: tuple[Level, ...] = tuple(level for level, spec in LEVELS.items() if spec.runs_models)


def runner(level: Level) -> "Callable[[Verification], list[Check]]":
    """The code of a level, imported when it is needed: `run_level` of the module of its name."""
    run: Callable[[Verification], list[Check]] = import_module(f"{__name__}.{level}").run_level
    return run
