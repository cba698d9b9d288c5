"""From shapes and config to the description of a model, or to what is still missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeconv.arch.blocks import Block, settings_of
from moeconv.arch.config_sources import CHANGED, TOKEN_IDS, ResolvedConfig, maxtext_defaults
from moeconv.arch.description import ModelDescription, Origin, Provenance
from moeconv.arch.fields import FIELDS, SHAPE_KEYS, YARN, ConfigField
from moeconv.arch.keys import verdicts
from moeconv.arch.layout import Layout, StoredParameter
from moeconv.arch.parameters import AXES, fields_of
from moeconv.arch.stacks import CYCLED, NESTED, STACKED
from moeconv.arch.yaml_file import short
from moeconv.errors import ConfigError, TensorError, UnsupportedError


@dataclass(frozen=True)
class Resolution:
    """What is known of a model, and what is not.

    Attributes:
        known: Values of description fields.
        sources: The source of each of them.
        missing: Config keys that neither shapes nor config give.
        refusals: ConfigEntry semantics that no target can hold, one sentence each.
        warnings: Things to know, one sentence each.
    """

    known: Mapping[str, Any]
    sources: Mapping[str, Provenance]
    missing: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    def model(self) -> ModelDescription:
        """The description.

        Raises:
            ConfigError: Something is still missing; names every key and how to give it.
            UnsupportedError: The model computes something that cannot be converted.
        """
        if self.refusals:
            raise UnsupportedError(
                "this model cannot be converted exactly: " + "; ".join(self.refusals)
            )
        if self.missing:
            raise ConfigError(missing_message(self.missing))
        return ModelDescription(**self.known, sources=self.sources)


def missing_message(missing: Sequence[str]) -> str:
    """Names the keys, MaxText's default for each, and the three ways to give them."""
    base = maxtext_defaults()["base"]
    own = {"decoder_block", *(f.key for f in (*FIELDS, *YARN))}
    defaults = {key: f"MaxText's default: {base[key]}" for key in missing if key in base}
    for key in defaults.keys() & CHANGED:
        value, until = CHANGED[key]
        defaults[key] += f", but {value} until {until}, and nothing dates this checkpoint"
    lines = [
        f"\n  {key}" + (f"  ({defaults[key]})" if key in defaults else "")
        for key in missing
        if key in own
    ]
    rest = [key for key in missing if key not in own]
    if rest:
        lines.append(
            f"\nand whether {len(rest)} other settings that can change the model have MaxText's "
            "defaults (--set model_name=default says that all that are not given have)"
        )
    return (
        "the checkpoint's shapes do not show these fields, and no config gives them:"
        + "".join(lines)
        + "\nGive the run's MaxText YAML with --config FILE (keys it leaves out take MaxText's "
        "defaults), each field with --set KEY=VALUE, or put the run's moeconv_run.json (its "
        "resolved config) beside the checkpoint."
    )


