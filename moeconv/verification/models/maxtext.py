"""MaxText's own forward pass over a checkpoint, on CPU: the reference of every parity claim.

Nothing here knows how a model is mapped: the model is built by MaxText from MaxText's keys, the
weights are restored by MaxText's own loader, and no parameter is ever initialised, so logits can
come from the checkpoint only. The one liberty taken with MaxText is `unrounded_head`.
"""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.errors import (
    ConfigError,
    MissingPackageError,
    MoeconvError,
    NotACheckpointError,
    TensorError,
    UsageError,
    to_install,
)
from moeconv.maxtext.checkpoint import UNUSED
from moeconv.orbax.arrays import Arrays
from moeconv.orbax.database import MANIFEST
from moeconv.orbax.locate import METADATA
from moeconv.orbax.metadata import Tree, read_tree
from moeconv.orbax.store import Folder
from moeconv.orbax.trees import PARAMS, is_adapter
from moeconv.verification.boundary import blaming
from moeconv.verification.models.maxtext_config import build_config, quiet
from moeconv.verification.models.maxtext_head import Head, unrounded_head


class MaxTextModel:
    """A MaxText model on one CPU device, holding the weights of one checkpoint."""

    def __init__(self, config: Any, mesh: Any, graph: Any, state: Any) -> None:
        self.config = config
        self._mesh = mesh
        self._graph = graph
        self._state = state
        self._forwards: dict[Head, Any] = {}

    @classmethod
    def load(
        cls, items: str | Path, config: Mapping[str, object] | Path, *, dtype: str = "float32"
    ) -> "MaxTextModel":
        """Build the model that `config` describes and restore its weights from `items`.

        Args:
            items: The `items` directory of a checkpoint step: full train state or parameters only.
            config: MaxText keys, a run's overrides or its whole resolved config. Keys that do not
                decide what the model computes (devices, data, optimizer, paths) are ignored. A
                `capacity_factor` above 0 is honoured, so that it drops tokens here as in training.
                A path is read by MaxText itself, as it reads the config of a run.
            dtype: What activations are computed in; weights are held in float32.
        """
        # Orbax resolves a relative path against its own idea of a root.
        items = Path(items).absolute()
        if not (items / "_METADATA").is_file():
            raise NotACheckpointError(
                f"{items} is not the items directory of a MaxText checkpoint: it has no _METADATA."
            )
        if importlib.util.find_spec("maxtext") is None:
            raise MissingPackageError(f"MaxText is not installed; {to_install('train')}")
        import jax

        # XLA reads its flags and its log level once, here, before MaxText changes both.
        jax.devices()
        with quiet():
            built = build_config(config, dtype)
            mesh, graph, abstract = abstract_model(built)
            state = _restore(items, abstract, built.param_scan_axis)
        return cls(built, mesh, graph, state)

    @property
    def version(self) -> str:
        """MaxText's own version."""
        return importlib.metadata.version("maxtext")

    def parameter(self, name: str) -> np.ndarray:
        """A parameter by its dotted name below `params.params`, in float32."""
        return np.asarray(self._parameters[name].get_value(), np.float32)

    def add(self, name: str, change: np.ndarray) -> None:
        """Adds to a parameter, by its dotted name: in float64, rounded once to float32."""
        import jax

        variable = self._parameters[name]
        value = np.asarray(variable.get_value(), np.float64) + change
        variable.set_value(jax.device_put(value.astype(np.float32)))

    @cached_property
    def _parameters(self) -> dict[str, Any]:
        from flax import nnx

        return {dotted(path): variable for path, variable in nnx.to_flat_state(self._state)}

    def logits(self, tokens: np.ndarray, *, head: Head = "stock") -> np.ndarray:
        """Return the float32 logits [B, T, V] of `tokens` [B, T]: causal, one segment a row.

        Args:
            tokens: Integer ids, each below the vocabulary size.
            head: "stock" is MaxText unmodified. "unrounded" takes out the rounding to bfloat16 of
                a tied embedding table in the output matmul; without tying the two are the same.
        """
        import jax
        import jax.numpy as jnp
        from flax.core.spmd import logical_axis_rules

        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise UsageError(
                f"Tokens must be integers [B, T], not {tokens.dtype} {list(tokens.shape)}."
            )
        # Past the end of the table MaxText reads its last row and says nothing.
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise UsageError(
                f"Tokens reach from {tokens.min()} to {tokens.max()}, "
                f"but the model has {self.config.vocab_size} of them."
            )
        if not self.config.logits_via_embedding:
            head = "stock"
        if head not in self._forwards:
            self._forwards[head] = jax.jit(_forward(self._graph, head))
        rules = logical_axis_rules(self.config.logical_axis_rules)
        precision = jax.default_matmul_precision("highest")
        with running(), quiet(), precision, jax.set_mesh(self._mesh), rules:
            result = self._forwards[head](self._state, jnp.asarray(tokens, jnp.int32))
        return np.asarray(result, np.float32)


