"""MaxText's config as plain values, without importing MaxText, which takes 16 s.

The defaults are those of the installed release's own base.yml; values read as MaxText reads them
(pyconfig.py `_prepare_for_pydantic`: the word "none" is None).
"""

import enum
import importlib.util
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from moeconv.errors import ConfigError

# Derived by MaxText from the machine it runs on, or lists that it merges by rules of its own.
_NOT_TO_REPEAT = {
    "logical_axis_rules",
    "logical_axis_rules_for_eval",
    "data_sharding",
    "num_slices",
}


@cache
def maxtext_defaults() -> dict[str, Any]:
    """What base.yml says.

    Raises:
        ConfigError: MaxText is not installed.
    """
    found = importlib.util.find_spec("maxtext")
    places = list(found.submodule_search_locations or []) if found else []
    for place in places:
        base = Path(place) / "configs" / "base.yml"
        if base.is_file():
            loaded: dict[str, Any] = yaml.safe_load(base.read_text(encoding="utf-8"))
            return {key: _none(value) for key, value in loaded.items()}
    raise ConfigError('MaxText is not installed; pip install "moeconv[train]"')


def value_of(text: Any) -> Any:
    """A value as from the command line (`key=value`), or one that is read already."""
    if not isinstance(text, str):
        return plain(text)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)  # 1e-5, which YAML 1.1 takes for a word
        except ValueError:
            return _none(value)
    return text if value is None or not isinstance(value, (bool, int, float, list)) else value


def plain(value: Any) -> Any:
    """A value of a resolved config (dtypes, enums, tuples) as YAML has it."""
    match value:
        case enum.Enum():
            return plain(value.value)
        case tuple() | list():
            return [plain(item) for item in value]
        case None | bool() | int() | float() | str() | Mapping():
            return _none(value)
        case _:
            return str(value)  # a dtype


def resolve(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of base.yml and those given, which win."""
    return {**maxtext_defaults(), **{key: value_of(value) for key, value in keys.items()}}


def overrides(keys: Mapping[str, Any]) -> dict[str, Any]:
    """What of `keys` differs from base.yml: enough to build the same config anew.

    A resolved config (`config.get_keys()`) has derived keys too; MaxText derives them again.
    """
    defaults = maxtext_defaults()
    return {
        key: value
        for key, value in resolve(keys).items()
        if key in defaults and key not in _NOT_TO_REPEAT and value != defaults[key]
    }


def mesh_axes(config: Mapping[str, Any]) -> dict[str, int]:
    """How many devices each axis within a host spans; -1 takes what is left."""
    return {
        key: int(value)
        for key, value in config.items()
        if key.startswith("ici_") and key.endswith("_parallelism")
    }


def mesh_devices(config: Mapping[str, Any]) -> int:
    """The product of the axes that are said."""
    return math.prod(axis for axis in mesh_axes(config).values() if axis > 0)


def _none(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "none" else value
