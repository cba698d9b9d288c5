"""How MaxText keeps the layers of a model: the way in which, and how they fill it."""

from collections.abc import Mapping, Sequence
from typing import Any

from moeconv.arch.blocks import Block
from moeconv.arch.description import ModelDescription
from moeconv.arch.layout import Layout, build_layout
from moeconv.arch.parameters import LayerKind
from moeconv.arch.stacks import EVERY, Stacking
from moeconv.errors import UnsupportedError

# Longer than any pattern of layers, so that a period of it is one of them all.
_HORIZON = 240
_OTHER_ORDER = "their kinds of attention take turns otherwise than MaxText's"


def arranged(
    block: Block, model: ModelDescription, *, scan_layers: bool | None, scan_axis: int = 1
) -> Layout:
    """The layout that MaxText gives a model.

    Args:
        block: The model's decoder block.
        model: What it is.
        scan_layers: Layers are stacked; None for stacked where MaxText can hold the model so.
        scan_axis: `param_scan_axis`.

    Raises:
        UnsupportedError: MaxText cannot hold the model so.
    """
    reasons: list[str] = []
    for scanned in (True, False) if scan_layers is None else (scan_layers,):
        for stacking in block.stackings:
            if stacking.scanned != scanned:
                continue
            found = _fill(block, stacking, model.layer_kinds, model.settings)
            if isinstance(found, str):
                reasons.append(found)
                continue
            sizes = model.sizes()
            return build_layout(
                block,
                stacking,
                model.layer_kinds,
                sizes,
                blocks=found,
                scan_axis=scan_axis,
                tied=model.tie_word_embeddings,
                # layers/nnx_scan.py stacks all but `nnx.Param` first.
                aside=[p.name for p in block.parameters().values() if p.variable is not None],
            )
    way = "--no-scan-layers" if scan_layers else "another --block"
    raise UnsupportedError(
        f"decoder_block={block.name} cannot keep its {model.num_hidden_layers} layers "
        f"{'stacked' if scan_layers else 'so'}: {'; '.join(dict.fromkeys(reasons))}; give {way}"
    )


def _fill(
    block: Block,
    stacking: Stacking,
    kinds: Sequence[LayerKind],
    settings: Mapping[str, Any],
) -> list[tuple[int, int]] | str:
    """Layers in the block of each segment and its repetitions; or why they do not fill it."""
    count, (first, *rest) = len(kinds), stacking.segments
    if rest and all(each.modules[0].kinds != EVERY for each in (first, *rest)):
        counts = [sum(kind in each.modules[0].kinds for kind in kinds) for each in (first, *rest)]
        return [(1, n) if stacking.scanned else (n, 1) for n in counts]
    types = settings.get("layer_types") or ()

    def matches(cycle: int) -> bool:
        """True if all layers are repetitions of the first ones, as MaxText numbers them."""
        if any(kind != kinds[n % cycle] for n, kind in enumerate(kinds)):
            return False
        turn = block.layer_types
        return turn is None or all(turn(n % cycle, settings) == t for n, t in enumerate(types))

    if not stacking.scanned:
        return [(count, 1)] if matches(count) else _OTHER_ORDER
    if stacking.paired > 1:
        if count % stacking.paired or not matches(stacking.paired):
            return f"{count} layers are no whole number of pairs"
        return [(stacking.paired, count // stacking.paired)]
    if rest:
        # MaxText has one cycle for the block, also of a model that does not fill one.
        cycle = _pattern(block, settings) or next(c for c in range(1, count + 1) if matches(c))
        if not matches(cycle) and not matches(count):
            return _OTHER_ORDER
        whole, left = divmod(count, cycle)
        return [(cycle, whole), (1, left) if rest[0].stacked else (left, 1)]
    cycle = next((c for c in range(1, count + 1) if matches(c)), 0)
    if not cycle:
        return _OTHER_ORDER
    if not first.modules[0].numbered:
        return [(1, count)] if cycle == 1 else f"they differ, in blocks of {cycle}"
    if count % cycle:
        return (
            f"they repeat in blocks of {cycle}, and MaxText drops what does not fill one "
            "(layers/nnx_decoders.py `_init_scanned_generic`)"
        )
    return [(cycle, count // cycle)]


def _pattern(block: Block, settings: Mapping[str, Any]) -> int:
    """The layers after which a block's kinds of attention begin anew; 0 where it has one."""
    if block.layer_types is None:
        return 0
    types = [block.layer_types(n, settings) for n in range(_HORIZON)]
    return next(
        c for c in range(1, _HORIZON) if all(t == types[n % c] for n, t in enumerate(types))
    )
