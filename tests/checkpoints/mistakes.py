"""Mistakes that a family's page could make, as functions from the right target to a wrong one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from checkpoints.row import Mistaken
from moeconv.mapping.rules import Factor, Target

ZERO = Factor("0", "a mistake", lambda m: 0.0)


def key(name: str, change: Callable[[Any], Any]) -> Mistaken:
    """A page that writes another value of one key of config.json."""

    def mistaken(target: Target) -> Target:
        keys = {each.key: each for each in target.config}
        right = keys[name].value
        keys[name] = replace(keys[name], value=lambda m, o: change(right(m, o)))
        return replace(target, config=tuple(keys.values()))

    return mistaken


def rope(**changes: Any) -> Mistaken:
    """Of RoPE's numbers, for all releases."""

    def changed(found: dict[str, Any] | None) -> dict[str, Any] | None:
        return {**(found or {}), **changes}

    return lambda target: key("rope_scaling", changed)(key("rope_parameters", changed)(target))


def rule(name: str, **changes: Any) -> Mistaken:
    """A page with another rule for one tensor."""

    def mistaken(target: Target) -> Target:
        rules = [
            replace(each, **changes) if each.target.endswith(name) else each
            for each in target.rules
        ]
        assert rules != list(target.rules)
        return replace(target, rules=tuple(rules))

    return mistaken


def other_way(types: list[str]) -> list[str]:
    """The types of layers, one layer on."""
    return types[1:] + types[:1]
