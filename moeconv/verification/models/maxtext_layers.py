"""MaxText's own layers, one at a time: the reference for models larger than memory.

The model is built by MaxText, unscanned and as shapes only, so that MaxText itself says which kind
layer n is; a layer gets its arrays when it is its turn, and gives them up with the next.
"""

import contextlib
import gc
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from moeconv.arch.layout import Layout
from moeconv.arch.stacks import CYCLED
from moeconv.errors import MissingPackageError, TensorError, UnsupportedError, to_install
from moeconv.tensor.axes import Array
from moeconv.verification.models.expert_groups import Groups
from moeconv.verification.models.layerwise import LayerTrace
from moeconv.verification.models.maxtext import abstract_model, dotted, running, zeros
from moeconv.verification.models.maxtext_beside import Beside
from moeconv.verification.models.maxtext_config import build_config, quiet
from moeconv.verification.models.maxtext_experts import GroupedLayer, expert_parameters
from moeconv.verification.models.maxtext_head import Head, unrounded_head
from moeconv.verification.models.maxtext_taps import MODE, positions, traced_layer


class ReadParameter(Protocol):
    """Gives a parameter by its logical name (arch/parameters.py) and layer, as float32."""

    def __call__(self, parameter: str, layer: int | None, experts: slice | None = None, /) -> Array:
        """The parameter on its own axes; with `experts` only these entries of its axis `E`."""
        ...


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
        self._read, self._block, self._kinds = read, layout.block, layout.kinds
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
        self._beside = Beside()
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
            return decoder._apply_embedding(model.token_embedder, ids, positions(ids), True, MODE)

        def further(model: Any, given: tuple[Any, Any]) -> Any:
            return getattr(model.decoder, place)(*given)

        ids, place = jnp.asarray(tokens, jnp.int32), self._block.taps.further
        embedded = self._outer("embed", embed, ids)
        self._beside.start(self._outer("further", further, (ids, embedded)) if place else None)
        return embedded

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
                    model.token_embedder, h, True, MODE, normalize_y=False
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
                return model.decoder.apply_output_head(shared, h, True, MODE, normalize_y=False)

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
        names = expert_parameters(self._block, self._kinds[number])
        experts, rest = nnx.split_state(abstract, lambda path, _: dotted(path) in names, ...)
        groups = _groups(experts)
        state = self._fill(rest if groups else abstract, place)
        # Layers of one kind have equal graphs (which are not hashable): each kind compiles once.
        key = graph, module.suffix
        traced = next((f for seen, f in self._traced if seen == key), None)
        if traced is None:
            args = self._block.taps, self._kinds[number]
            if groups:
                traced = GroupedLayer(graph, experts, *args, groups)
            else:
                others = [each.suffix for each in held.values() if each is not module]
                traced = jax.jit(traced_layer(graph, *args, module.suffix, others))
            self._traced.append((key, traced))
        inputs = jnp.asarray(hidden, self.config.dtype)
        if groups:
            found = traced(self._run, state, lambda part: self._fill(experts, place, part), inputs)
        else:
            layer = getattr(self._model.decoder, name)
            given = self._beside.given(layer, number, len(hidden))
            found = self._run(traced, state, inputs, given)
            self._beside.keep(layer, found)
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

    def _run(self, function: Any, *arguments: Any) -> Any:
        import jax
        from flax.core.spmd import logical_axis_rules

        rules = logical_axis_rules(self.config.logical_axis_rules)
        precision = jax.default_matmul_precision("highest")
        with running(), quiet(), precision, jax.set_mesh(self._mesh), rules:
            return jax.block_until_ready(function(*arguments))

    def _fill(
        self,
        abstract: Any,
        place: Callable[[str], tuple[str, int | None] | None],
        experts: slice | None = None,
    ) -> Any:
        """A state with its parameters read; random streams, never drawn from, are 0.

        `place` says which parameter of which layer a name in the state is, if any. With `experts`
        the first axis, which is theirs, has these only.

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
            name, wanted = dotted(path), variable.get_value().shape
            value = self._read(*(place(name) or (name, None)), experts)
            if experts is not None:
                wanted = (len(range(wanted[0])[experts]), *wanted[1:])
            if wanted != value.shape:
                raise TensorError(
                    f"{name} has shape {list(value.shape)} in the checkpoint, but MaxText "
                    f"builds {list(wanted)} from the run's config."
                )
            filled.append((path, variable.replace(value=jax.device_put(value))))
        return nnx.merge_state(nnx.from_flat_state(filled), jax.tree.map(zeros, streams))


def _groups(experts: Any) -> Groups | None:
    """Of the state of a layer's expert parameters, as shapes."""
    import jax

    shapes = [leaf.shape for leaf in jax.tree.leaves(experts)]
    if not shapes:
        return None
    return Groups.of(shapes[0][0], sum(math.prod(shape) for shape in shapes))
