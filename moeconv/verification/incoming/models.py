"""Levels `logits` and `layers` of a MaxText run: transformers is right, MaxText is judged.

transformers computes the source's own folder, MaxText loads OUT by its own loader with the
config.yml that it reads itself. Measures and limits are those of the other direction.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moeconv.arch.parameters import FINAL_NORM
from moeconv.conversion.run_files import CONFIG_NAME
from moeconv.errors import TensorError, UnsupportedError
from moeconv.tensor.axes import Array
from moeconv.tensor.dtypes import SIGNIFICAND_BITS
from moeconv.tensor.values import Cast
from moeconv.verification.boundary import blaming
from moeconv.verification.checks import Check, CheckFactory
from moeconv.verification.context import Verification
from moeconv.verification.incoming.candidate import IncomingCandidate
from moeconv.verification.levels import Level
from moeconv.verification.levels.greedy import greedy_check
from moeconv.verification.levels.head import compare_heads
from moeconv.verification.levels.hidden import hidden_check
from moeconv.verification.levels.lockstep import Lockstep, Models
from moeconv.verification.levels.logits import check_order, joined, rounded_by
from moeconv.verification.levels.parity import Parity, compare_routers, parity_checks
from moeconv.verification.measure.metrics import Positions, compare_pairs, demand_finite, join
from moeconv.verification.measure.rounding import Rounding
from moeconv.verification.models.maxtext import MaxTextModel
from moeconv.verification.models.maxtext_layers import MaxTextLayers
from moeconv.verification.models.run_layers import parameters_of, run_layers
from moeconv.verification.models.source_layers import LayerReader
from moeconv.verification.models.transformers import HfLayers, HfModel


@contextmanager
def _source() -> Iterator[None]:
    """What cannot be loaded of the source says nothing of OUT.

    Raises:
        UnsupportedError: The source cannot be the reference.
    """
    try:
        yield
    except TensorError as error:
        raise UnsupportedError(f"the source cannot be run as the reference: {error}") from None


def _reference(of: CheckFactory, source: Path) -> Check:
    import transformers

    summary = f"transformers {transformers.__version__} on {source}, by its own config.json"
    metrics = {"against": "hf", "config": "its own config.json", "independent": True}
    return of.passed("reference", summary, metrics=metrics)


def _rounding(candidate: IncomingCandidate) -> Rounding | None:
    """How OUT rounds the source, where its arrays are narrower than the source's tensors."""
    pairs = [(v.source, v.target) for edge in candidate.edges.values() for v in edge.values]
    narrow = [own for own, theirs in pairs if SIGNIFICAND_BITS[own] < SIGNIFICAND_BITS[theirs]]
    if not narrow:
        return None
    return Rounding(Cast("float32", min(narrow, key=SIGNIFICAND_BITS.__getitem__)))


def _exact_layers(candidate: IncomingCandidate, rounding: Rounding | None) -> HfLayers:
    return HfLayers(candidate.folder, rounding=rounding)


def check_logits(candidate: IncomingCandidate, run: Verification) -> list[Check]:
    """Whole models, side by side.

    Raises:
        CandidateError: MaxText cannot load or run OUT.
        UnsupportedError: transformers cannot load the source.
    """
    of, rows, folder = CheckFactory(Level.LOGITS), run.rows, candidate.folder
    rounding = _rounding(candidate)
    run.note(f"transformers: {folder}, forward over {rows.tokens.size} positions")
    each = [rows.tokens[row : row + 1] for row in range(len(rows.tokens))]
    with _source():
        right = HfModel.load(folder)
        runs = [right.run(row) for row in each]
        logits = [found for found, _ in runs]
        for one in logits:
            demand_finite(one, "the source's own logits")
        moved = _exact_layers(candidate, rounding) if rounding is not None else None
        rounded = rounded_by(moved, rows, logits)
    run.note(f"MaxText: {candidate.items}, forward over {rows.tokens.size} positions")
    with blaming(f"MaxText cannot load or run {candidate.out}"):
        made = _MaxText.load(candidate)
        own = [made.forward(row) for row in each]
        stock = [made.model.logits(row) for row in each] if made.tied else None
        routers = made.routers(rows.tokens, own)
    kinds: tuple[list[Positions], ...] = ([], [], [])
    for row, targets in enumerate(rows.targets):
        found, pairs = [logits[row], own[row]], [(0, 1)]
        if stock is not None:
            found, pairs = [*found, stock[row]], [*pairs, (0, 2), (1, 2)]
        for parts, part in zip(kinds, compare_pairs(found, pairs, targets), strict=False):
            parts.append(part)
    unrounded, against_stock, head = kinds
    routing, baseline = compare_routers(
        candidate.choice,
        rows,
        joined([seen for _, seen in runs]),
        routers,
        rounded.get("rounded_routers"),
    )
    parity = Parity(
        rows=rows,
        unrounded=join(unrounded),
        stock=join(against_stock) if stock is not None else None,
        head=join(head) if stock is not None else None,
        routing=routing,
        rounding=rounded.get("rounded"),
        rounding_routing=baseline,
    )
    checks = [_reference(of, folder), *parity_checks(of, parity, reference=str(folder))]
    if parity.unrounded.lost:
        return [*checks, of.skipped("greedy", "the logits are not all finite")]
    run.note("greedy generation with the KV cache, by transformers")
    others: dict[str, Callable[[Array], Array]] = {
        f"by MaxText {made.model.version}": made.forward,
    }
    apart = [p for p in (parity.unrounded, parity.rounding) if p is not None]
    tie = 2 * max(float(one.max_abs.max()) for one in apart)
    return [*checks, greedy_check(of, right, rows.tokens[0], others, tie=tie)]


