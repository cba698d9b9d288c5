"""How a checkpoint stores its layers: the three layouts MaxText writes, detected from structure.

    unscanned  decoder.layers_{n}.NAME         one array a layer (scan_layers=false)
    scanned    decoder.layers.NAME             all layers in one array (scan_layers=true)
    cycled     decoder.layers.layers_{j}.NAME  every C-th layer in one array: index i holds layer
                                               C*i + j (scanned envy; C is
                                               inhomogeneous_layer_cycle_interval)

In the stacked layouts the layer axis stands at `param_scan_axis` (MaxText's default 1) of every
parameter (layers/nnx_decoders.py `_create_scanned_layers`, `_init_scanned_generic`,
`_init_sequential_generic`; models/envy.py `EnvyScannableBlock`).
"""

import re
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import islice

from moeconv.arch.parameters import (
    EMBEDDING,
    FINAL_NORM,
    PARAMETERS,
    LayerKind,
    Parameter,
    axis_name,
)
from moeconv.errors import ConfigError, TensorError

KeyPath = tuple[str, ...]

# One way to write each number, so that no two names mean the same layer.
_NUMBERED = re.compile(r"layers_(0|[1-9][0-9]{0,8})\Z")
# Ten times the deepest models, and five times the most experts in all their layers: what a file
# says is bounded before it is counted through.
MOST_LAYERS = 2**11
MOST_EXPERTS = 2**17
_LISTED = 20  # names in a message


class Stacking(StrEnum):
    """The layout's name."""

    UNSCANNED = "unscanned"
    SCANNED = "scanned"
    CYCLED = "cycled"


