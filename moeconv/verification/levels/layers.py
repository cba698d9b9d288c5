"""Level `layers`: both models layer by layer, one layer of each in memory.

Every layer of the converted model is run twice: on the reference's hidden states, so that what
differs came from this very layer, and on its own, so that the growth of the difference is seen.
A mistake is named where it is, however many layers follow; memory is that of one layer, so a model
far larger than the machine is verified on it.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import IO

import numpy as np

from moeconv.arch.parameters import FINAL_NORM
from moeconv.errors import MoeconvError, OutputError
from moeconv.tensor.axes import Array
from moeconv.verification.candidate import Subject
from moeconv.verification.checks import CandidateError, Check, Status, failed, passed, worse
from moeconv.verification.levels.config_parity import check_description
from moeconv.verification.levels.parity import Parity, parity_checks
from moeconv.verification.measure.limits import HIDDEN, ROUTER
from moeconv.verification.measure.metrics import compare_logits, demand_finite, join
from moeconv.verification.measure.rounding import roundings
from moeconv.verification.measure.routing import Choice, Routing, compare_routing
from moeconv.verification.measure.tokens import Rows
from moeconv.verification.models.layerwise import Side, Trace
from moeconv.verification.models.maxtext_layers import MaxTextLayers
from moeconv.verification.models.reference import ReferenceConfig, reference_check, reference_config
from moeconv.verification.models.run_layers import BLOCK, blocks, moved
from moeconv.verification.models.source_layers import LayerReader
from moeconv.verification.models.transformers import HfLayers, rounding_between
from moeconv.verification.settings import Note, ParityOptions

PARTS = ("attention", "router", "experts", "output")


@dataclass(frozen=True)
class Apart:
    """A difference: its largest vector and its root mean square, relative to the reference's."""

    largest: float
    rms: float


@dataclass(frozen=True)
class Place:
    """One tensor of hidden states, of one layer or outside them.

    Attributes:
        part: `embedding`, one of `PARTS`, or `final norm`.
        layer: Its layer, None outside.
        local: The difference that arose here: both were given the reference's hidden states.
        own: The difference with all that came before.
        rounding: What rounding alone does here, None where the output is not rounded.
        status: The verdict on `local`.
    """

    part: str
    layer: int | None
    local: Apart
    own: Apart
    rounding: Apart | None
    status: Status

    @property
    def where(self) -> str:
        """For people."""
        if self.layer is None:
            return self.part
        return f"layer {self.layer}" + (f" {self.part}" if self.part != "output" else "")


@dataclass(frozen=True)
class _Sides:
    """The right model, the same moved by rounding (if it matters), and how its norm is scaled."""

    name: str
    origin: str
    independent: bool
    reference: Side
    rounding: Side | None
    norm_factor: float | None


def check_layers(subject: Subject, rows: Rows, options: ParityOptions, note: Note) -> list[Check]:
    """Compares layer by layer.

    Args:
        subject: What is verified.
        rows: What is run.
        options: The reference and its config, and the dtype of the computation.
        note: Called with what is being done.

    Raises:
        MoeconvError: A side cannot be built, or the checkpoint cannot be read.
    """
    config: ReferenceConfig | None = None
    described: list[Check] = []
    if options.against is None:
        config = reference_config(
            subject.model,
            subject.layout,
            subject.step,
            options.config,
            [*subject.manifest.accepted_keys, *options.accept],
        )
        try:
            described = check_description("layers", subject, config)
        except MoeconvError as error:
            return [failed("layers", "description", str(error))]
    with _sides(subject, options, config, note) as sides:
        candidate = HfLayers(subject.out, dtype=options.dtype, blame=CandidateError)
        reference = reference_check(
            "layers",
            sides.name,
            side=options.side,
            origin=sides.origin,
            independent=sides.independent,
            accepted=config.told.accepted if config else (),
        )
        right, own = sides.reference.num_layers, candidate.num_layers
        if right != own:  # the shorter one would be found right as far as it goes
            summary = f"the converted model has {own} layers, {sides.name} has {right}"
            return [reference, *described, failed("layers", "depth", summary)]
        walk = _Walk(sides, candidate, rows, subject.choice, options.scratch)
        walk.run(note)
        note("final norm and logits")
        try:
            parity = walk.parity(tied=subject.model.tie_word_embeddings)
        except OSError as error:  # of the files that logits wait in
            place = options.scratch or gettempdir()
            raise OutputError(
                f"level layers cannot keep logits in {place}: {error.strerror}; set TMPDIR to a "
                "folder with room"
            ) from None
        return [
            reference,
            *described,
            _hidden(walk.places, sides.name),
            *parity_checks("layers", parity, reference=sides.name),
        ]


