"""MaxText's config as plain values, without importing MaxText, which takes 16 s.

The defaults are those of the installed release's own base.yml; values read as MaxText reads them
(pyconfig.py `_prepare_for_pydantic`: the word "none" is None).
"""

import importlib.util
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from moeconv.errors import MissingPackageError, to_install


@cache
def maxtext_configs() -> Path:
    """The folder of the installed MaxText's own config files.

    Raises:
        MissingPackageError: MaxText is not installed.
    """
    found = importlib.util.find_spec("maxtext")
    for place in found.submodule_search_locations or () if found else ():
        if Path(place, "configs", "base.yml").is_file():
            return Path(place, "configs")
    raise MissingPackageError(f"MaxText is not installed; {to_install('train')}")


@cache
def maxtext_defaults() -> dict[str, Any]:
    """What base.yml says.

    Raises:
        MissingPackageError: MaxText is not installed.
    """
    text = (maxtext_configs() / "base.yml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return {key: _none(value) for key, value in loaded.items()}


def value_of(text: Any) -> Any:
    """A value as from the command line (`key=value`), or one that is read already."""
    if not isinstance(text, str):
        return text
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


def said(value: Any) -> str:
    """A value as MaxText's command line (OmegaConf) reads it."""
    if value is None:
        return "none"
    if isinstance(value, (bool, list)):
        return json.dumps(value)
    if isinstance(value, str) and yaml.safe_load(value) != value:
        return json.dumps(value)  # what YAML would take for a number, a comment, a mapping …
    return str(value)


def name_of(settings: Mapping[str, Any]) -> str:
    """Settings as that command line."""
    return " ".join(f"{key}={said(value)}" for key, value in settings.items())


def resolve(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of base.yml and those given, which win."""
    return {**maxtext_defaults(), **{key: value_of(value) for key, value in keys.items()}}


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
