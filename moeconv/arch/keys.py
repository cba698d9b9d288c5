"""Every setting of MaxText by what it decides, and what a block makes of those that decide a model.

The classes are those of data/maxtext_keys.json, which tools/maxtext_defaults.py writes: a setting
of the installed MaxText that has none fails a test. Of a setting that can change what a model
computes (`function`) only neutral values are converted, unless the block's page says otherwise. A
setting that is not in the table at all, of a newer MaxText or a fork, is refused by name.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from moeconv.arch.blocks import Block
from moeconv.arch.fields import FIELDS, YARN
from moeconv.arch.yaml_file import short

_IGNORED = "is ignored by this decoder block in MaxText, and so by the converted model"
# Settings that fields of the description hold, and those that say how layers are stored.
_HELD = frozenset({"decoder_block", *(field.key for field in (*FIELDS, *YARN))})
# Read where the model is quantised (layers/quantizations.py), which was not observed.
_BEHIND_QUANTIZATION = frozenset({"weight_sparsity_n", "weight_sparsity_m"})


@dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        kind: `function` changes what is computed from given weights and tokens; `size` shapes
            show; `derived` MaxText computes from others; `training`, `machine` and `io` change
            nothing that is converted.
        neutral: Of a `function`, the values under which the model is the plain decoder.
        what: What other values do, continuing "KEY=VALUE …".
        visible: Other values show in the parameters, so that no config needs to give this one.
    """

    kind: str
    neutral: tuple[Any, ...] = ()
    what: str = "changes what the model computes"
    visible: bool = False

    def is_neutral(self, value: Any) -> bool:
        """True if a value leaves the model a plain one; a section does if its settings do."""
        if isinstance(value, Mapping):
            # What a field holds is given once, at the top.
            known = {name: keys().get(name) for name in value}
            return not any(
                key is None
                or name in _HELD | {"model_name"}
                or (key.kind == "function" and not key.is_neutral(value[name]))
                for name, key in known.items()
            )
        return _among(value, self.neutral)


@cache
def keys() -> Mapping[str, Key]:
    """All settings that are known, by name."""
    path = resources.files("moeconv.arch") / "data" / "maxtext_keys.json"
    found = {}
    for name, entry in json.loads(path.read_text()).items():
        neutral = tuple(_plain(value) for value in entry.get("neutral", ()))
        what = entry.get("what", Key.what)
        found[name] = Key(entry["class"], neutral, what, entry.get("visible", False))
    return found


@cache
def keys_read() -> Mapping[str, frozenset[str]]:
    """For each decoder block the `function` settings that MaxText reads to build and run it.

    Observed in the installed release (tests/arch/test_keys_read.py). What a block computes depends
    on no other setting; of a block that was not observed, all count as read.
    """
    path = resources.files("moeconv.arch") / "data" / "keys_read.json"
    return {block: frozenset(names) for block, names in json.loads(path.read_text()).items()}


@cache
def function_keys() -> Mapping[str, Key]:
    """Those that can change what a model computes, without the ones that a field holds."""
    return {n: key for n, key in keys().items() if key.kind == "function" and n not in _HELD}


def verdicts(
    block: Block, configured: Mapping[str, Any], *, tied: bool
) -> tuple[list[str], list[str], list[str]]:
    """Judges the configured settings that decide a model.

    Args:
        block: Whose page says which of them it honours.
        configured: Config values by MaxText key.
        tied: True if the output head is the embedding.

    Returns:
        Refusals, warnings (both sentences), and keys that no config gives and no shape shows.
    """
    refusals: list[str] = []
    warnings: list[str] = []
    missing: list[str] = []
    held = {*block.shown, *block.shapes, *(field.key for field in block.settings)}
    read = keys_read().get(block.name, frozenset(function_keys()))
    for name, key in function_keys().items():
        ignored = name in block.idle or name not in read | _BEHIND_QUANTIZATION
        if name in held:
            continue
        if name not in configured:
            if not (ignored or key.visible or name in block.warns):
                missing.append(name)
            continue
        value = configured[name]
        if name in block.demands:
            if not _among(value, block.demands[name]):
                only = " or ".join(short(each) for each in block.demands[name])
                refusals.append(f"{name}={short(value)} should be {only} for this decoder block")
            continue
        if key.is_neutral(value) or _among(value, block.honours.get(name, ())):
            continue
        if name == "model_name" and str(value).startswith("llama3.1"):
            continue  # it chooses the RoPE, which the description has (`resolve`)
        if name == "final_logits_soft_cap" and not tied:
            continue  # layers/nnx_decoders.py `apply_output_head` caps only tied logits
        sentence = f"{name}={short(value)} "
        if name in block.refuses:
            refusals.append(sentence + block.refuses[name])
        elif name in block.warns:
            warnings.append(sentence + block.warns[name])
        elif ignored or _among(value, block.idle_values.get(name, ())):
            warnings.append(sentence + _IGNORED)
        else:
            refusals.append(sentence + key.what)
    return refusals, warnings, missing


def refusals_of(block: Block, configured: Mapping[str, Any]) -> list[str]:
    """What of a config the block's page refuses by name; a sentence each.

    Args:
        block: The decoder block.
        configured: Config values by MaxText key.
    """
    return [
        f"{name}={short(configured[name])} {reason}"
        for name, reason in block.refuses.items()
        if name in configured and not function_keys()[name].is_neutral(configured[name])
    ]


def unknown_keys(content: Collection[str], accepted: Collection[str]) -> list[str]:
    """Settings of a config that no supported MaxText has and that the user did not accept."""
    return sorted(set(content) - keys().keys() - set(accepted))


def _among(value: Any, values: Collection[Any]) -> bool:
    plain = _plain(value)
    # True is 1 to Python, but no number to MaxText.
    return any((plain == each and type(plain) is type(each)) or
               (_is_number(plain) and _is_number(each) and plain == each)
               for each in values)  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    return tuple(_plain(each) for each in value) if isinstance(value, list | tuple) else value
