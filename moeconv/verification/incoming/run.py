"""The levels of a MaxText run, by name."""

from collections.abc import Callable, Mapping

from moeconv.errors import UsageError
from moeconv.verification.checks import Check
from moeconv.verification.context import Verification
from moeconv.verification.incoming.candidate import IncomingCandidate
from moeconv.verification.incoming.models import check_layers, check_logits
from moeconv.verification.incoming.structure import check_structure, demand_loadable
from moeconv.verification.incoming.weights import check_weights
from moeconv.verification.levels import LEVELS, Level

_LEVELS: Mapping[Level, Callable[[IncomingCandidate, Verification], list[Check]]] = {
    Level.STRUCTURE: lambda candidate, run: check_structure(candidate),
    Level.WEIGHTS: check_weights,
    Level.LOGITS: check_logits,
    Level.LAYERS: check_layers,
}


def demand_options(run: Verification) -> None:
    """Refuses options of the other direction.

    Raises:
        UsageError: One is given.
    """
    options = run.options.parity
    given = {
        "--against": options.against is not None,
        "--config": options.config is not None,
        "--accept-key": bool(options.accept),
        "--dtype": options.dtype != "float32",
    }
    if wrong := [name for name, there in given.items() if there]:
        raise UsageError(
            f"{wrong[0]} is for converted Hugging Face models; {run.candidate.out} is a MaxText "
            "run, which is compared in float32, by its own config.yml, with the model that it was "
            "made of"
        )


def check_level(candidate: IncomingCandidate, level: Level, run: Verification) -> list[Check]:
    """One level.

    Raises:
        CandidateError: OUT cannot be read, loaded or run.
        MoeconvError: The source cannot be.
    """
    if LEVELS[level].runs_models:
        demand_loadable(candidate)
    return _LEVELS[level](candidate, run)
