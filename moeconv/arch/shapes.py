"""What shapes show of a model, and whether the config agrees with them."""

from collections.abc import Mapping
from typing import Any

from moeconv.arch.blocks import Block
from moeconv.arch.config_sources import ResolvedConfig
from moeconv.arch.description import Origin, Provenance
from moeconv.arch.fields import SHAPE_KEYS
from moeconv.arch.layout import Layout, StoredParameter
from moeconv.arch.parameters import AXES, fields_of, is_blocked, length_of
from moeconv.arch.stacks import NESTED, STACKED
from moeconv.arch.yaml_file import short
from moeconv.errors import ConfigError, TensorError


def from_shapes(layout: Layout) -> tuple[dict[str, Any], dict[str, Provenance]]:
    """The fields that a checkpoint's structure gives, with the array that gives each.

    Raises:
        TensorError: Two arrays contradict each other.
    """
    sizes: dict[str, tuple[int, StoredParameter]] = {}
    for array in layout.arrays:
        for axis, size in zip(array.axes, array.shape, strict=True):
            if axis in (STACKED, NESTED):
                continue
            seen = sizes.setdefault(axis, (size, array))
            if seen[0] != size:
                raise TensorError(
                    f"axis {axis} is {seen[0]} in {seen[1].name} {list(seen[1].shape)} but {size} "
                    f"in {array.name} {list(array.shape)}; they cannot be of one model"
                )
    names = {array.parameter.name for array in layout.arrays}
    known, sources = _solved({a: found for a, found in sizes.items() if not is_blocked(a)})
    if "K" not in sizes:  # layers/attention_mla.py `MLA._init_projections`, models/gpt3.py
        known["num_key_value_heads"] = known["num_attention_heads"]
        sources["num_key_value_heads"] = sources["num_attention_heads"]
    if "h" not in sizes:
        known["head_dim"] = sizes["k"][0]
        sources["head_dim"] = sources["qk_nope_head_dim"]
    if known["num_attention_heads"] % known["num_key_value_heads"]:
        raise TensorError(
            f"{known['num_attention_heads']} query heads are no multiple of "
            f"{known['num_key_value_heads']} key/value heads"
        )
    known["layer_kinds"] = layout.kinds
    sources["layer_kinds"] = Provenance(Origin.SHAPE, layout.describe())
    head = layout.block.outer[-1].name
    known["tie_word_embeddings"] = head not in names
    there = "absent" if known["tie_word_embeddings"] else "present"
    sources["tie_word_embeddings"] = Provenance(Origin.SHAPE, f"{head} is {there}")
    return known, sources


def _solved(
    sizes: Mapping[str, tuple[int, StoredParameter]],
) -> tuple[dict[str, Any], dict[str, Provenance]]:
    """The fields that axes are as long as; of several the one that no other axis has given.

    Raises:
        TensorError: No sizes make up these lengths.
    """
    known: dict[str, Any] = {name: None for axis in AXES for name in fields_of(axis)}
    sources: dict[str, Provenance] = {}
    pending = list(sizes)
    while pending:
        axis = min(pending, key=lambda a: sum(known[name] is None for name in fields_of(a)))
        pending.remove(axis)
        size, array = sizes[axis]
        names = fields_of(axis)
        unknown = [name for name in names if known[name] is None]
        rest = size - length_of(axis, known)
        # How much longer the axis is for each one more of what is unknown.
        step = length_of(axis, known | dict.fromkeys(unknown, 1)) - length_of(axis, known)
        where = Provenance(Origin.SHAPE, f"{array.name} {list(array.shape)}")
        if len(unknown) == 1 and step and rest % step == 0 and (rest > 0 or len(names) == 1):
            known[unknown[0]], sources[unknown[0]] = rest // step, where
        elif unknown or rest:
            given = ", ".join(f"{n} is {known[n]} ({sources[n]})" for n in names if known[n])
            raise TensorError(
                f"{where.detail} has {size} for {AXES[axis]}, but {given}; they cannot be of one "
                "model"
            )
    return known, sources


