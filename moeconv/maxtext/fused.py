"""Parameters that MaxText keeps in one array for speed, taken apart again.

    prefuse_moe_weights  `wi` [E, D, 2M]: wi_0, then wi_1 (layers/moe.py `RoutedMoE`)
    fused_mlp            `wi.kernel` [D, 2, F]: one after the other (layers/linears.py `MlpBlock`)
    fused_qkv            `qkv_proj.kernel` [D, H + 2K, h]: queries, keys, values
                         (layers/attentions.py `qkv_projection`)

The biases of the last two are fused like their kernels, without D (layers/linears.py
`DenseGeneral`); those of experts are not. All have a layer axis at `param_scan_axis` where layers
are stacked. The order of heads in `qkv_proj` is another where heads were cut over devices: each
device has its own queries, keys and values, one behind the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moeconv.arch.config_file import ConfigFile
from moeconv.arch.config_sources import flag_texts
from moeconv.arch.stacks import NESTED, STACKED, stacked_axes
from moeconv.errors import ConfigError, UnsupportedError
from moeconv.orbax.arrays import Arrays, Window

# What is fused: the setting, the array and its axes in one layer, and one that shows its sizes.
_MOE, _MLP, _QKV = "prefuse_moe_weights", "fused_mlp", "fused_qkv"
_Side = tuple[tuple[str, ...], tuple[str, ...]]
_FUSED: tuple[tuple[str, _Side, _Side], ...] = (
    (_MOE, (("wi",), ("E", "D", "two M")), (("wo",), ("E", "M", "D"))),
    (_MLP, (("wi", "kernel"), ("D", "two", "F")), (("wo", "kernel"), ("F", "D"))),
    (_MLP, (("wi", "bias"), ("two", "F")), (("wo", "kernel"), ("F", "D"))),
    (_QKV, (("qkv_proj", "kernel"), ("D", "heads", "h")), (("out", "kernel"), ("H", "h", "D"))),
    (_QKV, (("qkv_proj", "bias"), ("heads", "h")), (("out", "kernel"), ("H", "h", "D"))),
)
# MaxText's default first; shapes leave it open only where the rest of the model does, too.
_SCAN_AXES = (1, 0, 2, 3)
# Mesh axes that cut heads (configs/base.yml, `logical_axis_rules` of heads).
_CUT = ("tensor", "tensor_transpose", "tensor_sequence", "autoregressive")


def take_apart(arrays: Arrays) -> frozenset[str]:
    """Replaces fused arrays by the parameters in them, as parts of what is stored.

    Args:
        arrays: Of a checkpoint; changed.

    Returns:
        The settings by which they were fused; of those whose shapes are no such array's, none.
    """
    found = set()
    for info in list(arrays.info.values()):
        for setting, (fused, axes), (beside, others) in _FUSED:
            if info.path[-len(fused) :] != fused:
                continue
            above = info.path[: -len(fused)]
            other = arrays.info.get(".".join((*above, *beside)))
            sizes = _sizes(info.shape, other.shape, axes, others) if other else None
            windows = dict(_windows(setting, fused[-1], *sizes)) if sizes else {}
            parts = {(*above, *path): window for path, window in windows.items()}
            if parts and not any(".".join(path) in arrays.info for path in parts):
                arrays.split(info.name, parts)
                found.add(setting)
    return frozenset(found)


def demand_order(
    fused: frozenset[str], config: Mapping[str, Any] | None, sets: Sequence[str] = ()
) -> None:
    """Refuses fused queries, keys and values whose heads may have been cut over devices.

    Args:
        fused: From `take_apart`.
        config: The run's; settings that a whole one does not have are at MaxText's default, 1.
        sets: `key=value` flags over it.

    Raises:
        UnsupportedError: They were.
        ConfigError: Nothing says whether they were.
    """
    if "fused_qkv" not in fused:
        return
    given = {**(config or {}), **flag_texts(sets)}
    keys = [f"{where}_{axis}_parallelism" for where in ("ici", "dcn") for axis in _CUT]
    for key in keys:
        if str(value := given.get(key, 1)) != "1":
            raise UnsupportedError(
                f"fused_qkv with {key}={value}: each device kept its own queries, keys and values "
                "in qkv_proj, in an order that the checkpoint does not show; load it with this "
                "mesh in MaxText, and save it with fused_qkv=false"
            )
    whole = config.whole if isinstance(config, ConfigFile) else config is not None
    if not whole and not given.keys() & set(keys):
        raise ConfigError(
            "fused_qkv: the order of heads in qkv_proj follows from the mesh, which no config "
            "gives; give the run's config with --config, or --set ici_tensor_parallelism=1 if no "
            "heads were cut over devices"
        )


def _windows(
    setting: str, leaf: str, named: tuple[str, ...], alone: tuple[str, ...], size: Mapping[str, int]
) -> Iterator[tuple[tuple[str, ...], Window]]:
    """The parameters of a fused array, and where they are in it.

    Args:
        setting: By which it was fused.
        leaf: `kernel` or `bias`; experts have neither.
        named: The axes of the array.
        alone: Those of one of its parameters.
        size: The size of each axis.
    """
    if setting == _MOE:
        at, width = named.index("two M"), size["M"]
        yield ("wi_0",), Window(at, 0, width)
        yield ("wi_1",), Window(at, width, 2 * width)
    elif setting == _MLP:
        at = named.index("two")
        left = [axis for axis in named if axis != "two"]
        order = tuple(left.index(axis) for axis in alone)
        yield ("wi_0", leaf), Window(at, 0, 1, drop=True, order=order)
        yield ("wi_1", leaf), Window(at, 1, 2, drop=True, order=order)
    else:
        at, heads = named.index("heads"), size["H"]
        keys, odd = divmod(size["heads"] - heads, 2)
        if keys > 0 and not odd and heads % keys == 0:
            yield ("query", leaf), Window(at, 0, heads)
            yield ("key", leaf), Window(at, heads, heads + keys)
            yield ("value", leaf), Window(at, heads + keys, heads + 2 * keys)


def _sizes(
    shape: Sequence[int],
    other: Sequence[int],
    axes: tuple[str, ...],
    beside: tuple[str, ...],
) -> tuple[tuple[str, ...], tuple[str, ...], Mapping[str, int]] | None:
    """By the first scan axis by which both shapes agree: the axes, those of a gate alone, sizes."""
    gate = tuple(axis for axis in axes if axis != "two")
    stacks = (NESTED, STACKED)[-(len(shape) - len(axes)) :] if len(shape) > len(axes) else ()
    for at in _SCAN_AXES if stacks else (0,):
        one, two, alone = axes, beside, gate
        for stack in stacks:  # the inner is made before the outer
            one, two, alone = (stacked_axes(each, at, stack) for each in (one, two, alone))
        pairs = [*zip(one, shape, strict=False), *zip(two, other, strict=False)]
        found: dict[str, int] = {}
        fits = (len(one), len(two)) == (len(shape), len(other)) and all(
            found.setdefault(axis, n) == n for axis, n in pairs
        )
        twice = found.get("two", 2) == 2 and found.get("two M", 0) == 2 * found.get("M", 0)
        if fits and twice:
            return one, alone, found
    return None
