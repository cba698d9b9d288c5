"""Running one of MaxText's layers within jit, with taps on its parts."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from moeconv.arch.blocks import Taps
from moeconv.arch.parameters import LayerKind
from moeconv.verification.models.maxtext_beside import KEY, VALUE, with_own_keys

MODE = "train"  # maxtext.common.common_types.MODEL_MODE_TRAIN


def positions(tokens: Any) -> Any:
    """Positions [B, T] from 0, of tokens [B, T] or hidden states [B, T, D]."""
    import jax.numpy as jnp

    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape[:2])


class Tap:
    """Stands where a part of a layer stood and keeps what it returned."""

    def __init__(self, part: Any, name: str, kept: dict[str, Any]) -> None:
        self._part, self._name, self._kept = part, name, kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the part; of several things that it returns the first is kept."""
        result = self._part(*args, **kwargs)
        self._kept[self._name] = result[0] if isinstance(result, tuple) else result
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """For a layer that asks (models/qwen3.py `Qwen3NextDecoderLayer.__call__`)."""
        return type(self._part)


def run_layer(layer: Any, hidden: Any, given: Mapping[str, Any] | None = None) -> Any:
    """Hidden states [B, T, D] after a layer: one segment, no dropout, further inputs."""
    import jax.numpy as jnp

    segments = jnp.ones(hidden.shape[:2], jnp.int32)
    result = layer(hidden, segments, positions(hidden), True, MODE, **(given or {}))
    return result[0] if isinstance(result, tuple) else result


def traced_layer(
    graph: Any, taps: Taps, kind: LayerKind, suffix: str = "", others: Collection[str] = ()
) -> Callable[[Any, Any, Mapping[str, Any]], dict[str, Any]]:
    """The function to jit: a layer with taps on attention, router and experts.

    It takes the layer's state, hidden states and further inputs (`Beside.given`).

    Args:
        graph: Of its module.
        taps: Where the parts are.
        kind: The layer's.
        suffix: Behind the names of its parts, where the module holds other layers too.
        others: Theirs; their attention and MLP are silent, and a norm of zeros is zeros.
    """
    import jax.numpy as jnp
    from flax import nnx

    mlp = taps.mlp[kind.mlp]
    places = {"attention": taps.attention + suffix, "experts": mlp + suffix}
    if kind.mlp == "moe":
        places["router"] = taps.router_of(kind)

    def run(state: Any, hidden: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        layer = nnx.merge(graph, state)
        kept: dict[str, Any] = {}
        owners = {name: owner_of(layer, place) for name, place in places.items()}
        for name, (owner, attribute) in owners.items():
            # Past flax, which would take the tap for state of the model.
            object.__setattr__(owner, attribute, Tap(getattr(owner, attribute), name, kept))
        for other in others:
            # The residual passes; attention also returns a cache.
            silent = {taps.attention: lambda h, *_, **__: (jnp.zeros_like(h), None)}
            silent[mlp] = lambda h, *_, **__: jnp.zeros_like(h)
            for name, part in silent.items():
                object.__setattr__(layer, name + other, part)
        given = with_own_keys(layer, hidden, positions(hidden), given)
        kept["output"] = run_layer(layer, hidden, given)
        return kept | {name: given[name] for name in (KEY, VALUE) if name in given}

    return run


def owner_of(layer: Any, place: str) -> tuple[Any, str]:
    """The module that has a submodule as an attribute, and the attribute."""
    *above, attribute = place.split(".")
    for name in above:
        layer = getattr(layer, name)
    return layer, attribute
