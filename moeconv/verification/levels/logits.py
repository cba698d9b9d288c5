"""Level `logits`: the converted model in transformers against MaxText's own forward pass.

Both are whole in memory, one after the other. MaxText's forward is its own, scan and all; its
router scores come from the same weights taken layer by layer, which must give the very logits of
the whole. `--against hf:DIR` puts another Hugging Face model in MaxText's place.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeconv.errors import TensorError, UnsupportedError
from moeconv.tensor.axes import Array
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import CandidateError, Check, CheckFactory
from moeconv.verification.context import Verification
from moeconv.verification.levels import Level
from moeconv.verification.levels.greedy import greedy_check
from moeconv.verification.levels.parity import Parity, compare_routers, parity_checks
from moeconv.verification.levels.reference import Reference
from moeconv.verification.measure.limits import LOGITS
from moeconv.verification.measure.metrics import (
    Positions,
    compare_logits,
    compare_pairs,
    demand_finite,
    join,
)
from moeconv.verification.measure.tokens import Rows
from moeconv.verification.models.layerwise import LayerwiseModel
from moeconv.verification.models.maxtext import MaxTextModel
from moeconv.verification.models.maxtext_layers import MaxTextLayers
from moeconv.verification.models.run_layers import (
    LayersOutput,
    blocks,
    parameters_of,
    run_layers,
)
from moeconv.verification.models.transformers import HfModel
from moeconv.verification.settings import Note

_OF = CheckFactory(Level.LOGITS)
_TAIL = 8


@dataclass(frozen=True)
class _Computed:
    """What the right model computes, and what rounding alone does to it.

    Attributes:
        name: The model's name.
        logits: Of each row, the tied head not rounded.
        stock: Of each row, as MaxText is; None where that is the same.
        routers: Router scores [B, T, E] by layer.
        forward: Logits [1, T, V] of other tokens [1, T].
        rounded: See `Parity.rounding`.
        rounded_routers: Router scores of the same.
    """

    name: str
    logits: list[Array]
    stock: list[Array] | None
    routers: Mapping[int, Array]
    forward: Callable[[Array], Array]
    rounded: Positions | None = None
    rounded_routers: Mapping[int, Array] | None = None


def run_level(run: Verification) -> list[Check]:
    """Compares the whole models.

    Raises:
        CandidateError: OUT cannot be loaded or run.
        MoeconvError: As `MaxTextModel.load` and `HfModel.load`.
    """
    candidate, options, note = run.candidate, run.options.parity, run.note
    rows, reference = run.rows, Reference.find(run, _OF)
    described = reference.description()
    compute = _maxtext if options.against is None else _transformers
    computed = compute(reference, rows, note)
    note(f"transformers: {candidate.out}, forward over {rows.tokens.size} positions")
    converted = HfModel.load(candidate.out, dtype=options.dtype, blame=CandidateError)
    parity = _compare(candidate, rows, computed, converted)
    checks = [
        reference.check(computed.name),
        *described,
        *parity_checks(_OF, parity, reference=computed.name),
    ]
    if parity.unrounded.lost:  # the likeliest of NaN is no token
        return [*checks, _OF.skipped("greedy", "the logits are not all finite")]
    note("greedy generation with the KV cache")
    # What passes may differ by so much, and so may the two likeliest tokens of a step.
    tie = 2 * max(
        float(p.max_abs.max()) for p in (parity.unrounded, parity.rounding) if p is not None
    )
    others = {
        "without it": lambda tokens: converted.run(tokens)[0],
        f"by {computed.name}": computed.forward,
    }
    return [*checks, greedy_check(_OF, converted, rows.tokens[0], others, tie=tie)]


def _compare(candidate: Candidate, rows: Rows, computed: _Computed, converted: HfModel) -> Parity:
    kinds: tuple[list[Positions], ...] = ([], [], [])
    (unrounded, stock, head), routers = kinds, []
    for row, targets in enumerate(rows.targets):
        logits, seen = converted.run(rows.tokens[row : row + 1])
        routers.append(seen)
        each, pairs = [computed.logits[row], logits], [(0, 1)]
        if computed.stock is not None:
            each, pairs = [*each, computed.stock[row]], [*pairs, (2, 1), (2, 0)]
        for parts, part in zip(kinds, compare_pairs(each, pairs, targets), strict=False):
            parts.append(part)
    routing, baseline = compare_routers(
        candidate.choice, rows, computed.routers, joined(routers), computed.rounded_routers
    )
    return Parity(
        rows=rows,
        unrounded=join(unrounded),
        stock=join(stock) if stock else None,
        head=join(head) if head else None,
        routing=routing,
        rounding=computed.rounded,
        rounding_routing=baseline,
    )


def _maxtext(reference: Reference, rows: Rows, note: Note) -> _Computed:
    """MaxText as a whole, and its layers for the routers."""
    candidate, config = reference.candidate, reference.config
    assert config is not None
    if candidate.items is None:
        raise UnsupportedError(
            f"level logits needs the checkpoint on a local disk, not at {candidate.step.items}; "
            "level layers reads it where it is"
        )
    note(f"MaxText: {candidate.items}, by {config.origin}")
    model = MaxTextModel.load(candidate.items, config.keys)
    if (adapter := candidate.adapter) is not None:
        for name, change in adapter.changes(candidate.layout).items():
            model.add(name, adapter.added(change, {}))
    note(f"MaxText: forward over {rows.tokens.size} positions")
    begin = time.monotonic()
    each = [rows.tokens[row : row + 1] for row in range(len(rows.tokens))]
    logits = [model.logits(row, head="unrounded") for row in each]
    tied = model.config.logits_via_embedding
    stock = [model.logits(row, head="stock") for row in each] if tied else None
    for row in logits:
        demand_finite(row, "MaxText's own logits")
    read = parameters_of(model, candidate.layout)
    layers = MaxTextLayers(config.keys, read, candidate.layout)
    output = run_layers(layers, rows.tokens)
    check_order(layers, output, logits)
    note(f"MaxText: done in {time.monotonic() - begin:.0f} s")
    other = reference.rounded_maxtext(read)
    if other is not None:
        note("MaxText: the same with its weights moved as the output rounds them")
    return _Computed(
        name=f"MaxText {model.version}",
        logits=logits,
        stock=stock,
        routers=output.routers,
        forward=lambda tokens: model.logits(tokens, head="unrounded"),
        **rounded_by(other, rows, logits),
    )


def check_order(layers: MaxTextLayers, output: LayersOutput, whole: list[Array]) -> None:
    """The layers taken one at a time are those of the whole, in the same order."""
    tail = layers.logits(layers.norm(output.hidden[:, -_TAIL:]), "unrounded")
    expected = np.concatenate([logits[:, -_TAIL:] for logits in whole])
    apart = float(np.abs(tail - expected).max()) / (float(np.abs(expected).max()) or 1.0)
    if not apart <= LOGITS.passing:
        raise TensorError(
            f"MaxText's layers one at a time give other logits than MaxText as a whole ({apart:.1e}"
            " of the largest): the layers are not in the order that the checkpoint's layout says"
        )


def _against(
    model: LayerwiseModel, output: LayersOutput, reference: Array, rows: Rows
) -> Positions:
    """Logits of a model's last hidden states against [N, V], block by block."""
    parts, start = [], 0
    targets = rows.targets.reshape(-1)
    for block in blocks(output.hidden):
        logits = model.logits(model.norm(block), "unrounded")[0]
        span = slice(start, start + len(logits))
        apart = compare_logits(reference[span], logits, targets[span])
        parts.append(apart.demand_finite(f"logits of {model.name}, rounded as the output is,"))
        start += len(logits)
    return join(parts)