@contextmanager
def _sides(
    subject: Subject, options: ParityOptions, config: ReferenceConfig | None, note: Note
) -> Iterator[_Sides]:
    if options.against is not None:
        folder = options.against
        rounding = rounding_between(folder, subject.out)
        needed = rounding is not None or options.dtype != "float32"
        yield _Sides(
            str(folder),
            "its own config.json",
            True,
            HfLayers(folder),
            HfLayers(folder, dtype=options.dtype, rounding=rounding) if needed else None,
            None,
        )
        return
    layout, weights = subject.layout, roundings(subject.edges.values())
    assert config is not None
    with LayerReader(subject.arrays, layout, scratch=options.scratch) as read:
        if read.scratch_bytes:
            note(f"laying out the layers of {subject.step.items}")
            read.lay_out()
        note(f"MaxText and transformers: building, by {config.origin}")
        reference = MaxTextLayers(config.keys, read, layout)
        other = None
        if weights or options.dtype != "float32":
            weighed = moved(read, layout, weights)
            other = MaxTextLayers(config.keys, weighed, layout, dtype=options.dtype)
        (norm,) = (e for e in subject.edges.values() if FINAL_NORM.name in e.rule.sources)
        factor = next((value.fold.factor for value in norm.values if value.fold), 1.0)
        name = f"MaxText {reference.version}"
        yield _Sides(name, config.origin, config.independent, reference, other, factor)