def _forward(graph: Any, head: Head) -> Callable[[Any, Any], Any]:
    """The function to jit; a new one for each head, since jax traces one function only once."""
    import jax.numpy as jnp
    from flax import nnx

    def forward(state: Any, tokens: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        with unrounded_head() if head == "unrounded" else contextlib.nullcontext():
            return nnx.merge(graph, state)(
                decoder_input_tokens=tokens,
                decoder_positions=positions,
                decoder_segment_ids=jnp.ones_like(tokens),
                enable_dropout=False,
            )

    return forward


def running() -> contextlib.AbstractContextManager[None]:
    """Whatever MaxText and XLA raise while they compute, as one sentence."""
    return blaming("MaxText cannot run the model of this config", ConfigError)


def abstract_model(config: Any) -> tuple[Any, Any, Any]:
    """The mesh of one CPU device, the model's graph, and its state as shapes only."""
    import jax
    from flax import nnx
    from maxtext.utils import maxtext_utils, model_creation_utils

    mesh = maxtext_utils.get_mesh_from_config(config, jax.devices("cpu")[:1])
    with blaming("MaxText cannot build the model of this config", ConfigError):
        _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
    graph, abstract = nnx.split(model)
    return mesh, graph, abstract


def built_tree(config: Path) -> tuple[str, dict[str, tuple[int, ...]]]:
    """MaxText's version, and the variables of the model that it builds from a config file.

    Returns:
        Shapes by dotted name, without the random streams. No value is made.
    """
    import jax
    from flax import nnx

    jax.devices()
    with quiet():
        _, _, abstract = abstract_model(build_config(config, "float32"))
    parameters, _, rest = nnx.split_state(abstract, nnx.Param, nnx.RngState, ...)
    both = (*nnx.to_flat_state(parameters), *nnx.to_flat_state(rest))
    shapes = {dotted(path): tuple(variable.get_value().shape) for path, variable in both}
    return importlib.metadata.version("maxtext"), shapes


def _restore(items: Path, abstract: Any, scan_axis: int) -> Any:
    """The model's state, every variable from `items`; random streams, never drawn from, are 0."""
    import jax
    from flax import nnx
    from maxtext.common import checkpointing

    parameters, streams, rest = nnx.split_state(abstract, nnx.Param, nnx.RngState, ...)
    folder = Folder.open(items)
    tree = read_tree(folder)
    others = _read(folder, tree, rest, scan_axis) if nnx.to_flat_state(rest) else rest
    if not _is_loaded_by_maxtext(folder, tree):
        restored = _read(folder, tree, parameters)
        return nnx.merge_state(restored, others, jax.tree.map(zeros, streams))
    wanted = {dotted(path) for part in (parameters, rest) for path, _ in nnx.to_flat_state(part)}
    try:
        stored = _stored_parameters(items)
        restored = checkpointing.load_params_from_path(
            str(items), parameters, checkpoint_storage_concurrent_gb=8
        )
    except MoeconvError:
        raise
    except Exception as error:
        raise TensorError(f"MaxText cannot load {items}: {error}") from error
    # MaxText only logs what it leaves unread.
    unread = sorted(
        name
        for name in stored - wanted
        if name.split(".")[0] not in UNUSED and not is_adapter(tuple(name.split(".")))
    )
    if unread:
        raise TensorError(
            f"{items} holds parameters that the model of the run's config does not have: "
            + ", ".join(unread)
        )
    for path, variable in nnx.to_flat_state(restored):
        value = variable.get_value()
        if not isinstance(value, jax.Array):
            raise TensorError(f"{items} holds no {dotted(path)}.")
    return nnx.merge_state(restored, others, jax.tree.map(zeros, streams))


def _is_loaded_by_maxtext(items: Folder, tree: Tree) -> bool:
    """True if MaxText's loader of parameters takes it: an NNX state or another item it does not.

    Source: common/checkpointing.py `load_params_from_path`, which reads `params` of `items`, or of
    a bare tree, whose OCDBT store is merged, by the names that the model has.
    """
    return (
        tree.root == ("params", "params")
        and all(leaf.stored[2:] == leaf.path for leaf in tree.model if leaf.collection == PARAMS)
        and (items.name == "items" or not items.parent.has(METADATA))
        and (items.has(MANIFEST) or not tree.use_ocdbt)
    )


def _read(folder: Folder, tree: Tree, variables: Any, scan_axis: int | None = None) -> Any:
    """Variables read as arrays of their names, where MaxText's loader does not look for them.

    So are those that are no `nnx.Param`, such as a router's bias (layers/moe.py `MoEBiasVar`). It
    may be in a train state's `nnx_aux`; layers are then stacked on axis 0 (layers/nnx_scan.py).

    Args:
        folder: The item.
        tree: What it holds.
        variables: As shapes.
        scan_axis: Of variables that are no parameters: where layers are if they were when saved.
    """
    import jax
    from flax import nnx

    arrays, filled = Arrays(folder, tree), []
    for path, variable in nnx.to_flat_state(variables):
        name, leaf = dotted(path), variable.get_value()
        if name not in arrays.info:
            raise TensorError(f"{folder} holds no {name}.")
        shape = arrays.info[name].shape
        value = arrays.reader(name).read(tuple(slice(0, n) for n in shape))
        if scan_axis is not None and value.shape != leaf.shape and value.ndim > scan_axis:
            value = np.moveaxis(value, scan_axis, 0)
        if value.shape != leaf.shape:
            raise TensorError(f"{name} has shape {list(shape)}, not {list(leaf.shape)}.")
        filled.append((path, variable.replace(value=jax.device_put(value.astype(leaf.dtype)))))
    return nnx.from_flat_state(filled)


def _stored_parameters(items: Path) -> set[str]:
    """Dotted names of all parameters that the checkpoint holds."""
    from flax import nnx
    from orbax.checkpoint import v1 as ocp

    # As the loader does: a bare tree, which Orbax of old wrote, has no step directory around it.
    root, name = (items.parent, "items") if items.name == "items" else (items, None)
    tree = ocp.metadata(root, checkpointable_name=name).metadata
    collections = tree.get("params") if isinstance(tree, Mapping) else None
    if not isinstance(collections, Mapping) or "params" not in collections:
        raise NotACheckpointError(f"{items} holds no params.params, so it is not from MaxText.")
    return {
        dotted(path)
        for collection in collections.values()
        for path in nnx.traversals.flatten_mapping(collection)
    }


def dotted(path: tuple[object, ...]) -> str:
    """A key path as one name."""
    return ".".join(str(part) for part in path)


def zeros(leaf: Any) -> Any:
    """Zeros, or a fixed key, of a leaf's shape."""
    import jax
    import jax.numpy as jnp

    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)
