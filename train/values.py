"""What MaxText's settings take: by the types of its types.py, without importing MaxText."""

import ast
import difflib
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from moeconv.errors import ConfigError, UsageError

_WHOLE = {"int", "PositiveInt", "NonNegativeInt"}
_NUMBER = _WHOLE | {"float", "PositiveFloat", "NonNegativeFloat"}
# As pydantic reads a bool.
_BOOLS = {"true", "false", "1", "0", "1.0", "0.0", "yes", "no", "on", "off", "t", "f", "y", "n"}
# nnx_decoders.py `get_remat_policy`, which asserts; MaxText's type is any text.
_REMAT = (
    "full",
    "minimal",
    "minimal_with_context",
    "minimal_flash",
    "minimal_with_quantization",
    "minimal_with_context_and_quantization",
    "minimal_offloaded",
    "save_dot_with_context_except_mlp",
    "save_dot_except_mlpwi",
    "save_dot_except_mlp",
    "save_qkv_proj",
    "save_out_proj",
    "qkv_proj_offloaded",
    "custom",
)

# What `check_bounds` looks at.
BOUNDED = {"steps", "num_experts", "num_experts_per_tok"}


# What is left of a long list in a sentence.
_LIST = 20


@cache
def field_types(source: str) -> dict[str, set[Any]]:
    """The alternatives of each field's type: names of types, and literal values as 1-tuples."""
    module = ast.parse(source)
    named: dict[str, set[Any]] = {}
    for node in module.body:  # ModelName = Literal[...], and enumerations of text
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found = set(_alternatives(node.value))
            if found and all(isinstance(one, tuple) for one in found):
                named[node.targets[0].id] = found
        elif isinstance(node, ast.ClassDef) and "str" in map(ast.unparse, node.bases):
            values = [one.value for one in node.body if isinstance(one, ast.Assign)]
            named[node.name] = {
                (value.value,) for value in values if isinstance(value, ast.Constant)
            }
    return {
        field.target.id: {
            one for name in _alternatives(field.annotation) for one in named.get(name, {name})
        }
        for node in module.body
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def _alternatives(annotation: ast.expr) -> Iterator[Any]:
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            yield from _alternatives(left)
            yield from _alternatives(right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            yield "None"
            yield from _alternatives(inner)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            values = ast.literal_eval(inner)
            yield from ((one,) for one in (values if isinstance(values, tuple) else (values,)))
        case _:
            yield ast.unparse(annotation)


def check_values(
    keys: Mapping[str, Any], source: str, where: str, kind: type[ConfigError | UsageError]
) -> None:
    """Refuses, in one sentence, what MaxText or a plan would fall over later.

    Args:
        keys: Settings with their values, read.
        source: MaxText's types.py.
        where: Goes before the key.
        kind: Of the error.

    Raises:
        ConfigError: Or UsageError, by `kind`.
    """
    for key, value in keys.items():
        if wanted := _wanted(key, value, source):
            raise kind(f"{where}{key}={_said(value)}: must be {wanted}")


def check_bounds(
    config: Mapping[str, Any], where: str, kind: type[ConfigError | UsageError]
) -> None:
    """Refuses a config of which no run can be made.

    Raises:
        ConfigError: Or UsageError, by `kind`.
    """
    if config["steps"] < 1:
        raise kind(f"{where}steps={config['steps']}: must be 1 or more")
    chosen, experts = config["num_experts_per_tok"], config["num_experts"]
    if chosen > experts:
        raise kind(
            f"{where}num_experts_per_tok={chosen}: must be at most num_experts, which is {experts}"
        )


def _wanted(key: str, value: Any, source: str) -> str | None:
    """What a setting takes, where this value is not it."""
    if key == "remat_policy":
        known = value is None or value in (*_REMAT, "none")
        return None if known else f"one of {', '.join(_REMAT)}"
    kinds = field_types(source).get(key, set())
    if value is None and ("None" in kinds or not kinds & (_NUMBER | {"bool"})):
        return None
    bare = kinds - {"None"}
    or_none = " or none" if "None" in kinds else ""
    if bare == {"bool"}:
        return None if str(value).lower() in _BOOLS else f"true or false{or_none}"
    if bare and bare <= _NUMBER:
        if bare <= _WHOLE:
            fits, wanted = _is_whole(value), "a whole number"
        else:
            fits, wanted = _is_number(value), "a number"
        positive = all(name.startswith("Positive") for name in bare)
        signless = positive or all(name.startswith("NonNegative") for name in bare)
        if positive:
            fits, wanted = fits and value > 0, f"{wanted} above 0"
        elif signless:
            fits, wanted = fits and value >= 0, f"{wanted}, 0 or more"
        return None if fits else wanted + or_none
    if bare and all(isinstance(one, tuple) for one in bare):
        choices = sorted(str(one) for (one,) in bare)
        return (
            None
            if value in [one for (one,) in bare]
            else f"one of {_listed(choices, str(value))}{or_none}"
        )
    return None


def _listed(choices: list[str], value: str) -> str:
    """Choices for a sentence; of many those that are most like what was given."""
    if len(choices) > _LIST:
        near = difflib.get_close_matches(value, choices, 5, 0.0)
        return f"{len(choices)} names, such as {', '.join(near)}"
    return ", ".join(filter(None, choices))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _said(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