class _Walk:
    """Both sides on their way through the layers."""

    def __init__(
        self, sides: _Sides, candidate: Side, rows: Rows, choice: Choice, scratch: Path | None
    ) -> None:
        self._sides, self._candidate, self._rows, self._choice = sides, candidate, rows, choice
        self._scratch = scratch
        self.places: list[Place] = []
        self._routers: dict[str, dict[int, Array]] = {"reference": {}, "own": {}, "rounding": {}}

    def run(self, note: Note) -> None:
        """Embedding and every layer."""
        tokens = self._rows.tokens
        reference, moved_side = self._sides.reference, self._sides.rounding
        right = reference.embed(tokens)
        demand_finite(right, f"the embeddings of {self._sides.name}")
        own = self._candidate.embed(tokens)
        rounded = moved_side.embed(tokens) if moved_side is not None else None
        self._place("embedding", None, right, own, own, rounded)
        for side in (reference, self._candidate, moved_side):
            if side is not None:
                side.release()
        for number in range(reference.num_layers):
            note(f"layer {number} ({number + 1} of {reference.num_layers})")
            rounded = self._layer(number, right, own, rounded)
            right, own = self._right, self._own
        self._rounded = rounded

    def _layer(self, number: int, right: Array, own: Array, rounded: Array | None) -> Array | None:
        batch = len(right)
        exact = self._sides.reference.layer(number, right)
        _demand_finite(exact, f"of {self._sides.name}", number)
        found = self._candidate.layer(number, np.concatenate([right, own]))
        other = None
        if self._sides.rounding is not None and rounded is not None:
            other = self._sides.rounding.layer(number, np.concatenate([right, rounded]))
            _demand_finite(other, f"of {self._sides.name}, rounded as the output is,", number)
        calm = calm_rounded = None
        if exact.router is not None and found.router is not None:
            moved_router = other.router if other is not None else None
            rounding = None
            if moved_router is not None:
                rounding, calm_rounded = self._calm(exact.router, moved_router[:batch], None)
                self._routers["rounding"][number] = moved_router[batch:]
            _, calm = self._calm(exact.router, found.router[:batch], rounding)
            self._routers["reference"][number] = exact.router
            self._routers["own"][number] = found.router[batch:]
        for part in PARTS:
            expected, got = getattr(exact, part), getattr(found, part)
            if expected is None or got is None:
                continue  # a dense layer written as copies has an idle router here, none there
            masks = (calm, calm_rounded) if part in ("experts", "output") else (None, None)
            moved_part = getattr(other, part)[:batch] if other is not None else None
            self._place(part, number, expected, got[:batch], got[batch:], moved_part, masks)
        self._right, self._own = exact.output, found.output[batch:]
        return other.output[batch:] if other is not None else None

    def _calm(self, right: Array, other: Array, rounding: Routing | None) -> tuple[Routing, Array]:
        """Routing of one layer given the same input, and where no near-tie flipped."""
        found = compare_routing(
            {0: right},
            {0: other},
            choice=self._choice,
            shape=(right.shape[0], right.shape[1]),
            rounded=self._sides.rounding is not None,
            rounding=rounding,
        )
        flipped = (self._choice.chosen(right) != self._choice.chosen(other)).any(axis=-1)
        explained = found.layers[0].status is Status.PASS
        return found, ~flipped if explained else np.ones_like(flipped)

    def _place(
        self,
        part: str,
        layer: int | None,
        right: Array,
        local: Array,
        own: Array,
        rounded: Array | None,
        masks: tuple[Array | None, Array | None] = (None, None),
    ) -> None:
        measure = _router_apart if part == "router" else _apart
        limit = ROUTER if part == "router" else HIDDEN
        here, grown = measure(right, local, masks[0]), measure(right, own, None)
        moved_by = measure(right, rounded, masks[1]) if rounded is not None else None
        status = worse(
            limit.grade(here.largest, moved_by.largest if moved_by is not None else 0.0),
            limit.grade(here.rms, moved_by.rms if moved_by is not None else 0.0),
        )
        self.places.append(Place(part, layer, here, grown, moved_by, status))

    @staticmethod
    def _paired(
        hidden: Array, targets: Array, logits: IO[bytes]
    ) -> Iterator[tuple[Array, Array, Array]]:
        """Blocks of hidden states with their targets and the reference's logits."""
        size = logits.seek(0, os.SEEK_END) // 4
        vocabulary = size // len(targets)
        for number, block in enumerate(blocks(hidden)):
            wanted = targets[number * BLOCK : (number + 1) * BLOCK]
            yield block, wanted, _read(logits, number, (len(wanted), vocabulary))

    def parity(self, *, tied: bool) -> Parity:
        """The final norm, then logits block by block, each side from its own hidden states."""
        sides, candidate, rows = self._sides, self._candidate, self._rows
        if sides.norm_factor is not None:
            right = sides.reference.norm(self._right) * np.float32(sides.norm_factor)
            rounded = None
            if sides.rounding is not None:
                rounded = sides.rounding.norm(self._right) * np.float32(sides.norm_factor)
            local, own = candidate.norm(self._right), candidate.norm(self._own)
            self._place("final norm", None, right, local, own, rounded)
        stock = tied and isinstance(sides.reference, MaxTextLayers)
        # A head is the largest tensor of a small model: only one side holds its own at a time.
        candidate.release()
        if sides.rounding is not None:
            sides.rounding.release()
        with TemporaryFile(dir=self._scratch) as exact, TemporaryFile(dir=self._scratch) as plain:
            for block in blocks(self._right):
                normed = sides.reference.norm(block)
                exact.write(sides.reference.logits(normed, "unrounded"))
                if stock:
                    plain.write(sides.reference.logits(normed, "stock"))
            sides.reference.release()
            targets, found, head, moved_apart = rows.targets.reshape(-1), [], [], []
            if sides.rounding is not None and self._rounded is not None:
                for block, wanted, right in self._paired(self._rounded, targets, exact):
                    other = sides.rounding.logits(sides.rounding.norm(block), "unrounded")[0]
                    apart = compare_logits(right, other, wanted)
                    moved_apart.append(apart.demand_finite(f"logits of {sides.name}, rounded,"))
                sides.rounding.release()
            against_stock = []
            for number, (block, wanted, right) in enumerate(
                self._paired(self._own, targets, exact)
            ):
                got = candidate.logits(candidate.norm(block), "stock")[0]
                found.append(compare_logits(right, got, wanted))
                if stock:
                    rounded_head = _read(plain, number, right.shape)
                    against_stock.append(compare_logits(rounded_head, got, wanted))
                    head.append(compare_logits(rounded_head, right, wanted))
            candidate.release()
        shape = (rows.tokens.shape[0], rows.tokens.shape[1])
        routers, rounding = self._routers, None
        if sides.rounding is not None:
            rounding = compare_routing(
                routers["reference"],
                routers["rounding"],
                choice=self._choice,
                shape=shape,
                rounded=True,
            )
        return Parity(
            rows=rows,
            unrounded=join(found),
            stock=join(against_stock) if against_stock else None,
            head=join(head) if head else None,
            routing=compare_routing(
                routers["reference"],
                routers["own"],
                choice=self._choice,
                shape=shape,
                rounded=rounding is not None,
                rounding=rounding,
            ),
            rounding=join(moved_apart) if moved_apart else None,
            rounding_routing=rounding,
        )