def check_against_shapes(
    layout: Layout,
    resolved: ResolvedConfig,
    known: dict[str, Any],
    sources: dict[str, Provenance],
    block: Block | None,
    scan_layers: bool | None,
) -> None:
    """Compares what the config says of sizes, layers and head with the checkpoint.

    Args:
        layout: The checkpoint's structure.
        resolved: Its config.
        known: The fields that `from_shapes` has given.
        sources: The source of each.
        block: The decoder block; None where no config names it.
        scan_layers: `custom_metadata.scan_layers` of the checkpoint, if it has any.

    Raises:
        TensorError: The checkpoint contradicts its own metadata.
        ConfigError: The config contradicts the checkpoint.
    """
    facts = {
        **known,
        "num_hidden_layers": len(layout.kinds),
        "scan_layers": layout.stacking.scanned,
    }
    if scan_layers is not None and scan_layers != facts["scan_layers"]:
        raise TensorError(
            f"_CHECKPOINT_METADATA says scan_layers={str(scan_layers).lower()}, but the parameters "
            f"are {layout.describe()}"
        )
    keys = dict(SHAPE_KEYS)
    if not any("h" in array.axes for array in layout.arrays):  # MaxText's MLA does not use it
        del keys["head_dim"]
    for key, value in block.shapes.items() if block else ():
        facts[key], keys[key] = value(known), (key,)
    if block and block.expert_width == "mlp_dim" and known["num_experts"]:
        keys["moe_intermediate_size"] = keys["intermediate_size"]
    for key, attention in block.shown.items() if block else ():
        facts[key], keys[key] = {kind.attention for kind in layout.kinds} == {attention}, (key,)
    for name, aliases in keys.items():
        fact = facts[name]
        for key in aliases if fact is not None else ():
            entry = resolved.get(key)
            if entry is None or not entry.explicit or _is_unset(entry.value):
                continue
            value = _scaled(key, entry.value, resolved) if key.startswith("base_") else entry.value
            if name == "num_hidden_layers":
                value = _built_layers(layout, value, resolved)
            if value == 0 and key in _AS_ELSEWHERE:
                value = known[_AS_ELSEWHERE[key]]
            if value != fact:
                where = sources.get(name)
                raise ConfigError(
                    f"{key}={short(entry.value)} ({entry.provenance}) contradicts the checkpoint, "
                    f"where {name} is {str(fact).lower()}"
                    + (f" ({where})" if where else "")
                    + "; give the config of this run"
                )


# Where MaxText's 0 is the size that other layers have (models/gemma4.py `Gemma4DecoderLayer`).
_AS_ELSEWHERE = {"global_head_dim": "head_dim", "global_num_kv_heads": "num_key_value_heads"}


def _is_unset(value: Any) -> bool:
    """MaxText's -1 for a width that another key gives, also once it is scaled."""
    return is_whole(value) and value < 0


def _built_layers(layout: Layout, layers: Any, resolved: ResolvedConfig) -> Any:
    """Layers MaxText builds of those configured: a scanned model drops a cut-off last block.

    A module that holds two layers is one to MaxText. Source: MaxText layers/nnx_decoders.py
    `_init_scanned_generic`. Where there is another segment, it has the layers that do not fill a
    block (`_init_scanned_qwen3_next`).
    """
    cycle, stacking = _count(resolved, "inhomogeneous_layer_cycle_interval"), layout.stacking
    if not is_whole(layers):
        return layers
    if stacking.scanned and len(stacking.segments) == 1:
        numbered = stacking.segments[0].modules[0].numbered
        layers = int(layers // cycle) * (cycle if numbered else 1)
    return layers * stacking.paired


def dropped_layers(layout: Layout, resolved: ResolvedConfig) -> list[str]:
    """Layers that were configured and never built, which MaxText does not say."""
    for key in SHAPE_KEYS["num_hidden_layers"]:
        entry = resolved.get(key)
        if entry is None or not entry.explicit or _is_unset(entry.value):
            continue
        layers = _scaled(key, entry.value, resolved) if key.startswith("base_") else entry.value
        if is_whole(layers) and _built_layers(layout, layers, resolved) < layers:
            return [
                f"{key}={short(entry.value)} ({entry.provenance}), but MaxText built "
                f"{len(layout.kinds)} layers: it drops those that do not fill a block of "
                f"inhomogeneous_layer_cycle_interval={layout.cycle}"
            ]
    return []


def _scaled(key: str, value: Any, resolved: ResolvedConfig) -> Any:
    """Widens a base size by `global_parameter_scale`, a power of two.

    Source: MaxText configs/types.py `get_individual_scales`.
    """
    scale = _count(resolved, "global_parameter_scale")
    if scale == 1 or not is_whole(value):
        return value
    exponent = scale.bit_length() - 1
    emb, heads, layers = ((exponent + n) // 3 for n in (1, 2, 0))
    factor = {
        "base_emb_dim": emb,
        "base_num_query_heads": heads,
        "base_num_kv_heads": heads,
        "base_mlp_dim": heads,
        "base_moe_mlp_dim": heads,
        "base_num_decoder_layers": layers,
    }[key]
    return int(value) * 2**factor


def is_whole(value: Any) -> bool:
    """Returns True if a config value is a whole number, be it written as 4 or as 4.0."""
    return not isinstance(value, bool) and isinstance(value, int | float) and value % 1 == 0


def _count(resolved: ResolvedConfig, key: str) -> int:
    """A key that counts something, 1 where it is not given."""
    value = resolved.value(key, 1) or 1
    if not is_whole(value) or value < 1:
        raise ConfigError(
            f"{key}={short(value)} ({resolved[key].provenance}) should be a whole number ≥ 1"
        )
    return int(value)