@dataclass(frozen=True)
class StoredParameter:
    """One array of the checkpoint and what it holds.

    Attributes:
        path: Key path below `params.params`, e.g. `("decoder", "layers", "mlp", "wo", "kernel")`.
        parameter: The logical parameter.
        axes: Names of the array's axes, `"L"` among them when layers are stacked.
        shape: The array's shape, in the same order.
        layers: Layers it holds, in the order of its `L` axis; one layer when unscanned; empty for
            a global parameter.
    """

    path: KeyPath
    parameter: Parameter
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        """Dotted key path."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Layout:
    """What the structure of a checkpoint says about its layers.

    Attributes:
        stacking: Which of the three layouts.
        scan_axis: Position of the layer axis, None when unscanned.
        cycle: Layers in one scanned block (1 but for `CYCLED`).
        kinds: The kind of every layer, first to last.
        arrays: Every array, in key-path order.
    """

    stacking: Stacking
    scan_axis: int | None
    cycle: int
    kinds: tuple[LayerKind, ...]
    arrays: tuple[StoredParameter, ...]

    @cached_property
    def places(self) -> Mapping[tuple[str, int | None], tuple[StoredParameter, int | None]]:
        """The array that holds a parameter of a layer (None: of the model), and its entry there.

        The entry is that of the array's `L` axis, None where it has none.
        """
        found: dict[tuple[str, int | None], tuple[StoredParameter, int | None]] = {}
        for array in self.arrays:
            for entry, layer in enumerate(array.layers):
                found[array.parameter.name, layer] = (array, entry if "L" in array.axes else None)
            if not array.layers:
                found[array.parameter.name, None] = (array, None)
        return found

    def describe(self) -> str:
        """One line for people."""
        if self.stacking is Stacking.UNSCANNED:
            return "unscanned (one array a layer)"
        text = f"scanned (layers stacked on axis {self.scan_axis})"
        if self.stacking is Stacking.CYCLED:
            text += f", interleaved in blocks of {self.cycle}"
        return text


@dataclass(frozen=True)
class _Place:
    """Where a key path says its parameter lives: block position j of a stack, or layer n."""

    logical: str
    layer: int | None = None
    slot: int | None = None

    @property
    def stacked(self) -> bool:
        return self.slot is not None


def _place(path: KeyPath) -> _Place:
    if path[0] == "decoder" and len(path) > 2:
        if match := _NUMBERED.match(path[1]):
            return _Place(".".join(path[2:]), layer=int(match[1]))
        if path[1] == "layers":
            if (match := _NUMBERED.match(path[2])) and len(path) > 3:
                return _Place(".".join(path[3:]), slot=int(match[1]))
            return _Place(".".join(path[2:]), slot=0)
    return _Place(".".join(path))


def detect_layout(
    shapes: Mapping[KeyPath, tuple[int, ...]], *, scan_axis: int | None = None
) -> Layout:
    """Finds out how the arrays of a checkpoint are laid out.

    Args:
        shapes: Shape of every array below `params.params`, by key path.
        scan_axis: `param_scan_axis` when the run's config tells it; only needed when hidden size
            and stacked layers are equal in number, so that shapes cannot tell.

    Raises:
        TensorError: An array that no supported block has (all are listed), a missing layer, a
            missing parameter, or a number of axes that does not fit.
        ConfigError: The scan axis is ambiguous, or the one told contradicts the shapes.
    """
    places = {path: _place(path) for path in sorted(shapes)}
    _refuse_unknown(places)
    for needed in (EMBEDDING, FINAL_NORM):
        if needed.name not in {place.logical for place in places.values()}:
            raise TensorError(f"the checkpoint lacks {needed.name}")
    stacked = [p for p, place in places.items() if place.stacked]
    numbered = [p for p, place in places.items() if place.layer is not None]
    if not stacked and not numbered:
        raise TensorError("the checkpoint holds no decoder layers below params.params.decoder")
    if stacked and numbered:
        raise TensorError(
            "the checkpoint mixes scanned and unscanned layers "
            f"({'.'.join(stacked[0])} and {'.'.join(numbered[0])}); no MaxText run writes that"
        )
    if numbered:
        layout = _unscanned(shapes, places)
    else:
        layout = _scanned(shapes, places, scan_axis)
    _refuse_too_many_experts(layout)
    return layout


def _refuse_too_many_experts(layout: Layout) -> None:
    """Each expert of each layer becomes tensors, so their number is bounded too."""
    stored = [array for array in layout.arrays if "E" in array.axes]
    experts = max((array.shape[array.axes.index("E")] for array in stored), default=0)
    if experts * len(layout.kinds) > MOST_EXPERTS:
        raise TensorError(
            f"the shapes of the checkpoint have {experts} experts in each of {len(layout.kinds)} "
            f"layers; no model has more than {MOST_EXPERTS} in all"
        )


def _refuse_unknown(places: Mapping[KeyPath, _Place]) -> None:
    unknown = []
    for path, place in places.items():
        parameter = PARAMETERS.get(place.logical)
        layered = place.layer is not None or place.stacked
        if parameter is None or (parameter.layers is None) == layered:
            unknown.append(".".join(path))
    if unknown:
        raise TensorError(
            "the checkpoint holds parameters that no supported decoder block has, so converting "
            f"it would drop them:{listing(unknown)}"
        )


def listing(names: Iterable[str], count: int | None = None) -> str:
    """An indented list of tensor names, cut after the first.

    Args:
        names: The names; no more of them are made than are listed.
        count: How many there are, where that is not `len(names)`.
    """
    first = list(islice(names, _LISTED))
    count = len(names) if count is None and isinstance(names, Sized) else count or len(first)
    more = [f"… and {count - _LISTED} more"] if count > _LISTED else []
    return "".join(f"\n  {name}" for name in [*first, *more])


def _kind(logical: set[str], where: str) -> LayerKind:
    moe = any(PARAMETERS[n].layers == frozenset({LayerKind.MOE}) for n in logical)
    kind = LayerKind.MOE if moe else LayerKind.DENSE
    expected = {n for n, p in PARAMETERS.items() if p.layers is not None and kind in p.layers}
    wrong = [f"missing {n}" for n in sorted(expected - logical)]
    wrong += [f"unexpected {n}" for n in sorted(logical - expected)]
    if wrong:
        raise TensorError(f"{where} is not a whole {kind} layer:{listing(wrong)}")
    return kind


def _stored(
    path: KeyPath, shape: tuple[int, ...], axes: tuple[str, ...], layers: tuple[int, ...]
) -> StoredParameter:
    if len(shape) != len(axes):
        raise TensorError(
            f"{'.'.join(path)} has shape {list(shape)}, but {len(axes)} axes [{' '.join(axes)}] "
            "were expected; it is not a parameter of a supported decoder block"
        )
    return StoredParameter(path, PARAMETERS[_place(path).logical], axes, shape, layers)


def _global(
    shapes: Mapping[KeyPath, tuple[int, ...]], places: Mapping[KeyPath, _Place]
) -> list[StoredParameter]:
    return [
        _stored(path, shapes[path], PARAMETERS[place.logical].axes, ())
        for path, place in places.items()
        if place.layer is None and not place.stacked
    ]


def _by(places: Mapping[KeyPath, _Place], attribute: str) -> dict[int, set[str]]:
    groups: dict[int, set[str]] = {}
    for place in places.values():
        number = getattr(place, attribute)
        if number is not None:
            groups.setdefault(number, set()).add(place.logical)
    return groups


def _refuse_gaps(groups: Mapping[int, set[str]], lacks: str, prefix: str) -> None:
    """Refuses numbers that are not 0, 1, 2, … without one left out, or too many."""
    wanted = max(groups) + 1
    if wanted > len(groups):
        absent = (f"{prefix}{n}" for n in range(wanted) if n not in groups)
        raise TensorError(lacks + listing(absent, wanted - len(groups)))
    if len(groups) > MOST_LAYERS:
        raise TensorError(
            f"the checkpoint has {len(groups)} layers; no model has more than {MOST_LAYERS}"
        )


def _unscanned(
    shapes: Mapping[KeyPath, tuple[int, ...]], places: Mapping[KeyPath, _Place]
) -> Layout:
    groups = _by(places, "layer")
    _refuse_gaps(groups, "the checkpoint lacks layers:", "layers_")
    kinds = tuple(_kind(groups[n], f"decoder.layers_{n}") for n in sorted(groups))
    arrays = _global(shapes, places)
    arrays += [
        _stored(path, shapes[path], PARAMETERS[place.logical].axes, (place.layer,))
        for path, place in places.items()
        if place.layer is not None
    ]
    ordered = tuple(sorted(arrays, key=lambda a: a.path))
    return Layout(Stacking.UNSCANNED, None, 1, kinds, ordered)


def _scanned(
    shapes: Mapping[KeyPath, tuple[int, ...]],
    places: Mapping[KeyPath, _Place],
    told_axis: int | None,
) -> Layout:
    slots = _by(places, "slot")
    _refuse_gaps(slots, "the checkpoint lacks layers of its scanned block:", "layers.layers_")
    cycle = len(slots)
    cycled = any(_NUMBERED.match(path[2]) for path, p in places.items() if p.stacked)
    kinds = [
        _kind(slots[j], f"decoder.layers.layers_{j}" if cycled else "decoder.layers")
        for j in range(cycle)
    ]
    axis, depth = _scan_axis(shapes, places, told_axis)
    if cycle * depth > MOST_LAYERS:
        raise TensorError(
            f"the shapes of the checkpoint have {cycle * depth} layers; no model has more than "
            f"{MOST_LAYERS}"
        )
    arrays = _global(shapes, places)
    for path, place in places.items():
        if place.slot is None:
            continue
        axes = _stacked_axes(PARAMETERS[place.logical], axis)
        layers = tuple(cycle * i + place.slot for i in range(depth))
        arrays.append(_stored(path, shapes[path], axes, layers))
    ordered = tuple(sorted(arrays, key=lambda a: a.path))
    stacking = Stacking.CYCLED if cycled else Stacking.SCANNED
    return Layout(stacking, axis, cycle, tuple(kinds) * depth, ordered)


def _stacked_axes(parameter: Parameter, scan_axis: int) -> tuple[str, ...]:
    """Axes of a stacked parameter: those with too few axes for `scan_axis` are stacked first.

    Source: MaxText layers/nnx_scan.py, which moves the layer axis only where the rank allows it.
    """
    plain = parameter.axes
    at = scan_axis if len(plain) + 1 > scan_axis else 0
    return (*plain[:at], "L", *plain[at:])


def _scan_axis(
    shapes: Mapping[KeyPath, tuple[int, ...]],
    places: Mapping[KeyPath, _Place],
    told: int | None,
) -> tuple[int, int]:
    """The layer axis and the number of stacked layers: the one way that fits every shape."""
    final = next(p for p, pl in places.items() if pl.logical == FINAL_NORM.name)
    if len(shapes[final]) != 1:
        raise TensorError(f"{FINAL_NORM.name} has shape {list(shapes[final])}, not one axis")
    stacked = [(p, pl.logical) for p, pl in places.items() if pl.stacked]
    fits: dict[int, int] = {}
    problem = ""
    for axis in (1, 0, 2, 3):
        sizes = {"D": shapes[final][0]}
        for path, logical in stacked:
            axes = _stacked_axes(PARAMETERS[logical], axis)
            wrong = len(axes) != len(shapes[path]) or any(
                sizes.setdefault(axis_name(PARAMETERS[logical], a), n) != n
                for a, n in zip(axes, shapes[path], strict=True)
            )
            if wrong:
                problem = problem or f"{'.'.join(path)} {list(shapes[path])}"
                break
        else:
            fits[axis] = sizes["L"]
    if not fits:
        raise TensorError(
            f"the shapes of the stacked layers fit no scan axis; the first that does not fit "
            f"param_scan_axis=1 is {problem}"
        )
    axis = next(iter(fits)) if told is None else told
    if axis not in fits:
        raise ConfigError(
            f"param_scan_axis is {told} in the config, but the shapes of the checkpoint have the "
            f"layer axis at {' or '.join(map(str, fits))}; give the config of this run"
        )
    if told is None and len(fits) > 1:
        raise ConfigError(
            f"the shapes fit a layer axis at {' and '.join(map(str, fits))} alike; give it with "
            "--set param_scan_axis=1 (MaxText's default), in --config, or in the run's moeconv.json"
        )
    return axis, fits[axis]
