"""Level `logits`: the converted model in transformers against MaxText's own forward pass.

Both are whole in memory, one after the other. MaxText's forward is its own, scan and all; its
router logits come from the same weights taken layer by layer, which must give the very logits of
the whole. `--against hf:DIR` puts another Hugging Face model in MaxText's place.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moeconv.errors import MoeconvError, TensorError, UnsupportedError
from moeconv.tensor.axes import Array
from moeconv.verification.candidate import Subject
from moeconv.verification.checks import CandidateError, Check, failed, skipped
from moeconv.verification.levels.config_parity import check_description
from moeconv.verification.levels.greedy import greedy_check
from moeconv.verification.levels.parity import Parity, parity_checks
from moeconv.verification.measure.limits import LOGITS
from moeconv.verification.measure.metrics import Positions, compare_logits, demand_finite, join
from moeconv.verification.measure.rounding import roundings
from moeconv.verification.measure.routing import Routing, compare_routing
from moeconv.verification.measure.tokens import Rows
from moeconv.verification.models.layerwise import Side
from moeconv.verification.models.maxtext import MaxTextModel
from moeconv.verification.models.maxtext_layers import MaxTextLayers
from moeconv.verification.models.reference import ReferenceConfig, reference_check, reference_config
from moeconv.verification.models.run_layers import Walked, blocks, moved, parameters_of, walk
from moeconv.verification.models.transformers import HfLayers, HfModel, rounding_between
from moeconv.verification.settings import Note, ParityOptions

_TAIL = 8


@dataclass(frozen=True)
class _Reference:
    """What the right model computes, and what rounding alone does to it.

    Attributes:
        name: The model's name.
        origin: Where its config came from.
        independent: See `ReferenceConfig`.
        logits: Of each row, the tied head not rounded.
        stock: Of each row, as MaxText is; None where that is the same.
        routers: Router logits [B, T, E] by layer.
        rounded: See `Parity.rounding`.
        rounded_routers: Router logits of the same.
        forward: Logits [1, T, V] of other tokens [1, T].
    """

    name: str
    origin: str
    independent: bool
    logits: list[Array]
    stock: list[Array] | None
    routers: Mapping[int, Array]
    forward: Callable[[Array], Array]
    rounded: Positions | None = None
    rounded_routers: Mapping[int, Array] = field(default_factory=dict)


def check_logits(subject: Subject, rows: Rows, options: ParityOptions, note: Note) -> list[Check]:
    """Compares the whole models.

    Args:
        subject: What is verified.
        rows: What is run.
        options: The reference and its config, and the dtype of the computation.
        note: Called with what is being done.

    Raises:
        MoeconvError: As `MaxTextModel.load` and `HfModel.load`.
    """
    described: list[Check] = []
    accepted: tuple[str, ...] = ()
    if options.against is not None:
        reference = _hf_reference(subject, rows, options, options.against, note)
    else:
        config = reference_config(
            subject.model,
            subject.layout,
            subject.step,
            options.config,
            [*subject.manifest.accepted_keys, *options.accept],
        )
        try:
            described = check_description("logits", subject, config)
        except MoeconvError as error:
            return [failed("logits", "description", str(error))]
        accepted = config.told.accepted
        reference = _maxtext_reference(subject, rows, options, config, note)
    note(f"transformers: {subject.out}, forward over {rows.tokens.size} positions")
    candidate = HfModel.load(subject.out, dtype=options.dtype, blame=CandidateError)
    parity = _compare(subject, rows, reference, candidate)
    checks = [
        reference_check(
            "logits",
            reference.name,
            side=options.side,
            origin=reference.origin,
            independent=reference.independent,
            accepted=accepted,
        ),
        *described,
        *parity_checks("logits", parity, reference=reference.name),
    ]
    if parity.unrounded.lost:  # the likeliest of NaN is no token
        return [*checks, skipped("logits", "greedy", "the logits are not all finite")]
    note("greedy generation with the KV cache")
    # What passes may differ by so much, and so may the two likeliest tokens of a step.
    tie = 2 * max(
        float(p.max_abs.max()) for p in (parity.unrounded, parity.rounding) if p is not None
    )
    checks.append(
        greedy_check(
            candidate,
            rows.tokens[0],
            {
                "without it": lambda tokens: candidate.run(tokens)[0],
                f"by {reference.name}": reference.forward,
            },
            tie=tie,
        )
    )
    return checks


def _compare(subject: Subject, rows: Rows, reference: _Reference, candidate: HfModel) -> Parity:
    unrounded, stock, head, routers = [], [], [], []
    for row, targets in enumerate(rows.targets):
        logits, seen = candidate.run(rows.tokens[row : row + 1])
        routers.append(seen)
        unrounded.append(compare_logits(reference.logits[row], logits, targets))
        if reference.stock is not None:
            stock.append(compare_logits(reference.stock[row], logits, targets))
            head.append(compare_logits(reference.stock[row], reference.logits[row], targets))
    joined = {layer: np.concatenate([one[layer] for one in routers]) for layer in routers[0]}
    rounded = None
    if reference.rounded is not None:
        rounded = _routing(subject, rows, reference, reference.rounded_routers, rounded=True)
    return Parity(
        rows=rows,
        unrounded=join(unrounded),
        stock=join(stock) if stock else None,
        head=join(head) if head else None,
        routing=_routing(
            subject, rows, reference, joined, rounded=rounded is not None, rounding=rounded
        ),
        rounding=reference.rounded,
        rounding_routing=rounded,
    )


def _routing(
    subject: Subject,
    rows: Rows,
    reference: _Reference,
    routers: Mapping[int, Array],
    *,
    rounded: bool,
    rounding: Routing | None = None,
) -> Routing:
    return compare_routing(
        reference.routers,
        routers,
        choice=subject.choice,
        shape=(rows.tokens.shape[0], rows.tokens.shape[1]),
        rounded=rounded,
        rounding=rounding,
    )


def _maxtext_reference(
    subject: Subject, rows: Rows, options: ParityOptions, config: ReferenceConfig, note: Note
) -> _Reference:
    """MaxText as a whole, and its layers for the routers."""
    if subject.items is None:
        raise UnsupportedError(
            f"level logits needs the checkpoint on a local disk, not at {subject.step.items}; "
            "level layers reads it where it is"
        )
    layout = subject.layout
    note(f"MaxText: {subject.items}, by {config.origin}")
    model = MaxTextModel.load(subject.items, config.keys)
    note(f"MaxText: forward over {rows.tokens.size} positions")
    begin = time.monotonic()
    each = [rows.tokens[row : row + 1] for row in range(len(rows.tokens))]
    logits = [model.logits(row, head="unrounded") for row in each]
    tied = model.config.logits_via_embedding
    stock = [model.logits(row, head="stock") for row in each] if tied else None
    for row in logits:
        demand_finite(row, "MaxText's own logits")
    read = parameters_of(model, layout)
    layers = MaxTextLayers(config.keys, read, layout)
    walked = walk(layers, rows.tokens)
    _check_order(layers, walked, logits)
    note(f"MaxText: done in {time.monotonic() - begin:.0f} s")
    rounded, rounded_routers = None, {}
    weights = roundings(subject.edges.values())
    if weights or options.dtype != "float32":
        note("MaxText: the same with its weights moved as the output rounds them")
        weighed = moved(read, layout, weights)
        side = MaxTextLayers(config.keys, weighed, layout, dtype=options.dtype)
        other = walk(side, rows.tokens)
        flat = np.concatenate([one.reshape(-1, one.shape[-1]) for one in logits])
        rounded, rounded_routers = _against(side, other, flat, rows), dict(other.routers)
    return _Reference(
        name=f"MaxText {model.version}",
        origin=config.origin,
        independent=config.independent,
        logits=logits,
        stock=stock,
        routers=walked.routers,
        forward=lambda tokens: model.logits(tokens, head="unrounded"),
        rounded=rounded,
        rounded_routers=rounded_routers,
    )


def _check_order(layers: MaxTextLayers, walked: Walked, whole: list[Array]) -> None:
    """The layers taken one at a time are those of the whole, in the same order."""
    tail = layers.logits(layers.norm(walked.hidden[:, -_TAIL:]), "unrounded")
    expected = np.concatenate([logits[:, -_TAIL:] for logits in whole])
    apart = float(np.abs(tail - expected).max()) / (float(np.abs(expected).max()) or 1.0)
    if not apart <= LOGITS.passing:
        raise TensorError(
            f"MaxText's layers one at a time give other logits than MaxText as a whole ({apart:.1e}"
            " of the largest): the layers are not in the order that the checkpoint's layout says"
        )


def _against(side: Side, walked: Walked, reference: Array, rows: Rows) -> Positions:
    """Logits of walked layers against [N, V], block by block."""
    parts, start = [], 0
    targets = rows.targets.reshape(-1)
    for block in blocks(walked.hidden):
        logits = side.logits(side.norm(block), "unrounded")[0]
        span = slice(start, start + len(logits))
        apart = compare_logits(reference[span], logits, targets[span])
        parts.append(apart.demand_finite(f"logits of {side.name}, rounded as the output is,"))
        start += len(logits)
    return join(parts)


def _hf_reference(
    subject: Subject, rows: Rows, options: ParityOptions, folder: Path, note: Note
) -> _Reference:
    """Another Hugging Face model."""
    note(f"transformers: {folder}, forward over {rows.tokens.size} positions")
    model = HfModel.load(folder)
    each = [rows.tokens[row : row + 1] for row in range(len(rows.tokens))]
    runs = [model.run(row) for row in each]
    logits = [found for found, _ in runs]
    rounded, rounded_routers = None, {}
    rounding = rounding_between(folder, subject.out)
    if rounding is not None or options.dtype != "float32":
        side = HfLayers(folder, dtype=options.dtype, rounding=rounding)
        other = walk(side, rows.tokens)
        flat = np.concatenate([one.reshape(-1, one.shape[-1]) for one in logits])
        rounded, rounded_routers = _against(side, other, flat, rows), dict(other.routers)
    return _Reference(
        name=str(folder),
        origin="its own config.json",
        independent=True,
        logits=logits,
        stock=None,
        routers=_joined([seen for _, seen in runs]),
        forward=lambda tokens: model.run(tokens)[0],
        rounded=rounded,
        rounded_routers=rounded_routers,
    )


def _joined(found: list[dict[int, Array]]) -> dict[int, Array]:
    return {layer: np.concatenate([one[layer] for one in found]) for layer in found[0]}
