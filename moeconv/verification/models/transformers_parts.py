"""The parts of a model of transformers, where its page's `Probe` says, and what they return."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from moeconv.families import targets
from moeconv.mapping.rules import Probe
from moeconv.tensor.axes import Array


def probe_of(config: Any) -> Probe:
    """Where the parts of a model are, by its architecture; as in most models if none is known."""
    named = set(config.architectures or ())
    return next((each.probe for each in targets().values() if each.architecture in named), Probe())


def feed_forward(layer: Any, probe: Probe) -> Any:
    """The MLP or MoE block of a layer.

    Raises:
        AttributeError: It is nowhere that the probe says.
    """
    return _first_of(layer, probe.mlp)


def attention(layer: Any, probe: Probe) -> Any:
    """The attention of a layer.

    Raises:
        AttributeError: It is nowhere that the probe says.
    """
    return _first_of(layer, probe.attention)


def _first_of(layer: Any, names: tuple[str, ...]) -> Any:
    """The first part that a layer has."""
    found = (part_at(layer, name, None) for name in names)
    return next((part for part in found if part is not None), None) or part_at(layer, names[0])


def mlp_of(layer: Any, probe: Probe) -> tuple[Any, str]:
    """The module that has a layer's feed-forward half as an attribute, and the attribute."""
    place = next(name for name in probe.mlp if part_at(layer, name, None) is not None)
    return owner_of(layer, place)


def router_of(layer: Any, probe: Probe) -> Any:
    """The router of a MoE layer; None in a dense one."""
    below = part_at(feed_forward(layer, probe), probe.router, None)
    return part_at(layer, probe.router, None) if below is None else below


def tap_router(
    layer: Any, probe: Probe, kept: dict[Any, Any], name: Any
) -> contextlib.AbstractContextManager[None]:
    """Keeps the scores of a MoE layer's router; nothing of a dense layer."""
    if (router := router_of(layer, probe)) is None:
        return contextlib.nullcontext()
    mlp = feed_forward(layer, probe)
    return tap(router, kept, name, lambda output: probe.scores(mlp, output))


_DEMANDED = object()


def part_at(module: Any, path: str, default: Any = _DEMANDED) -> Any:
    """What a dotted attribute leads to.

    Raises:
        AttributeError: Nothing, and there is no default.
    """
    try:
        return functools.reduce(getattr, path.split("."), module)
    except AttributeError:
        if default is _DEMANDED:
            raise
        return default


def owner_of(module: Any, path: str) -> tuple[Any, str]:
    """The module that has a submodule as an attribute, and the attribute."""
    above, _, name = path.rpartition(".")
    return (part_at(module, above) if above else module), name


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def tap(
    module: Any, kept: dict[Any, Any], name: Any, of: Callable[[Any], Any] = _first
) -> Iterator[None]:
    """Keeps something of what a module returns."""

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        kept[name] = of(output)

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def silent(model: Any, path: str) -> Iterator[None]:
    """A module below the model gives zeros; nothing happens where the path is empty."""
    if not path:
        yield
        return
    handle = part_at(model, path).register_forward_hook(lambda _module, _inputs, output: 0 * output)
    try:
        yield
    finally:
        handle.remove()


def to_numpy(tensor: Any) -> Array:
    """A tensor in float32."""
    array: Array = tensor.float().cpu().numpy()
    return array