def resolve(
    layout: Layout, resolved: ResolvedConfig, *, scan_layers: bool | None = None, dated: bool = True
) -> Resolution:
    """Puts together what shapes and config say.

    Args:
        layout: The checkpoint's structure.
        resolved: Config file or sidecar, and flags.
        scan_layers: `custom_metadata.scan_layers` of the checkpoint, if it has any.
        dated: True if the save is younger than the changes in `CHANGED`; else such a default could
            be either, and is missing.

    Raises:
        TensorError: Shapes contradict each other.
        ConfigError: The config contradicts the shapes, or has no sensible value.
    """
    known, sources = _from_shapes(layout)
    missing: list[str] = []
    block = _block(layout, resolved, known, sources, missing)
    _check_against_shapes(layout, resolved, known, sources, block, scan_layers)
    for spec in FIELDS:
        if spec.needed(known):
            _read(spec, resolved, known, sources, missing, dated=dated)
        else:
            known[spec.name] = spec.otherwise
    settings: dict[str, Any] = {}
    for spec in settings_of(block, known):
        _read(spec, resolved, settings, sources, missing, dated=dated)
    experts, chosen = known.get("num_experts"), known.get("num_experts_per_tok")
    if experts and chosen and chosen > experts:
        raise ConfigError(
            f"num_experts_per_tok={chosen} ({sources['num_experts_per_tok']}) is more than the "
            f"{experts} experts of the checkpoint"
        )
    _token_ids(resolved, known, sources)
    if block and block.layer_types and not missing:
        cycle = layout.cycle if layout.stacking.scanned else len(layout.kinds)
        settings["layer_types"] = tuple(
            block.layer_types(number % cycle, settings) for number in range(len(layout.kinds))
        )
        detail = f"by position, {layout.describe()}"
        sources["layer_types"] = Provenance(Origin.BLOCK, detail)
    known["settings"] = settings
    plain = {key: entry.value for key, entry in resolved.items()}
    tied = known["tie_word_embeddings"]
    refusals, warnings, open_keys = verdicts(block, plain, tied=tied) if block else ([], [], [])
    refusals += _rope(block, known, settings, sources)
    # One that base.yml does not have is its own default wherever there is a config.
    open_keys = [key for key in open_keys if key in maxtext_defaults()["base"]]
    warnings += _dropped(layout, resolved)
    if resolved.ignored:
        warnings.append(
            f"--set: {short(', '.join(resolved.ignored), 500)}: decide nothing of a conversion, "
            "and are ignored"
        )
    if resolved.accepted:
        warnings.append(
            f"--accept-key: whether {', '.join(resolved.accepted)} changes the model is not known "
            "to moeconv; it is taken not to"
        )
    return Resolution(known, sources, tuple(missing + open_keys), tuple(refusals), tuple(warnings))


