"""A layer of MaxText whose experts are computed in groups: its own code, on slices of them.

`RoutedMoE.dense_matmul` (layers/moe.py) computes every expert for every token and sums them up with
weights that are 0 for those not chosen. So the sum is that of groups: MaxText routes over all
experts, and of the weights that it gives each group gets its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

from moeconv.arch.blocks import Block, Taps
from moeconv.arch.parameters import LayerKind
from moeconv.errors import UnsupportedError
from moeconv.verification.models.expert_groups import Groups
from moeconv.verification.models.maxtext_taps import Tap, owner_of, run_layer


def routed_module(taps: Taps, kind: LayerKind) -> str:
    """The dotted attribute of a layer's `RoutedMoE`: the module that has the router."""
    return taps.router_of(kind).rpartition(".")[0]


def expert_parameters(block: Block, kind: LayerKind) -> frozenset[str]:
    """The parameters of a kind of layer that have a slice for each expert, but for the router's.

    A factor for each expert goes with the routing, which knows all of them (`get_topk`).
    """
    if kind.mlp != "moe":
        return frozenset()
    routed, router = routed_module(block.taps, kind), block.taps.router.rpartition(".")[2]
    return frozenset(
        p.name
        for p in block.layers[kind]
        if p.axes[0] == "E"
        and len(p.axes) > 1
        and p.name.startswith(f"{routed}.")
        and not p.name.startswith(f"{routed}.{router}.")
    )


class GroupedLayer:
    """One kind of layer, compiled in three parts: up to the experts, a group, and the rest."""

    def __init__(
        self, graph: Any, shapes: Any, taps: Taps, kind: LayerKind, groups: Groups
    ) -> None:
        """Nothing is compiled yet.

        Args:
            graph: Of the layer.
            shapes: The state of its expert parameters, as shapes.
            taps: What is compared.
            kind: The layer's.
            groups: Of its experts.
        """
        import jax

        self._graph, self._shapes, self._taps, self._kind = graph, shapes, taps, kind
        self._routed, self._groups = routed_module(taps, kind), groups
        # Arguments of the experts that are no arrays, known once the first part is traced.
        self._fixed: dict[str | int, Any] = {}
        self._inputs = jax.jit(self._until_experts)
        self._group = jax.jit(self._with_group)
        self._rest = jax.jit(self._after_experts)

    def __call__(
        self, run: Callable[..., Any], state: Any, read: Callable[[slice], Any], hidden: Any
    ) -> Mapping[str, Any]:
        """What `traced_layer` gives.

        Args:
            run: Runs a jitted function on its arguments.
            state: The layer's, without its experts.
            read: The state of the experts of a slice.
            hidden: [B, T, D].
        """
        import jax

        inputs = run(self._inputs, state, hidden)
        total, scores = None, None
        for experts in self._groups:
            group = read(experts)
            part, scores = run(self._group, state, group, inputs, experts.start)
            total = part if total is None else total + part
            jax.tree.map(lambda leaf: leaf.delete(), group)
        return {**run(self._rest, state, hidden, total), "router": scores}

    def _layer(self, state: Any, experts: Any) -> Any:
        from flax import nnx

        return nnx.merge(self._graph, nnx.merge_state(state, experts))

    def _until_experts(self, state: Any, hidden: Any) -> dict[str | int, Any]:
        """The arrays that the experts are given."""
        import jax
        import jax.numpy as jnp

        layer = self._layer(state, self._shapes)
        given: dict[str | int, Any] = {}

        def keep(*args: Any, **kwargs: Any) -> tuple[Any, None, None]:
            given.update(enumerate(args))
            given.update(kwargs)
            return jnp.zeros_like(args[0]), None, None

        self._replace(layer, keep)
        run_layer(layer, hidden)
        arrays = {key: value for key, value in given.items() if isinstance(value, jax.Array)}
        self._fixed = {key: value for key, value in given.items() if key not in arrays}
        return {str(key): value for key, value in arrays.items()}

    def _with_group(self, state: Any, group: Any, inputs: Mapping[str, Any], start: Any) -> Any:
        """The weighted sum [B, T, D] of a group's experts, and the scores of the router."""
        import jax

        layer = self._layer(state, group)
        owner, name = owner_of(layer, self._routed)
        routed = getattr(owner, name)
        kept: dict[str, Any] = {}
        above, router = owner_of(layer, self._taps.router_of(self._kind))
        object.__setattr__(above, router, Tap(getattr(above, router), "router", kept))
        weigh, calls = routed.reshape_and_update_weights, 0

        def weights(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            whole = weigh(*args, **kwargs)
            return jax.lax.dynamic_slice_in_dim(whole, start, self._groups.size, axis=-1)

        object.__setattr__(routed, "reshape_and_update_weights", weights)
        given = {int(k) if k.isdigit() else k: value for k, value in inputs.items()} | self._fixed
        positional = [given[key] for key in sorted(k for k in given if isinstance(k, int))]
        named = {key: value for key, value in given.items() if isinstance(key, str)}
        total = routed(*positional, **named)[0]
        if calls != 1:
            raise UnsupportedError(
                "this MaxText weighs experts differently from 0.2.5, so that they cannot be "
                "computed in groups; install maxtext==0.2.5"
            )
        return total, kept["router"]

    def _after_experts(self, state: Any, hidden: Any, total: Any) -> dict[str, Any]:
        layer = self._layer(state, self._shapes)
        self._replace(layer, lambda *args, **kwargs: (total, None, None))
        kept: dict[str, Any] = {}
        places = {"attention": self._taps.attention, "experts": self._taps.mlp[self._kind.mlp]}
        for part, place in places.items():
            owner, name = owner_of(layer, place)
            object.__setattr__(owner, name, Tap(getattr(owner, name), part, kept))
        kept["output"] = run_layer(layer, hidden)
        return kept

    def _replace(self, layer: Any, experts: Callable[..., Any]) -> None:
        owner, name = owner_of(layer, self._routed)
        object.__setattr__(owner, name, experts)
