"""The model families, one page each: what MaxText builds, what Hugging Face loads, and the rules.

A page is a module of this package, or of an installed one that names it as an entry point of the
group `moeconv.families`. It holds any number of `Block`s, `Target`s and `Refused`, which are found
by their type; docs/adding-a-family.md walks through one.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from moeconv.arch.blocks import Block, Refused
from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import is_axis
from moeconv.arch.yaml_file import short
from moeconv.errors import ConfigError, UnsupportedError
from moeconv.mapping.edges import cannot_hold
from moeconv.mapping.rules import Target

GROUP = "moeconv.families"


@cache
def pages() -> tuple[ModuleType, ...]:
    """Every page, moeconv's own first, by name.

    Raises:
        ConfigError: An installed page cannot be imported.
    """
    own = sorted(each.name for each in pkgutil.iter_modules(__path__) if each.name[0] != "_")
    found = [importlib.import_module(f"{__name__}.{name}") for name in own]
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            found.append(importlib.import_module(entry.value))
        except (Exception, SystemExit) as error:  # whatever a foreign module raises
            raise ConfigError(
                f"the page {entry.name} ({entry.value}), which an installed package adds to "
                f"moeconv, cannot be imported: {type(error).__name__}: {error}"
            ) from None
    return tuple(found)


@cache
def blocks() -> Mapping[str, Block]:
    """Every decoder block, by the name that MaxText has for it.

    Raises:
        ConfigError: A page has a block that cannot be used.
    """
    found = _of_type(Block)
    for block in found.values():
        axes = {axis for parameter in block.parameters().values() for axis in parameter.axes}
        wrong = [
            *(
                f"target {name}, which no page has"
                for name in block.targets
                if name not in targets()
            ),
            *(f"axis {axis}, which has no meaning" for axis in sorted(axes) if not is_axis(axis)),
            *(["a name with capitals"] if block.name != block.name.lower() else []),
        ]
        if wrong:
            raise ConfigError(f"the page of decoder_block={block.name} has a {wrong[0]}")
    return found


@cache
def targets() -> Mapping[str, Target]:
    """Every target, by its name."""
    return _of_type(Target)


@cache
def refused() -> Mapping[str, Refused]:
    """The decoder blocks that a page refuses and none converts, by name."""
    return {name: each for name, each in _of_type(Refused).items() if name not in blocks()}


def _of_type[T: (Block, Target, Refused)](kind: type[T]) -> Mapping[str, T]:
    found: dict[str, T] = {}
    for page in pages():
        for value in vars(page).values():
            if isinstance(value, kind) and found.setdefault(value.name, value) is not value:
                raise ConfigError(
                    f"{page.__name__}: {value.name} is the name of another page's "
                    f"{kind.__name__.lower()}"
                )
    return found


def block_of(name: Any, where: object) -> Block:
    """The decoder block that a config names.

    Args:
        name: Its `decoder_block`.
        where: The config, for people.

    Raises:
        UnsupportedError: No page converts it.
    """
    block = blocks().get(str(name).lower())
    if block is not None:
        return block
    why = refused().get(str(name).lower())
    if why is not None:
        raise UnsupportedError(f"decoder_block={why.name} ({where}) is not converted: {why.reason}")
    raise UnsupportedError(
        f"decoder_block={short(name)} ({where}) is not supported; moeconv converts "
        f"{', '.join(blocks())}"
    )


def targets_of(model: ModelDescription) -> tuple[Target, ...]:
    """The targets of a model's decoder block, the one that is taken by default first."""
    return tuple(targets()[name] for name in blocks()[model.decoder_block].targets)


def target_for(model: ModelDescription, name: str = "auto") -> Target:
    """The target of a conversion.

    Args:
        model: What is converted.
        name: Of the target; `auto` is the first of its decoder block that can hold the model.

    Raises:
        UnsupportedError: The model's decoder block is not for that target, or for none.
    """
    possible = targets_of(model)
    if name == "auto":
        reasons = {each.name: cannot_hold(each, model) for each in possible}
        for each in possible:
            if reasons[each.name] is None:
                return each
        listed = "; ".join(f"--target {name}: {reason}" for name, reason in reasons.items())
        raise UnsupportedError(f"no target can hold this model: {listed}")
    for each in possible:
        if each.name == name:
            return each
    raise UnsupportedError(
        f"--target {name} is not for decoder_block={model.decoder_block}, whose targets are "
        f"{', '.join(each.name for each in possible)}"
    )
