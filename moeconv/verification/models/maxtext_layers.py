"""MaxText's own layers, one at a time: the reference for models larger than memory.

The model is built by MaxText, unscanned and as shapes only, so that MaxText itself says which kind
layer n is; a layer gets its arrays when it is its turn, and gives them up with the next.
"""

import contextlib
import gc
import importlib.metadata
import importlib.util
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from moeconv.arch.blocks import Taps
from moeconv.arch.layout import Layout
from moeconv.arch.parameters import LayerKind
from moeconv.arch.stacks import CYCLED
from moeconv.errors import MissingPackageError, TensorError, UnsupportedError, to_install
from moeconv.tensor.axes import Array
from moeconv.verification.models.layerwise import LayerTrace
from moeconv.verification.models.maxtext import abstract_model, dotted, running, zeros
from moeconv.verification.models.maxtext_config import build_config, quiet
from moeconv.verification.models.maxtext_head import Head, unrounded_head

# Gives a parameter by its logical name (arch/parameters.py) and layer, as float32.
ReadParameter = Callable[[str, int | None], Array]

_MODE = "train"  # maxtext.common.common_types.MODEL_MODE_TRAIN
# Rows of a tied head's table taken together: at a width of 768 50 MB.
_HEAD_ROWS = 1 << 14