@dataclass(frozen=True)
class _MaxText:
    """OUT as MaxText loads it."""

    candidate: IncomingCandidate
    model: MaxTextModel

    @classmethod
    def load(cls, candidate: IncomingCandidate) -> "_MaxText":
        """By MaxText's own loader and its own reading of config.yml."""
        items = candidate.items
        assert items is not None
        return cls(candidate, MaxTextModel.load(items, candidate.out / CONFIG_NAME))

    @property
    def tied(self) -> bool:
        """True if the head is the embedding, which MaxText rounds to bfloat16."""
        return bool(self.model.config.logits_via_embedding)

    def forward(self, tokens: Array) -> Array:
        """Logits [1, T, V] of tokens [1, T], the tied head not rounded."""
        return self.model.logits(tokens, head="unrounded")

    def routers(self, tokens: Array, whole: list[Array]) -> dict[int, Array]:
        """Router scores of the layers taken one at a time, which must be those of the whole."""
        layout = self.candidate.layout
        layers = MaxTextLayers(self.candidate.config, parameters_of(self.model, layout), layout)
        output = run_layers(layers, tokens)
        check_order(layers, output, whole)
        return dict(output.routers)


def check_layers(candidate: IncomingCandidate, run: Verification) -> list[Check]:
    """The same one layer at a time, each model's layer given the source's hidden states.

    Raises:
        CandidateError: MaxText cannot build or run OUT.
        UnsupportedError: transformers cannot load the source.
    """
    of, rows, folder = CheckFactory(Level.LAYERS), run.rows, candidate.folder
    checks, scratch = [_reference(of, folder)], run.options.parity.scratch
    name = f"transformers on {folder}"
    with LayerReader(candidate.arrays, candidate.layout, scratch=scratch) as stored:
        if stored.scratch_bytes:
            run.note(f"laying out the layers of {candidate.step.items}")
            stored.lay_out()
        with blaming(f"MaxText cannot build {candidate.out}"):
            made = MaxTextLayers(candidate.config, stored, candidate.layout)
        rounding = _rounding(candidate)
        with _source():
            right = _exact_layers(candidate, None)
            moved = _exact_layers(candidate, rounding) if rounding is not None else None
        if right.num_layers != made.num_layers:
            summary = f"OUT has {made.num_layers} layers, {name} has {right.num_layers}"
            return [*checks, of.failed("depth", summary)]
        models = Models(name, right, moved, made, candidate.choice, _norm_factor(candidate))
        lockstep = Lockstep(models)
        hidden = lockstep.run(rows.tokens, run.note)
        run.note("final norm and logits")
        lockstep.norm(hidden)
        for model in (made, moved):
            if model is not None:
                model.release()
        unrounded, _, _, moved_logits = compare_heads(
            models, hidden, rows.targets, stock=False, scratch=scratch
        )
    seen = lockstep.routers
    routing, baseline = compare_routers(
        candidate.choice, rows, seen["reference"], seen["converted"], seen.get("rounded")
    )
    parity = Parity(rows, unrounded, None, None, routing, moved_logits, baseline)
    return [
        *checks,
        hidden_check(of, lockstep.places, models.name),
        *parity_checks(of, parity, reference=models.name),
    ]


def _norm_factor(candidate: IncomingCandidate) -> float:
    """The source's final norm times this is MaxText's."""
    rules = candidate.family.rules
    (norm,) = (e for e in candidate.edges.values() if FINAL_NORM.name in rules[e.rule].sources)
    return 1.0 / next((value.fold.factor for value in norm.values if value.fold), 1.0)