def _demand_finite(trace: Trace, whose: str, layer: int) -> None:
    """Raises as `demand_finite`, of each part of a layer."""
    for part in PARTS:
        if (values := getattr(trace, part)) is not None:
            demand_finite(values, f"{part} values {whose} in layer {layer}")


def _read(file: IO[bytes], number: int, shape: tuple[int, ...]) -> Array:
    """Block `number` of logits [N, V]; every block but the last has `BLOCK` positions."""
    file.seek(number * BLOCK * shape[1] * 4)
    return np.fromfile(file, np.float32, math.prod(shape)).reshape(shape)


Measure = Callable[[Array, Array, Array | None], Apart]


def _apart(right: Array, other: Array, mask: Array | None) -> Apart:
    """Vectors [B, T, D] against the mean length of the reference's."""
    if not np.isfinite(other).all():  # also at a position that is judged apart
        return Apart(math.inf, math.inf)
    expected, got = right.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(got - expected, axis=-1)
    if mask is not None:
        lengths = lengths[mask]
    unit = float(np.sqrt((np.linalg.norm(expected, axis=-1) ** 2).mean())) or 1.0
    if not lengths.size:
        return Apart(0.0, 0.0)
    return Apart(float(lengths.max()) / unit, float(np.sqrt((lengths**2).mean())) / unit)


def _router_apart(right: Array, other: Array, mask: Array | None) -> Apart:
    """Router logits [B, T, E] against their standard deviation."""
    if not np.isfinite(other).all():
        return Apart(math.inf, math.inf)
    expected, got = right.astype(np.float64), other.astype(np.float64)
    difference = np.abs(got - expected)
    unit = float(expected.std()) or 1.0
    return Apart(float(difference.max()) / unit, float(np.sqrt((difference**2).mean())) / unit)


def _hidden(places: list[Place], reference: str) -> Check:
    """The hidden states, and the first place that diverges."""
    status = Status.PASS
    for place in places:
        status = worse(status, place.status)
    layers = 1 + max((p.layer for p in places if p.layer is not None), default=-1)
    metrics = {"places": [asdict(place) for place in places]}
    if status is Status.PASS:
        worst = max(places, key=lambda p: p.local.largest)
        outputs = [p for p in places if p.part == "output"]
        summary = (
            f"{len(places)} tensors of {layers} layers: at most {worst.local.largest:.1e} arises "
            f"in one place ({worst.where}); {outputs[-1].own.largest:.1e} at the end"
        )
        return passed("layers", "hidden", summary, metrics=metrics)
    first = next(p for p in places if p.status is status)
    others = [p.where for p in places if p.status is status and p is not first]
    # The output of a layer differs because a part of it does: naming it again says nothing.
    others = [w for w in others if f"{w} " not in first.where + " "][:5]
    return Check(
        level="layers",
        name="hidden",
        status=status,
        summary=f"the first place that is not {reference}'s is {first.where}: "
        f"{first.local.largest:.1e} arises there"
        + (f"; also {', '.join(others)}" if others else ""),
        layer=first.layer,
        metrics=metrics,
    )
