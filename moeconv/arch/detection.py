"""Finding out from names and shapes alone which arrays of a checkpoint hold which layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeconv.arch.blocks import Block
from moeconv.arch.layout import Layout, StoredParameter, ordered, stored_parameter
from moeconv.arch.parameters import FINAL_NORM, LayerKind, Parameter
from moeconv.arch.stacks import (
    NESTED,
    STACKED,
    KeyPath,
    Module,
    Place,
    Stacking,
    axes_in,
    layers_of,
)
from moeconv.errors import ConfigError, TensorError
from moeconv.untrusted.text import listing

# Ten times the deepest models, and five times the most experts in all their layers: what a file
# says is bounded before it is counted through.
MOST_LAYERS = 2**11
MOST_EXPERTS = 2**17


def detect_layout(
    shapes: Mapping[KeyPath, tuple[int, ...]],
    blocks: Sequence[Block],
    *,
    scan_axis: int | None = None,
    collections: Mapping[KeyPath, str] | None = None,
) -> Layout:
    """Finds out how the arrays of a checkpoint are laid out.

    Args:
        shapes: Shape of every array below `params.params`, by key path.
        blocks: The decoder block; where no config names it, all that it may be. The first that has
            exactly these parameters is taken.
        scan_axis: `param_scan_axis` when the run's config gives it; only needed when hidden size
            and stacked layers are equal in number, so that shapes do not show it.
        collections: Where the arrays are that are not in `params` (`Parameter.may_be_in`).

    Raises:
        TensorError: An array that the block does not have (all are listed), a missing layer, a
            missing parameter, or a number of axes that does not fit.
        ConfigError: The scan axis is ambiguous, or the configured one contradicts the shapes.
    """
    nearest: tuple[int, TensorError] | None = None
    for block in blocks:
        try:
            return _Detection(block, shapes, collections or {}).layout(scan_axis)
        except TensorError as error:
            unknown = len(_unknown(block, shapes))
            if nearest is None or unknown < nearest[0]:
                nearest = unknown, error
    assert nearest is not None
    raise nearest[1]


def _unknown(block: Block, shapes: Mapping[KeyPath, tuple[int, ...]]) -> list[str]:
    """The arrays that are no parameter of the block, wherever it keeps its layers."""
    outer = {p.name for p in block.outer}
    inner = {p.name for group in block.layers.values() for p in group}
    return [
        ".".join(path)
        for path in sorted(shapes)
        if ".".join(path) not in outer
        and not any(
            (place := stacking.place(path)) and place.name in inner for stacking in block.stackings
        )
    ]


def may_hold(block: Block, path: KeyPath, collection: str) -> bool:
    """True if a block has a parameter at a key path, and may have it in this collection."""
    places = [stacking.place(path) for stacking in block.stackings]
    names = {".".join(path), *(place.name for place in places if place is not None)}
    return any(
        parameter.may_be_in(collection)
        for name, parameter in block.parameters().items()
        if name in names
    )


# Length of an axis by its name; of a stack by that, its segment and, for a nested one, its module.
_Lengths = dict[Any, int]


@dataclass(frozen=True)
class _Slot:
    """One module of a block that is repeated, or of which there is one: its parameters."""

    position: int
    number: int
    module: Module
    places: Mapping[KeyPath, Place]
    kind: LayerKind


def _agree(arrays: Sequence[StoredParameter]) -> bool:
    """True if every axis of a model is as long in all its arrays."""
    sizes: dict[str, int] = {}
    return all(
        sizes.setdefault(axis, size) == size
        for array in arrays
        for axis, size in zip(array.axes, array.shape, strict=True)
        if axis not in (STACKED, NESTED)
    )


class _Detection:
    """The layout of one checkpoint, as one block would have it."""

    def __init__(
        self,
        block: Block,
        shapes: Mapping[KeyPath, tuple[int, ...]],
        collections: Mapping[KeyPath, str],
    ) -> None:
        self._block, self._shapes, self._collections = block, shapes, collections
        self._parameters = block.parameters()
        self._outer = {tuple(p.name.split(".")): p for p in block.outer}

    def layout(self, scan_axis: int | None) -> Layout:
        """See `detect_layout`."""
        if unknown := _unknown(self._block, self._shapes):
            raise TensorError(
                "the checkpoint holds parameters that no supported decoder block has, so "
                f"converting it would drop them:{listing(unknown)}"
            )
        for needed in self._block.outer[:-1]:  # but the head, which a tied model has not
            if tuple(needed.name.split(".")) not in self._shapes:
                raise TensorError(f"the checkpoint lacks {needed.name}")
        layouts = (self._layout(way, scan_axis) for way in self._stackings())
        first = next(layouts)
        if _agree(first.arrays):
            return first
        return next((layout for layout in layouts if _agree(layout.arrays)), first)

    def _layout(self, stacking: Stacking, scan_axis: int | None) -> Layout:
        self._stacking, self._places = stacking, self._placed(stacking)
        slots = [self._slots(number) for number, _ in enumerate(self._stacking.segments)]
        axis, lengths = self._scan_axis(scan_axis, slots)
        kinds, arrays, first, cycle = [], self._outer_arrays(), 0, 1
        for number, (segment, modules) in enumerate(
            zip(self._stacking.segments, slots, strict=True)
        ):
            depth = lengths.get((STACKED, number, None), 1)
            widths = [lengths.get((NESTED, number, each.position), 1) for each in modules]
            if first + sum(widths) * depth > MOST_LAYERS:
                raise TensorError(
                    f"the shapes of the checkpoint have {first + sum(widths) * depth} layers; no "
                    f"model has more than {MOST_LAYERS}"
                )
            block = zip(modules, widths, strict=True)
            kinds += [each.kind for each, width in block for _ in range(width)] * depth
            for each, held in zip(modules, layers_of(widths, depth, first), strict=True):
                arrays += self._arrays(each, axis, held, {**lengths, STACKED: depth})
            first += sum(widths) * depth
            cycle = max(cycle, sum(widths)) if segment.stacked else cycle
        self._refuse_too_many_experts(arrays, len(kinds))
        return Layout(
            self._block,
            self._stacking,
            axis if any(array.stacked for array in arrays) else None,
            cycle,
            tuple(kinds),
            ordered(arrays),
        )

    def _inner(self) -> Iterator[KeyPath]:
        return (path for path in sorted(self._shapes) if path not in self._outer)

    def _stackings(self) -> list[Stacking]:
        """The ways in which all layers may be kept: of several the sizes must decide."""
        ways: dict[str, tuple[Stacking, KeyPath]] = {}
        possible = list(self._block.stackings)
        for path in self._inner():
            fits = [s for s in possible if self._place(s, path) is not None]
            own = [s for s in self._block.stackings if self._place(s, path) is not None]
            ways.setdefault("scanned" if own[0].scanned else "unscanned", (own[0], path))
            if not fits:
                shown = [".".join(path) for _, path in ways.values()]
                shown = shown if len(shown) > 1 else [*shown, ".".join(path)]
                raise TensorError(
                    "the checkpoint mixes scanned and unscanned layers "
                    f"({' and '.join(reversed(shown))}); no MaxText run writes that"
                )
            possible = fits
        if not ways:
            raise TensorError("the checkpoint holds no decoder layers below params.params.decoder")
        return possible

    def _place(self, stacking: Stacking, path: KeyPath) -> Place | None:
        place = stacking.place(path)
        known = place is not None and bool(self._block.kinds_of(place.name))
        return place if known else None

    def _placed(self, stacking: Stacking) -> dict[KeyPath, Place]:
        found = {path: self._place(stacking, path) for path in self._inner()}
        return {path: place for path, place in found.items() if place is not None}

    def _outer_arrays(self) -> list[StoredParameter]:
        return [
            stored_parameter(path, self._shapes[path], parameter, parameter.axes, ())
            for path, parameter in self._outer.items()
            if path in self._shapes
        ]

    def _slots(self, number: int) -> list["_Slot"]:
        """The modules of a segment's block in order."""
        segment = self._stacking.segments[number]
        found: list[_Slot] = []
        for position, module in enumerate(segment.modules):
            groups: dict[int, dict[KeyPath, Place]] = {}
            for path, place in self._places.items():
                if (place.segment, place.module) == (number, position):
                    groups.setdefault(place.number, {})[path] = place
            if not groups:
                if segment is self._stacking.segments[0] and not segment.optional:
                    raise TensorError(f"the checkpoint lacks {module.name(0)}")
                continue  # no remainder
            last = module.pattern.split(".")[-1].format("")
            lacks = (
                "the checkpoint lacks layers of its scanned block:"
                if segment.stacked
                else "the checkpoint lacks layers:"
            )
            prefix = f"{'layers.' if segment.stacked else ''}{last}"
            _refuse_gaps(groups, lacks, prefix)
            for n in sorted(groups):
                kind = self._kind({place.name for place in groups[n].values()}, module, n)
                found.append(_Slot(position, n, module, groups[n], kind))
        return sorted(found, key=lambda slot: segment.order(slot.position, slot.number))

    def _kind(self, names: set[str], module: Module, number: int) -> LayerKind:
        """The kind of layer with these parameters; the nearest, where there is none, says why."""
        apart = {
            kind: (sorted(own - names), sorted(names - own))
            for kind, group in self._block.layers.items()
            if module.may_have(kind, number)
            for own in [{p.name for p in group}]
        }
        # A layer with any expert is meant to be one with experts.
        kind = min(apart, key=lambda kind: (len(apart[kind][1]), len(apart[kind][0])))
        missing, unexpected = apart[kind]
        if missing or unexpected:
            wrong = [*(f"missing {n}" for n in missing), *(f"unexpected {n}" for n in unexpected)]
            where = module.name(number)
            raise TensorError(f"{where} is not a whole {kind} layer:{listing(wrong)}")
        return kind

    def _arrays(
        self, slot: "_Slot", axis: int, layers: tuple[int, ...], sizes: Mapping[Any, int]
    ) -> Iterator[StoredParameter]:
        for path, place in slot.places.items():
            parameter = self._parameter(place.name, slot.kind)
            if not parameter.may_be_in(where := self._collections.get(path, "params")):
                raise TensorError(
                    f"the checkpoint holds {'.'.join(path)} in {where}, not among the parameters; "
                    "what is there is not what this decoder block has by that name"
                )
            shape, ways = self._shapes[path], self._ways(slot.module, path, parameter, axis)
            fits = [
                axes
                for axes in ways
                if all(sizes.get(a, n) == n for a, n in zip(axes, shape, strict=False))
            ]
            if len(fits) > 1:
                places = " or ".join(str(axes.index(STACKED)) for axes in fits)
                raise ConfigError(
                    f"{'.'.join(path)} {list(shape)} may have its layers on axis {places}, by the "
                    "MaxText that wrote it; convert a train state that MaxText 0.2.4 or later "
                    "saves of this run, or one with scan_layers=false"
                )
            yield stored_parameter(path, shape, parameter, (fits or ways)[0], layers)

    def _ways(
        self, module: Module, path: KeyPath, parameter: Parameter, axis: int
    ) -> list[tuple[str, ...]]:
        """What the axes of an array may be.

        A variable of a class of its own is stacked on axis 0. Among the parameters, and in an NNX
        state, it may have been an `nnx.Param` when it was saved.
        """
        usual, first = (axes_in(module, parameter.axes, at) for at in (axis, 0))
        if parameter.variable is None or usual == first:
            return [usual]
        return (
            [usual, first] if self._collections.get(path, "params") in ("params", "") else [first]
        )

    def _parameter(self, name: str, kind: LayerKind) -> Parameter:
        return next(p for p in self._block.layers[kind] if p.name == name)

    def _scan_axis(
        self, configured: int | None, slots: Sequence[Sequence["_Slot"]]
    ) -> tuple[int, "_Lengths"]:
        """The layer axis and the lengths of all stacks: the one way that fits every shape."""
        final = tuple(FINAL_NORM.name.split("."))
        if len(self._shapes[final]) != 1:
            raise TensorError(
                f"{FINAL_NORM.name} has shape {list(self._shapes[final])}, not one axis"
            )
        if not any(slot.module.stacked for segment in slots for slot in segment):
            return 0, {}
        fits: dict[int, _Lengths] = {}
        problem = ""
        for axis in (1, 0, 2, 3):
            lengths, misfit = self._lengths(axis, self._shapes[final][0], slots)
            if misfit is None:
                fits[axis] = lengths
            problem = problem or (misfit or "")
        if not fits:
            raise TensorError(
                f"the shapes of the stacked layers fit no scan axis; the first that does not fit "
                f"param_scan_axis=1 is {problem}"
            )
        axis = next(iter(fits)) if configured is None else configured
        if axis not in fits:
            raise ConfigError(
                f"param_scan_axis is {configured} in the config, but the shapes of the checkpoint "
                f"have the layer axis at {' or '.join(map(str, fits))}; give the config of this run"
            )
        if configured is None and len(fits) > 1:
            raise ConfigError(
                f"the shapes fit a layer axis at {' and '.join(map(str, fits))} alike; give it "
                "with --set param_scan_axis=1 (MaxText's default), in --config, or in the run's "
                "moeconv_run.json"
            )
        return axis, fits[axis]

    def _lengths(
        self, axis: int, width: int, slots: Sequence[Sequence["_Slot"]]
    ) -> tuple["_Lengths", str | None]:
        """The lengths of all stacks if layers are stacked on an axis, and what does not fit."""
        sizes: dict[Any, int] = {"D": width}
        for number, slot in ((n, slot) for n, segment in enumerate(slots) for slot in segment):
            if not slot.module.stacked:
                continue
            stacks = {STACKED: (STACKED, number, None), NESTED: (NESTED, number, slot.position)}
            for path, place in slot.places.items():
                shape = self._shapes[path]
                parameter = self._parameter(place.name, slot.kind)
                axes, *others = self._ways(slot.module, path, parameter, axis)
                if others:
                    continue  # the sizes of the others show which it is
                fits = len(axes) == len(shape) and all(
                    sizes.setdefault(stacks.get(name, name), n) == n
                    for name, n in zip(axes, shape, strict=True)
                )
                if not fits:
                    return {}, f"{'.'.join(path)} {list(shape)}"
        return sizes, None

    @staticmethod
    def _refuse_too_many_experts(arrays: Sequence[StoredParameter], layers: int) -> None:
        """Each expert of each layer becomes tensors, so their number is bounded too."""
        stored = [array for array in arrays if "E" in array.axes]
        experts = max((array.shape[array.axes.index("E")] for array in stored), default=0)
        if experts * layers > MOST_EXPERTS:
            raise TensorError(
                f"the shapes of the checkpoint have {experts} experts in each of {layers} "
                f"layers; no model has more than {MOST_EXPERTS} in all"
            )


def _refuse_gaps(groups: Mapping[int, object], lacks: str, prefix: str) -> None:
    """Refuses numbers that are not 0, 1, 2, … without one left out, or too many."""
    wanted = max(groups) + 1
    if wanted > len(groups):
        absent = (f"{prefix}{n}" for n in range(wanted) if n not in groups)
        raise TensorError(lacks + listing(absent, wanted - len(groups)))
    if len(groups) > MOST_LAYERS:
        raise TensorError(
            f"the checkpoint has {len(groups)} layers; no model has more than {MOST_LAYERS}"
        )
