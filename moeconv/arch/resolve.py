"""From shapes and config to the description of a model, or to what is still missing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeconv.arch.blocks import Block, settings_of
from moeconv.arch.config_sources import ConfigEntry, ResolvedConfig
from moeconv.arch.defaults import CHANGED, TOKEN_IDS, maxtext_defaults
from moeconv.arch.description import ModelDescription, Origin, Provenance
from moeconv.arch.fields import FIELDS, YARN, ConfigField
from moeconv.arch.keys import verdicts
from moeconv.arch.layout import Layout
from moeconv.arch.shapes import check_against_shapes, dropped_layers, from_shapes, is_whole
from moeconv.arch.values import as_recorded
from moeconv.arch.yaml_file import short
from moeconv.errors import ConfigError, UnsupportedError

_NUMBERS = re.compile(r"[\[(]?\s*\d{1,18}(?:[\s,;]+\d{1,18})*\s*,?\s*[\])]?\Z", re.ASCII)


@dataclass(frozen=True)
class Resolution:
    """What is known of a model, and what is not.

    Attributes:
        known: Values of description fields.
        sources: The source of each of them.
        missing: Config keys that neither shapes nor config give.
        doubts: Of those, the ones that a model's file gives which may not have been read: why.
        refusals: ConfigEntry semantics that no target can hold, one sentence each.
        warnings: Things to know, one sentence each.
    """

    known: Mapping[str, Any]
    sources: Mapping[str, Provenance]
    missing: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    doubts: Mapping[str, str] = field(default_factory=dict)

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
            raise ConfigError(missing_message(self.missing, self.doubts))
        return ModelDescription(**self.known, sources=self.sources)


def missing_message(missing: Sequence[str], doubts: Mapping[str, str]) -> str:
    """Names the keys, MaxText's default for each, and the three ways to give them."""
    if missing and doubts.keys() >= set(missing):
        return (
            "MaxText 0.2.0 and 0.2.1 did not read a model's file where the YAML was outside their "
            "configs/, and this checkpoint may be theirs:"
            + "".join(f"\n  {key}: {doubts[key]}" for key in missing)
            + "\nIf they did not read it, take model_name out of the YAML; else give the values of "
            "the file, each with --set KEY=VALUE."
        )
    base = maxtext_defaults()["base"]
    own = {"decoder_block", *(f.key for f in (*FIELDS, *YARN))}
    defaults = {key: f"MaxText's default: {base[key]}" for key in missing if key in base}
    for key in defaults.keys() & CHANGED:
        value, until = CHANGED[key]
        defaults[key] += f", but {value} until {until}, and nothing dates this checkpoint"
    defaults |= doubts
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
    layout: Layout,
    resolved: ResolvedConfig,
    *,
    scan_layers: bool | None = None,
    dated: bool = True,
    unread: bool = False,
) -> Resolution:
    """Puts together what shapes and config say.

    Args:
        layout: The checkpoint's structure.
        resolved: Config file or sidecar, and flags.
        scan_layers: `custom_metadata.scan_layers` of the checkpoint, if it has any.
        dated: True if the save is younger than the changes in `CHANGED`; else such a default could
            be either, and is missing.
        unread: True if MaxText may not have read the model's file. What that file gives is then
            missing, unless shapes show that it was read.

    Raises:
        TensorError: Shapes contradict each other.
        ConfigError: The config contradicts the shapes, or has no sensible value.
    """
    known, sources = from_shapes(layout)
    missing: list[str] = []
    block = _block(layout, resolved, known, sources, missing)
    check_against_shapes(layout, resolved, known, sources, block, scan_layers)
    others = _unread(layout, resolved, known, sources) if unread else {}
    resolved = resolved.without(lambda key: key in others)
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
    warnings += dropped_layers(layout, resolved)
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
    asked = (*missing, *open_keys)
    doubts = {key: others[key] for key in asked if key in others}
    return Resolution(known, sources, asked, tuple(refusals), tuple(warnings), doubts)


def _unread(
    layout: Layout,
    resolved: ResolvedConfig,
    known: dict[str, Any],
    sources: dict[str, Provenance],
) -> dict[str, str]:
    """Settings that differ where MaxText did not read the model's file, with both values.

    Source: MaxText 0.2.0 and 0.2.1 configs/pyconfig.py `initialize_pydantic` looks for
    `models/NAME.yml` beside the YAML, beside its folder, and at last in `configs/configs/`, which
    there is not; then it warns, and goes on without. 0.1.0 and 0.2.2 find it in `configs/`.

    Returns:
        None of them where the shapes are not those of the model that the YAML then describes.
    """
    told = {key: entry.unread for key, entry in resolved.items() if entry.unread is not None}
    block = told.get("decoder_block")
    if block is not None and block.value != layout.block.name:
        return {}
    explicit = {k: ConfigEntry(e.value, Provenance(Origin.CONFIG, "")) for k, e in told.items()}
    try:
        config = ResolvedConfig(resolved, explicit)
        check_against_shapes(layout, config, known, sources, layout.block, None)
    except ConfigError:
        return {}
    return {
        key: f"{short(resolved[key].value)} by {resolved[key].provenance.detail}, "
        f"{short(entry.value)} without it ({entry.provenance.detail})"
        for key, entry in told.items()
        if as_recorded(entry.value) != as_recorded(resolved[key].value)
    }


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


def _numbers(value: Any) -> list[Any]:
    """The numbers of one token or of several, also as a text: `1,2`, `"[1, 2]"`."""
    if isinstance(value, str) and _NUMBERS.match(value):
        value = [int(number) for number in re.findall(r"\d+", value)]
    if isinstance(value, list | tuple):
        return [int(v) if isinstance(v, str) and v.isdecimal() else v for v in value]
    return [value]


def _token_ids(
    resolved: ResolvedConfig, known: dict[str, Any], sources: dict[str, Provenance]
) -> None:
    for name in TOKEN_IDS:
        entry = resolved.get(name)
        if entry is None or entry.value is None:
            continue
        several = name == "eos_token_id"
        tokens = _numbers(entry.value) if several else [entry.value]
        if any(isinstance(token, str | list) for token in tokens):
            raise ConfigError(
                f"{name}={short(entry.value)} ({entry.provenance}) should be a token's number"
                + (", or several as [1, 2]" if several else "")
            )
        if not tokens or any(not is_whole(t) or not 0 <= t < known["vocab_size"] for t in tokens):
            raise ConfigError(
                f"{name}={short(entry.value)} ({entry.provenance}) is no row of the embedding, "
                f"which has {known['vocab_size']}"
            )
        ids = tuple(dict.fromkeys(map(int, tokens)))
        known[name] = ids[0] if len(ids) == 1 else ids
        sources[name] = entry.provenance
