"""MaxText's own forward pass over a checkpoint, on CPU: the reference of every parity claim.

Nothing here knows how a model is mapped: the model is built by MaxText from MaxText's keys, the
weights are restored by MaxText's own loader, and no parameter is ever initialised, so logits can
come from the checkpoint only. The one liberty taken with MaxText is `_unrounded_head`.
"""

import contextlib
import enum
import importlib.metadata
import importlib.util
import inspect
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moeconv.errors import (
    ConfigError,
    MoeconvError,
    NotACheckpointError,
    TensorError,
    UnsupportedError,
    UsageError,
)

Head = Literal["stock", "unrounded"]

# The groups of MaxText's config (classes of maxtext.configs.types) that say what is computed ...
_MODEL_GROUPS = (
    "ModelArchitecture",
    "Engram",
    "MTP",
    "LogitsAndLoss",
    "Attention",
    "MlaAttention",
    "MoBa",
    "CompressedAttention",
    "AttentionIndexer",
    "Llama4Attention",
    "DeepSeekMoE",
    "Qwen3Next",
    "ManifoldConstrainedHyperConnections",
    "PositionalEmbedding",
    "Rope",
    "YarnRope",
)
# ... with the members that say how fast, and on what, which stay at MaxText's defaults ...
_MACHINE_KEYS = frozenset(
    {
        "attention",
        "use_ragged_attention",
        "ragged_block_size",
        "use_tokamax_splash",
        "use_jax_splash",
        "force_q_layout",
        "use_qk_clip",
        "num_vocab_tiling",
        "vocab_tiling_ag_once",
        "defer_small_all_reduces",
        "log_moe_bias_norms",
        "log_step_diagnostics",
        "use_batch_split_schedule",
        "batch_split_factor",
        "use_lineage",
        "routed_bias_update_rate",
        "use_mhc_pallas_kernel",
    }
)
# ... and the members of mixed groups that belong to the model.
_MODEL_KEYS = frozenset(
    {
        "model_name",
        "vocab_size",
        "scan_layers",
        "param_scan_axis",
        "inhomogeneous_layer_cycle_interval",
        "max_target_length",
        "num_experts",
        "num_experts_per_tok",
        "capacity_factor",
        "base_moe_mlp_dim",
        "padded_base_moe_mlp_dim",
        "moe_expert_input_dim",
        "interleave_moe_layer_step",
        "norm_topk_prob",
        "float32_weight_sum",
        "float32_gate_logits",
        "prefuse_moe_weights",
        "fuse_expert_scales",
    }
)
# Derived by MaxText from base_* and global_parameter_scale; if given, they must come out the same.
_DERIVED_DIMENSIONS = (
    "emb_dim",
    "num_query_heads",
    "num_kv_heads",
    "mlp_dim",
    "moe_mlp_dim",
    "num_decoder_layers",
)
# An enum's member as str() writes it: DecoderBlockType.MIXTRAL, for mixtral.
_ENUM = re.compile(r"[A-Z][A-Za-z]+Type\.([A-Z0-9_]+)")
# One CPU device, every expert for every token, full fp32 products; nothing read, nothing written.
_EVALUATION = {
    "override_model_config": True,
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "run_name": "moeconv-verify",
    "base_output_directory": "/nonexistent/moeconv-verify",
    "enable_checkpointing": False,
    "dataset_type": "synthetic",
    "jax_cache_dir": "",
    "log_config": False,
    "per_device_batch_size": 1,
    "attention": "dot_product",
    "megablox": False,
    "sparse_matmul": False,
    "matmul_precision": "highest",
    "weight_dtype": "float32",
    "enable_dropout": False,
    "cast_logits_to_fp32": True,
}


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
        cls, items: str | Path, config: Mapping[str, object], *, dtype: str = "float32"
    ) -> "MaxTextModel":
        """Build the model that `config` describes and restore its weights from `items`.

        Args:
            items: The `items` directory of a checkpoint step: full train state or parameters only.
            config: MaxText keys, a run's overrides or its whole resolved config. Keys that do not
                decide what the model computes (devices, data, optimizer, paths) are ignored. A
                `capacity_factor` above 0 is honoured, so that it drops tokens here as in training.
            dtype: What activations are computed in; weights are held in float32.
        """
        # Orbax resolves a relative path against its own idea of a root.
        items = Path(items).absolute()
        if not (items / "_METADATA").is_file():
            raise NotACheckpointError(
                f"{items} is not the items directory of a MaxText checkpoint: it has no _METADATA."
            )
        if importlib.util.find_spec("maxtext") is None:
            raise MoeconvError('MaxText is not installed: pip install "moeconv[train]".')
        import jax

        # XLA reads its flags and its log level once, here, before MaxText changes both.
        jax.devices()
        with _quiet():
            built = _build_config(config, dtype)
            mesh, graph, abstract = _abstract_model(built)
            state = _restore(items, abstract)
        return cls(built, mesh, graph, state)

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
        with _quiet(), precision, jax.set_mesh(self._mesh), rules:
            result = self._forwards[head](self._state, jnp.asarray(tokens, jnp.int32))
        return np.asarray(result, np.float32)