class MaxTextLayers:
    """A MaxText model on one CPU device, of which one layer is in memory."""

    name = "MaxText"

    def __init__(
        self,
        config: Mapping[str, object],
        read: ReadParameter,
        layout: Layout,
        *,
        dtype: str = "float32",
    ) -> None:
        """Builds the model's shapes.

        Args:
            config: As for `MaxTextModel.load`; whether it scans layers does not matter.
            read: Where parameters come from.
            layout: Of the checkpoint: its block says which modules of a layer are compared.
            dtype: What activations are computed in.
        """
        if importlib.util.find_spec("maxtext") is None:
            raise MissingPackageError(f"MaxText is not installed; {to_install('train')}")
        import jax
        from flax import nnx

        jax.devices()
        with quiet():
            self.config = build_config({**config, "scan_layers": False}, dtype)
            self._mesh, graph, abstract = abstract_model(self.config)
            self._model = nnx.merge(graph, abstract)
        self._read, self._taps, self._kinds = read, layout.block.taps, layout.kinds
        unscanned = next(way for way in layout.block.stackings if not way.scanned)
        # Below the decoder: one module may hold several layers.
        self._modules = [
            (module.pattern.format(number), module)
            for number, module in unscanned.modules(layout.kinds)
        ]
        # What a layer in a repeated block is hangs on its place in the block.
        self._cycle = layout.cycle if layout.stacking is CYCLED else len(layout.kinds)
        self._known = layout.block.parameters().keys()
        self._jitted: dict[str, Any] = {}
        self._traced: list[tuple[Any, Any]] = []
        self._globals: Any = None
        self.num_layers: int = self.config.num_decoder_layers * unscanned.paired

    @property
    def version(self) -> str:
        """MaxText's own version."""
        return importlib.metadata.version("maxtext")

    def embed(self, tokens: Array) -> Array:
        """See `LayerwiseModel`."""
        import jax.numpy as jnp

        def embed(model: Any, ids: Any) -> Any:
            decoder = model.decoder
            return decoder._apply_embedding(model.token_embedder, ids, _positions(ids), True, _MODE)

        return self._outer("embed", embed, jnp.asarray(tokens, jnp.int32))

    def norm(self, hidden: Array) -> Array:
        """See `LayerwiseModel`."""
        return self._outer("norm", lambda model, h: model.decoder.decoder_norm(h), hidden)

    def logits(self, normed: Array, head: Head) -> Array:
        """See `LayerwiseModel`.

        A tied head is MaxText's own on some rows of the table at a time: whole, XLA holds the table
        thrice, once of it rounded.
        """
        if not self.config.logits_via_embedding:
            return self._outer(
                "logits",
                lambda model, h: model.decoder.apply_output_head(
                    model.token_embedder, h, True, _MODE, normalize_y=False
                ),
                normed,
            )
        vocabulary = self.config.vocab_size
        rows = -(-vocabulary // -(-vocabulary // _HEAD_ROWS))

        def logits(model: Any, given: tuple[Any, Any]) -> Any:
            import jax

            h, start = given
            table = jax.lax.dynamic_slice_in_dim(model.token_embedder.embedding[...], start, rows)
            # The form in which Linen modules share a table (nnx_decoders.py `apply_output_head`).
            shared = SimpleNamespace(variables={"params": {"embedding": table}})
            with unrounded_head() if head == "unrounded" else contextlib.nullcontext():
                return model.decoder.apply_output_head(shared, h, True, _MODE, normalize_y=False)

        result = np.empty((*normed.shape[:-1], vocabulary), np.float32)
        for begin in range(0, vocabulary, rows):
            start = min(begin, vocabulary - rows)  # one shape: the last slice overlaps
            result[..., start : start + rows] = self._outer(head, logits, (normed, start))
        return result

    def release(self) -> None:
        """See `LayerwiseModel`."""
        self._globals = None
        gc.collect()  # models of both frameworks are part of reference cycles

    def layer(self, number: int, hidden: Array) -> LayerTrace:
        """See `LayerwiseModel`."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        at = number % self._cycle
        name, module = self._modules[at]
        held = {n - at: each for n, (other, each) in enumerate(self._modules) if other == name}

        def place(inside: str) -> tuple[str, int | None] | None:
            for offset, each in held.items():
                found = each.place(("decoder", name, *inside.split(".")))
                if found is not None and found[1] in self._known:
                    return found[1], number + offset
            return None

        graph, abstract = nnx.split(getattr(self._model.decoder, name))
        state = self._fill(abstract, place)
        # Layers of one kind have equal graphs (which are not hashable): each kind compiles once.
        key = graph, module.suffix
        traced = next((f for seen, f in self._traced if seen == key), None)
        if traced is None:
            others = [each.suffix for each in held.values() if each is not module]
            traced = jax.jit(_traced(graph, self._taps, self._kinds[number], module.suffix, others))
            self._traced.append((key, traced))
        found = self._run(traced, state, jnp.asarray(hidden, self.config.dtype))
        jax.tree.map(lambda leaf: leaf.delete(), state)
        arrays = {name: np.asarray(value, np.float32) for name, value in found.items()}
        return LayerTrace(
            arrays["attention"], arrays.get("router"), arrays["experts"], arrays["output"]
        )

    def _outer(self, name: str, function: Callable[[Any, Any], Any], argument: Any) -> Array:
        """Runs a part outside the layers: embedding, final norm, head."""
        import jax
        from flax import nnx

        graph, abstract = nnx.split(self._model)
        if self._globals is None:
            layers = {name for name, _ in self._modules}
            parts = nnx.split_state(
                abstract, lambda path, _: path[0] == "decoder" and path[1] in layers, ...
            )
            outer = self._fill(parts[1], lambda name: (name, None) if name in self._known else None)
            self._globals = outer, parts[0]
        state, layers = self._globals
        if name not in self._jitted:
            # The layers stay shapes: nothing of them is used.
            self._jitted[name] = jax.jit(
                lambda s, x: function(nnx.merge(graph, nnx.merge_state(s, layers)), x)
            )
        return np.asarray(self._run(self._jitted[name], state, argument), np.float32)

    def _run(self, function: Any, state: Any, argument: Any) -> Any:
        import jax
        from flax.core.spmd import logical_axis_rules

        rules = logical_axis_rules(self.config.logical_axis_rules)
        precision = jax.default_matmul_precision("highest")
        with running(), quiet(), precision, jax.set_mesh(self._mesh), rules:
            return jax.block_until_ready(function(state, argument))

    def _fill(self, abstract: Any, place: Callable[[str], tuple[str, int | None] | None]) -> Any:
        """A state with its parameters read; random streams, never drawn from, are 0.

        `place` says which parameter of which layer a name in the state is, if any.

        What the block declares is a parameter, also where MaxText keeps it in a variable of another
        class (layers/moe.py `MoEBiasVar`).
        """
        import jax
        from flax import nnx

        declared = nnx.Any(nnx.Param, lambda path, _: place(dotted(path)) is not None)
        parameters, streams, rest = nnx.split_state(abstract, declared, nnx.RngState, ...)
        if unknown := [dotted(path) for path, _ in nnx.to_flat_state(rest)]:
            raise UnsupportedError(f"MaxText's layer keeps state besides parameters: {unknown}.")
        filled = []
        for path, variable in nnx.to_flat_state(parameters):
            name, leaf = dotted(path), variable.get_value()
            value = self._read(*(place(name) or (name, None)))
            if leaf.shape != value.shape:
                raise TensorError(
                    f"{name} has shape {list(value.shape)} in the checkpoint, but MaxText "
                    f"builds {list(leaf.shape)} from the run's config."
                )
            filled.append((path, variable.replace(value=jax.device_put(value))))
        return nnx.merge_state(nnx.from_flat_state(filled), jax.tree.map(zeros, streams))


def _positions(tokens: Any) -> Any:
    import jax.numpy as jnp

    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape[:2])


class _Tap:
    """Stands where a part of a layer stood and keeps what it returned."""

    def __init__(self, part: Any, name: str, kept: dict[str, Any]) -> None:
        self._part, self._name, self._kept = part, name, kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._part(*args, **kwargs)
        self._kept[self._name] = result[0] if isinstance(result, tuple) else result
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def _traced(
    graph: Any, taps: Taps, kind: LayerKind, suffix: str, others: Collection[str]
) -> Callable[[Any, Any], dict[str, Any]]:
    """The function to jit: a layer with taps on attention, router and experts.

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
        places["router"] = f"{mlp}.{taps.router}"

    def run(state: Any, hidden: Any) -> dict[str, Any]:
        layer = nnx.merge(graph, state)
        kept: dict[str, Any] = {}
        owners = {name: _owner(layer, place) for name, place in places.items()}
        for name, (owner, attribute) in owners.items():
            # Past flax, which would take the tap for state of the model.
            object.__setattr__(owner, attribute, _Tap(getattr(owner, attribute), name, kept))
        for other in others:
            # The residual passes; attention also returns a cache.
            silent = {taps.attention: lambda h, *_, **__: (jnp.zeros_like(h), None)}
            silent[mlp] = lambda h, *_, **__: jnp.zeros_like(h)
            for name, part in silent.items():
                object.__setattr__(layer, name + other, part)
        segments = jnp.ones(hidden.shape[:2], jnp.int32)
        result = layer(hidden, segments, _positions(hidden), True, _MODE)
        kept["output"] = result[0] if isinstance(result, tuple) else result
        return kept

    return run


def _owner(layer: Any, place: str) -> tuple[Any, str]:
    """The module that has a submodule as an attribute, and the attribute."""
    *above, attribute = place.split(".")
    for name in above:
        layer = getattr(layer, name)
    return layer, attribute