def _read(
    spec: ConfigField,
    resolved: ResolvedConfig,
    known: dict[str, Any],
    sources: dict[str, Provenance],
    missing: list[str],
    *,
    dated: bool,
) -> None:
    """Reads one field or setting into `known`, or puts its key among the missing ones."""
    value = resolved.get(spec.key)
    if spec.name == "rope_type" and str(resolved.value("model_name", "")).startswith("llama3.1"):
        value = resolved["model_name"]
    either = value is not None and value.is_default and not dated and spec.key in CHANGED
    if value is None or (value.value is None and not spec.nullable) or either:
        missing.append(spec.key)
        return
    try:
        known[spec.name] = spec.parse(value.value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(
            f"{spec.key}={short(value.value)} ({value.provenance}) should be {spec.expects}"
        ) from None
    sources[spec.name] = value.provenance


def _rope(
    block: Block | None,
    known: Mapping[str, Any],
    settings: Mapping[str, Any],
    sources: Mapping[str, Provenance],
) -> list[str]:
    """What of a model's RoPE cannot be converted."""
    if block is None or (kind := known.get("rope_type")) is None:
        return []
    if kind not in block.ropes:
        return [f"rope_type={kind} ({sources['rope_type']}) is not known of this decoder block"]
    length, positions = known.get("max_position_embeddings"), settings.get("rope_positions")
    if length and positions and length > positions:
        return [
            f"max_target_length={length} is more than max_position_embeddings={positions}, behind "
            "which MaxText rotates every position as the last one"
        ]
    return []


def _from_shapes(layout: Layout) -> tuple[dict[str, Any], dict[str, Provenance]]:
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
    known, sources = _solved(sizes)
    if "K" not in sizes:  # MLA has as many (layers/attention_mla.py `MLA._init_projections`)
        known["num_key_value_heads"] = known["num_attention_heads"]
        sources["num_key_value_heads"] = sources["num_attention_heads"]
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
    """The fields that axes are as long as; of a sum the one that no other axis has given.

    Raises:
        TensorError: No sizes make up these sums.
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
        rest = size - sum(known[name] or 0 for name in names)
        where = Provenance(Origin.SHAPE, f"{array.name} {list(array.shape)}")
        if len(unknown) == 1 and (rest > 0 or len(names) == 1):
            known[unknown[0]], sources[unknown[0]] = rest, where
        elif unknown or rest:
            given = ", ".join(f"{n} is {known[n]} ({sources[n]})" for n in names if known[n])
            raise TensorError(
                f"{where.detail} has {size} for {AXES[axis]}, but {given}; they cannot be of one "
                "model"
            )
    return known, sources


def _block(
    layout: Layout,
    resolved: ResolvedConfig,
    known: dict[str, Any],
    sources: dict[str, Provenance],
    missing: list[str],
) -> Block | None:
    """The decoder block; None where no config names it: the layout is then of a possible one."""
    entry = resolved.get("decoder_block")
    if entry is None:
        missing.append("decoder_block")
        return None
    known["decoder_block"] = layout.block.name
    sources["decoder_block"] = entry.provenance
    return layout.block


def _check_against_shapes(
    layout: Layout,
    resolved: ResolvedConfig,
    known: dict[str, Any],
    sources: dict[str, Provenance],
    block: Block | None,
    scan_layers: bool | None,
) -> None:
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
            if value != fact:
                where = sources.get(name)
                raise ConfigError(
                    f"{key}={short(entry.value)} ({entry.provenance}) contradicts the checkpoint, "
                    f"where {name} is {str(fact).lower()}"
                    + (f" ({where})" if where else "")
                    + "; give the config of this run"
                )


def _is_unset(value: Any) -> bool:
    """MaxText's -1 for a width that another key gives, also once it is scaled."""
    return _is_whole(value) and value < 0


def _built_layers(layout: Layout, layers: Any, resolved: ResolvedConfig) -> Any:
    """Layers MaxText builds of those configured: a scanned model drops a cut-off last block.

    A module that holds two layers is one to MaxText. Source: MaxText layers/nnx_decoders.py
    `_init_scanned_generic`; a stacking of several segments has code of its own there, which does
    not read the cycle.
    """
    cycle, stacking = _count(resolved, "inhomogeneous_layer_cycle_interval"), layout.stacking
    if not _is_whole(layers):
        return layers
    if stacking.scanned and len(stacking.segments) == 1:
        layers = int(layers // cycle) * (cycle if stacking is CYCLED else 1)
    return layers * stacking.paired


def _dropped(layout: Layout, resolved: ResolvedConfig) -> list[str]:
    """Layers that were configured and never built, which MaxText does not say."""
    for key in SHAPE_KEYS["num_hidden_layers"]:
        entry = resolved.get(key)
        if entry is None or not entry.explicit or _is_unset(entry.value):
            continue
        layers = _scaled(key, entry.value, resolved) if key.startswith("base_") else entry.value
        if _is_whole(layers) and _built_layers(layout, layers, resolved) < layers:
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
    if scale == 1 or not _is_whole(value):
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


def _is_whole(value: Any) -> bool:
    """Returns True if a config value is a whole number, be it written as 4 or as 4.0."""
    return not isinstance(value, bool) and isinstance(value, int | float) and value % 1 == 0


def _count(resolved: ResolvedConfig, key: str) -> int:
    """A key that counts something, 1 where it is not given."""
    value = resolved.value(key, 1) or 1
    if not _is_whole(value) or value < 1:
        raise ConfigError(
            f"{key}={short(value)} ({resolved[key].provenance}) should be a whole number ≥ 1"
        )
    return int(value)


def _token_ids(
    resolved: ResolvedConfig, known: dict[str, Any], sources: dict[str, Provenance]
) -> None:
    for name in TOKEN_IDS:
        entry = resolved.get(name)
        if entry is None or entry.value is None:
            continue
        several = isinstance(entry.value, list) and name == "eos_token_id"
        tokens = entry.value if several else [entry.value]
        if not tokens or any(not _is_whole(t) or not 0 <= t < known["vocab_size"] for t in tokens):
            raise ConfigError(
                f"{name}={short(entry.value)} ({entry.provenance}) is no row of the embedding, "
                f"which has {known['vocab_size']}"
            )
        ids = tuple(dict.fromkeys(map(int, tokens)))
        known[name] = ids[0] if len(ids) == 1 else ids
        sources[name] = entry.provenance