def _forward(graph: Any, head: Head) -> Callable[[Any, Any], Any]:
    """The function to jit; a new one for each head, since jax traces one function only once."""
    import jax.numpy as jnp
    from flax import nnx

    def forward(state: Any, tokens: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        with _unrounded_head() if head == "unrounded" else contextlib.nullcontext():
            return nnx.merge(graph, state)(
                decoder_input_tokens=tokens,
                decoder_positions=positions,
                decoder_segment_ids=jnp.ones_like(tokens),
                enable_dropout=False,
            )

    return forward


def _build_config(config: Mapping[str, object], dtype: str) -> Any:
    """MaxText's resolved config for evaluating the model that `config` describes."""
    from maxtext.configs import pyconfig, types

    if config.get("quantization"):
        raise UnsupportedError(
            f"The run's config has quantization: {config['quantization']}; "
            "only models that compute unquantised can be evaluated."
        )
    wanted = set(_MODEL_KEYS)
    for group in _MODEL_GROUPS:
        wanted |= set(getattr(types, group).model_fields)
    wanted = (wanted - _MACHINE_KEYS) & set(types.MaxTextConfig.model_fields)
    overrides = {key: _plain(value) for key, value in config.items() if key in wanted}
    overrides |= _EVALUATION | {"dtype": dtype}
    base = str(Path(pyconfig.__file__).with_name("base.yml"))
    try:
        with _flags_kept():
            built = pyconfig.initialize(["", base], **overrides)
    except (Exception, SystemExit) as error:  # outside of pytest MaxText exits
        cause = (error.__context__ or error) if isinstance(error, SystemExit) else error
        raise ConfigError(f"MaxText does not accept the run's config: {cause}") from cause
    wrong = [
        f"{key}: {config[key]} given, {built.get_keys()[key]} derived"
        for key in _DERIVED_DIMENSIONS
        if config.get(key) is not None and config[key] != built.get_keys()[key]
    ]
    if wrong:
        raise ConfigError(
            "The run's config contradicts itself; give the base_* keys: " + "; ".join(wrong)
        )
    return built


def _plain(value: object) -> object:
    """A value of MaxText's resolved config as its YAML would have it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str) and (member := _ENUM.fullmatch(value)):
        return member[1].lower()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _abstract_model(config: Any) -> tuple[Any, Any, Any]:
    """The mesh of one CPU device, the model's graph, and its state as shapes only."""
    import jax
    from flax import nnx
    from maxtext.utils import maxtext_utils, model_creation_utils

    mesh = maxtext_utils.get_mesh_from_config(config, jax.devices("cpu")[:1])
    try:
        _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"MaxText cannot build the model of this config: {error}") from error
    graph, abstract = nnx.split(model)
    return mesh, graph, abstract


def _restore(items: Path, abstract: Any) -> Any:
    """The model's state, every parameter from `items`; random streams, never drawn from, are 0."""
    import jax
    from flax import nnx
    from maxtext.common import checkpointing

    parameters, streams, rest = nnx.split_state(abstract, nnx.Param, nnx.RngState, ...)
    if unknown := [_dotted(path) for path, _ in nnx.to_flat_state(rest)]:
        raise UnsupportedError(f"The model keeps state besides parameters: {', '.join(unknown)}.")
    wanted = {_dotted(path) for path, _ in nnx.to_flat_state(parameters)}
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
    if unread := sorted(stored - wanted):
        raise TensorError(
            f"{items} holds parameters that the model of the run's config does not have: "
            + ", ".join(unread)
        )
    for path, variable in nnx.to_flat_state(restored):
        value = variable.get_value()
        if not isinstance(value, jax.Array):
            raise TensorError(f"{items} holds no {_dotted(path)}.")
    return nnx.merge_state(restored, jax.tree.map(_zeros, streams))


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
        _dotted(path)
        for collection in collections.values()
        for path in nnx.traversals.flatten_mapping(collection)
    }


def _dotted(path: tuple[object, ...]) -> str:
    return ".".join(str(part) for part in path)


def _zeros(leaf: Any) -> Any:
    import jax
    import jax.numpy as jnp

    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


@contextlib.contextmanager
def _unrounded_head() -> Iterator[None]:
    """While the forward is traced, take the rounding of the tied table out of the output matmul.

    MaxText's `attend_on_embedding` casts the table to bfloat16 whatever `dtype` is; the decoder
    calls it by the name that it imported, the one place replaced here. A patch that no longer bites
    would make the two heads agree for the wrong reason: so the cast must be where it was, and the
    replacement must be called.
    """
    import jax.numpy as jnp
    from maxtext.layers import embeddings, nnx_decoders

    stock = embeddings.attend_on_embedding
    calls = 0

    def attend(query: Any, table: Any, dtype: Any, config: Any, out_sharding: Any = None) -> Any:
        nonlocal calls
        calls += 1
        return jnp.dot(query, jnp.asarray(table, dtype).T, preferred_element_type=dtype)

    moved = UnsupportedError(
        f"MaxText {importlib.metadata.version('maxtext')} computes its tied output head differently"
        " from 0.2.5: the rounding to bfloat16 cannot be taken out. Install maxtext==0.2.5."
    )
    source = inspect.getsource(stock)
    if (
        source.count("bfloat16") != 1
        or "jnp.asarray(embedding_table, jnp.bfloat16).T" not in source
    ):
        raise moved
    if getattr(nnx_decoders, stock.__name__, None) is not stock:
        raise moved
    nnx_decoders.attend_on_embedding = attend
    try:
        yield
    finally:
        nnx_decoders.attend_on_embedding = stock
    if calls != 1:
        raise moved


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence logs below CRITICAL, stdout and warnings: MaxText and Orbax report every step."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _flags_kept() -> Iterator[None]:
    """Undo MaxText's config setting XLA_FLAGS, where none were set, to dump into /tmp/xla_dump."""
    before = os.environ.get("XLA_FLAGS")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("XLA_FLAGS", None)