def _transformers(reference: Reference, rows: Rows, note: Note) -> _Computed:
    """Another Hugging Face model."""
    folder = reference.options.against
    assert folder is not None
    note(f"transformers: {folder}, forward over {rows.tokens.size} positions")
    model = HfModel.load(folder)
    runs = [model.run(rows.tokens[row : row + 1]) for row in range(len(rows.tokens))]
    logits = [found for found, _ in runs]
    return _Computed(
        name=str(folder),
        logits=logits,
        stock=None,
        routers=joined([seen for _, seen in runs]),
        forward=lambda tokens: model.run(tokens)[0],
        **rounded_by(reference.rounded_transformers(), rows, logits),
    )


def rounded_by(model: LayerwiseModel | None, rows: Rows, logits: list[Array]) -> dict[str, Any]:
    """What a reference that is rounded as the output is differs by; nothing without one."""
    if model is None:
        return {}
    output = run_layers(model, rows.tokens)
    flat = np.concatenate([one.reshape(-1, one.shape[-1]) for one in logits])
    return {
        "rounded": _against(model, output, flat, rows),
        "rounded_routers": dict(output.routers),
    }


def joined(found: list[dict[int, Array]]) -> dict[int, Array]:
    """Router scores by layer, of all rows."""
    return {layer: np.concatenate([one[layer] for one in found]) for layer in found[0]}
