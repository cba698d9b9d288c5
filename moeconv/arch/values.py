"""Values of settings, whether Python, YAML or JSON wrote them."""

import re
from typing import Any

from moeconv.arch.defaults import known_keys
from moeconv.arch.keys import function_keys, keys
from moeconv.arch.yaml_file import short

# Enums of MaxText (common/common_types.py, configs/types.py) are printed so, by their member.
_ENUM = re.compile(r"[A-Z]\w*[a-z]\w*\.([A-Z0-9_]+)\Z", re.ASCII)
_WORDS = {"none": None, "true": True, "false": False}


def disagreement(key: str, one: tuple[Any, str], other: tuple[Any, str]) -> str | None:
    """What a run's records say differently of a setting that decides its model, with both places.

    Args:
        key: MaxText's.
        one: A value, and where it stands.
        other: Another.

    Returns:
        None where both are of one model: the same, or values that change none.
    """
    values = [as_recorded(value) for value, _ in (one, other)]
    neutral = key in function_keys() and key != "model_name"
    if (
        key not in known_keys()
        or values[0] == values[1]
        or (neutral and all(map(keys()[key].is_neutral, values)))
    ):
        return None
    said = [f"{short(value)} at {place}" for value, place in (one, other)]
    return f"{key} has two values, {said[0]} and {said[1]}"


def as_recorded(value: Any) -> Any:
    """A value in one form, whether Python, YAML or JSON wrote it."""
    if isinstance(value, list | tuple):
        return tuple(map(as_recorded, value))
    return plain(value)


def plain(value: Any) -> Any:
    """A config value as MaxText understands it.

    YAML 1.1 reads `1e-5` as text, MaxText's loader as a number; "none" is None (configs/pyconfig.py
    `_prepare_for_pydantic`), and pydantic reads "true"; logs of a resolved config print enums as
    `RopeType.LLAMA3_1`.
    """
    if not isinstance(value, str):
        return value
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if match := _ENUM.match(value):
        member = match[1].lower()
        return {"llama3_1": "llama3.1", "none": None, "empty": ""}.get(member, member)
    try:
        return float(value)
    except ValueError:
        return value
