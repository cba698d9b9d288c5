"""Level `layers`: both models layer by layer, one layer of each in memory.

A mistake is named where it is, however many layers follow; memory is that of one layer, so a model
far larger than the machine is verified on it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from moeconv.arch.parameters import FINAL_NORM
from moeconv.verification.checks import CandidateError, Check, CheckFactory
from moeconv.verification.context import Verification
from moeconv.verification.levels import Level
from moeconv.verification.levels.head import compare_heads
from moeconv.verification.levels.hidden import hidden_check
from moeconv.verification.levels.lockstep import Lockstep, Models
from moeconv.verification.levels.parity import Parity, compare_routers, parity_checks
from moeconv.verification.levels.reference import Reference
from moeconv.verification.models.maxtext_layers import MaxTextLayers
from moeconv.verification.models.run_layers import merged
from moeconv.verification.models.source_layers import LayerReader
from moeconv.verification.models.transformers import HfLayers
from moeconv.verification.settings import Note

_OF = CheckFactory(Level.LAYERS)


def run_level(run: Verification) -> list[Check]:
    """Compares layer by layer.

    Raises:
        CandidateError: OUT cannot be loaded or run.
        MoeconvError: The reference cannot be built, or the checkpoint cannot be read.
    """
    candidate, options, note = run.candidate, run.options.parity, run.note
    rows, reference = run.rows, Reference.find(run, _OF)
    described = reference.description()
    with _models(reference, note) as models:
        checks = [reference.check(models.name), *described]
        right, own = models.reference.num_layers, models.converted.num_layers
        if right != own:  # the shorter one would be found right as far as it goes
            summary = f"the converted model has {own} layers, {models.name} has {right}"
            return [*checks, _OF.failed("depth", summary)]
        lockstep = Lockstep(models)
        hidden = lockstep.run(rows.tokens, note)
        note("final norm and logits")
        lockstep.norm(hidden)
        # A head is the largest tensor of a small model: only one model holds its own at a time.
        models.converted.release()
        if models.rounded is not None:
            models.rounded.release()
        tied = candidate.model.tie_word_embeddings and reference.config is not None
        unrounded, stock, head, rounding = compare_heads(
            models, hidden, rows.targets, stock=tied, scratch=options.scratch
        )
    routers = lockstep.routers
    routing, baseline = compare_routers(
        candidate.choice,
        rows,
        routers["reference"],
        routers["converted"],
        routers.get("rounded"),
    )
    parity = Parity(rows, unrounded, stock, head, routing, rounding, baseline)
    return [
        *checks,
        hidden_check(_OF, lockstep.places, models.name),
        *parity_checks(_OF, parity, reference=models.name),
    ]


@contextmanager
def _models(reference: Reference, note: Note) -> Iterator[Models]:
    """The models, as long as the checkpoint's layers can be read."""
    candidate, options, config = reference.candidate, reference.options, reference.config
    if config is None:
        assert options.against is not None
        yield Models(
            str(options.against),
            HfLayers(options.against),
            reference.rounded_transformers(),
            _converted(reference),
            candidate.choice,
            None,
        )
        return
    with LayerReader(candidate.arrays, candidate.layout, scratch=options.scratch) as stored:
        if stored.scratch_bytes:
            note(f"laying out the layers of {candidate.step.items}")
            stored.lay_out()
        read = merged(stored, candidate.layout, candidate.adapter)
        note(f"MaxText and transformers: building, by {config.origin}")
        maxtext = MaxTextLayers(config.keys, read, candidate.layout)
        rules = candidate.family.rules
        (norm,) = (e for e in candidate.edges.values() if FINAL_NORM.name in rules[e.rule].sources)
        yield Models(
            f"MaxText {maxtext.version}",
            maxtext,
            reference.rounded_maxtext(read),
            _converted(reference),
            candidate.choice,
            next((value.fold.factor for value in norm.values if value.fold), 1.0),
        )


def _converted(reference: Reference) -> HfLayers:
    return HfLayers(reference.candidate.out, dtype=reference.options.dtype, blame=CandidateError)
