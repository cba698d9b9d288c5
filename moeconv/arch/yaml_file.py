"""Reading untrusted YAML: small, flat, plain, and without surprises.

MaxText's own files need no aliases, tags or deep nesting. So all of these can be bounded: by the
size of the file everything else is, too.
"""

from collections.abc import Hashable
from typing import Any

import yaml

# MaxText 0.2.5's base.yml has 92 KB, a run's own YAML or log of its config less.
SIZE_LIMIT = 512 * 1024
_DEPTH_LIMIT = 32
_SCALAR_LIMIT = 10_000
_EVENT_LIMIT = 20_000
_DIGITS_LIMIT = 100
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """Refuses what YAML allows and OmegaConf, MaxText's reader, does not: a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"the key {short(key.value)} stands there twice")
                seen.add(key.value)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found

    def whole_number(self, node: yaml.ScalarNode) -> int | str:
        """Left as text where it is too long: no setting is so large, and Python prints none."""
        if len(node.value) > _DIGITS_LIMIT:
            return str(node.value)
        number: int = self.construct_yaml_int(node)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)
# As `yaml.dump` writes MaxText's own tuples.
_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _Loader.construct_yaml_seq)


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: It is no YAML, or has what none of MaxText's files needs; says what.
    """
    if len(text) > SIZE_LIMIT:
        raise ValueError(f"it has more than {SIZE_LIMIT // 1024} KiB")
    try:
        _check_events(text)
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", in line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or next(iter(str(error).splitlines()), "unreadable")
        raise ValueError(f"{short(why, 200)}{where}") from None


def key_lines(text: str, *path: str) -> dict[str, int]:
    """The line of every key of a mapping in a YAML that `read_yaml` has read, counted from 1.

    Args:
        text: The YAML.
        path: The keys that lead to the mapping; none for that at the top.
    """
    found = yaml.compose(text, Loader=_Base)
    for name in path:
        pairs = found.value if isinstance(found, yaml.MappingNode) else []
        found = next((value for key, value in pairs if key.value == name), None)
    pairs = found.value if isinstance(found, yaml.MappingNode) else []
    return {str(key.value): key.start_mark.line + 1 for key, _ in pairs}


def _check_events(text: str) -> None:
    """Before anything is built: an alias makes a short file long, nesting exhausts the stack."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Base)):
        if count > _EVENT_LIMIT:
            raise ValueError(f"it has more than {_EVENT_LIMIT} keys and values")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has an alias (*{short(event.anchor)}); write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > _SCALAR_LIMIT:
            raise ValueError(f"it has a value of {len(event.value)} characters")
        if depth > _DEPTH_LIMIT:
            raise ValueError(f"it is nested more than {_DEPTH_LIMIT} deep")


def short(value: object, limit: int = 80) -> str:
    """A value for a sentence, whatever its length."""
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
