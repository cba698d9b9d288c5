"""Real MaxText checkpoints, small and fast: MaxText builds the model and saves it, the lab only
chooses the weights.

The weights depend on the seed, the layer and the parameter's name, not on the layout: one seed
gives one model whether it is scanned or not, sharded or not, a train state or parameters only.
"""

import contextlib
import functools
import logging
import os
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np

from moeconv.families import blocks

# Every test model differs from this only where it says so.
BASE: Mapping[str, object] = {
    "base_emb_dim": 48,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 16,
    "base_mlp_dim": 96,
    "base_moe_mlp_dim": 96,
    "base_num_decoder_layers": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 160,
    "max_target_length": 64,
    "rope_max_timescale": 500_000,
    "normalization_layer_epsilon": 1e-5,
    "dtype": "float32",
    "weight_dtype": "float32",
}
MIXTRAL: Mapping[str, object] = {"decoder_block": "mixtral"}
ENVY: Mapping[str, object] = {
    "decoder_block": "envy",
    "interleave_moe_layer_step": 2,
    "inhomogeneous_layer_cycle_interval": 2,
    "use_qk_norm": False,
    "use_post_ffw_norm": False,
    "base_mlp_dim": 80,
}
LLAMA2: Mapping[str, object] = {"decoder_block": "llama2", "num_experts": 1}
MISTRAL: Mapping[str, object] = {"decoder_block": "mistral", "num_experts": 1}
QWEN2: Mapping[str, object] = {
    "decoder_block": "qwen2",
    "num_experts": 1,
    "attention_bias": True,
}
QWEN3: Mapping[str, object] = {"decoder_block": "qwen3", "num_experts": 1, "use_qk_norm": True}
QWEN3_MOE: Mapping[str, object] = {
    "decoder_block": "qwen3_moe",
    "use_qk_norm": True,
    "norm_topk_prob": True,
}
# All sizes of a head differ, and the widths; routing hangs on the name (layers/moe.py `get_topk`).
DEEPSEEK_V3: Mapping[str, object] = {
    "decoder_block": "deepseek",
    "model_name": "deepseek3-671b",
    "override_model_config": True,
    "attention_type": "mla",
    "base_num_kv_heads": 4,
    "q_lora_rank": 28,
    "kv_lora_rank": 26,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "base_mlp_dim": 80,
    "base_moe_mlp_dim": 20,
    "first_num_dense_layers": 1,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "shared_experts": 2,
    "routed_score_func": "sigmoid",
    "routed_bias": True,
    "routed_scaling_factor": 2.5,
    "n_routing_groups": 4,
    "topk_routing_group": 2,
    "normalization_layer_epsilon": 1e-6,
    "rope_type": "yarn",
    # The range that YaRN corrects is 1.2 to 3.1 of 4 pairs, rounded 1 to 4.
    "rope_max_timescale": 20,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "rope_factor": 4,
    "beta_fast": 4,
    "mscale": 0.8,
}
# Kimi-K2: no groups, and YaRN corrects from one rotation to one.
KIMI_K2: Mapping[str, object] = {
    **DEEPSEEK_V3,
    "model_name": "kimi-k2-1t",
    "n_routing_groups": -1,
    "topk_routing_group": -1,
    "beta_fast": 1,
}
DEEPSEEK_V2: Mapping[str, object] = {
    **KIMI_K2,
    "model_name": "deepseek2-16b",
    "q_lora_rank": 0,
    "routed_score_func": "softmax",
    "routed_bias": False,
    "beta_fast": 4,
}
# With these numbers the range that YaRN corrects is 1.4 to 3.5 of the 8 pairs, so each counts.
YARN: Mapping[str, object] = {
    "rope_type": "yarn",
    "rope_max_timescale": 200,
    "rope_factor": 4.0,
    "original_max_position_embeddings": 64,
    "max_position_embeddings": 256,
    "beta_fast": 4,
    "beta_slow": 1,
    "rope_interleave": False,
    "rope_truncate": False,
    "rope_attention_scaling": True,
}
GPT_OSS: Mapping[str, object] = {
    "decoder_block": "gpt_oss",
    "sliding_window_size": 8,
    "attention_bias": True,
    "attention_sink": True,
    "mlp_bias": True,
    "routed_bias": True,
    "mlp_activations": ["sigmoid", "linear"],
    "mlp_activations_limit": 1.5,  # so that it clips
    "inhomogeneous_layer_cycle_interval": 2,
    **YARN,
}
LLAMA4: Mapping[str, object] = {
    "decoder_block": "llama4",
    "base_num_decoder_layers": 8,
    "base_mlp_dim": 80,
    "num_experts_per_tok": 1,
    "shared_experts": 1,
    "use_qk_norm": True,
    "nope_layer_interval": 4,
    "interleave_moe_layer_step": 2,
    "inhomogeneous_layer_cycle_interval": 4,
    "temperature_tuning": True,
    "chunk_attn_window_size": 16,
    "rope_type": "llama3.1",
}
# The QK norm is over all heads only under such a name (layers/attentions.py `Attention`).
OLMO3: Mapping[str, object] = {
    "decoder_block": "olmo3",
    "model_name": "olmo3-7b",
    "override_model_config": True,
    "num_experts": 1,
    "base_num_decoder_layers": 8,
    "use_qk_norm": True,
    "sliding_window_size": 8,
    "inhomogeneous_layer_cycle_interval": 4,
    "normalize_embedding_logits": True,
    **YARN,
    "rope_truncate": True,
}
# Caps that bend scores and logits of about 1.
GEMMA: Mapping[str, object] = {
    "decoder_block": "gemma",
    "num_experts": 1,
    "mlp_activations": ["gelu", "linear"],
    "normalization_layer_epsilon": 1e-6,
}
_GEMMA_POST_NORMS: Mapping[str, object] = {
    **GEMMA,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "sliding_window_size": 8,
    "final_logits_soft_cap": 1.5,
}
# Two layers a module.
GEMMA2: Mapping[str, object] = {
    **_GEMMA_POST_NORMS,
    "decoder_block": "gemma2",
    "base_num_decoder_layers": 2,
    "attn_logits_soft_cap": 2.0,
}
# MaxText builds it under a few names only (models/gemma3.py `get_query_pre_attn_scalar`). Two
# layers are behind the scanned block of six.
GEMMA3: Mapping[str, object] = {
    **_GEMMA_POST_NORMS,
    "decoder_block": "gemma3",
    "model_name": "gemma3-4b",
    "override_model_config": True,
    "base_num_decoder_layers": 8,
    "logits_via_embedding": False,
    "rope_max_timescale": 200,
    "local_rope_max_timescale": 50,
    "rope_linear_scaling_factor": 4.0,
}
TIED: Mapping[str, object] = {"logits_via_embedding": True}
# On CPU; not part of the model, so not part of LabCheckpoint.config.
_MACHINE: Mapping[str, object] = {
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "enable_checkpointing": True,
    "async_checkpointing": False,
    "checkpoint_period": 1,
    "dataset_type": "synthetic",
    "jax_cache_dir": "",
    "log_config": False,
    "per_device_batch_size": 1,
    "steps": 1000,
    "attention": "dot_product",
    "megablox": False,
    "sparse_matmul": False,
    "override_model_config": True,
    "ici_fsdp_parallelism": 1,
}


@dataclass(frozen=True)
class LabCheckpoint:
    """A checkpoint on disk, with what went into it."""

    run_dir: Path
    step_dir: Path
    # The overrides that made the model, BASE included; as a user's YAML would have them.
    config: Mapping[str, object]
    # What MaxText made of them: config.get_keys(), all 865.
    resolved: Mapping[str, object] = field(repr=False)
    # What was stored of the model, by dotted name, in the stored dtype.
    params: Mapping[str, np.ndarray] = field(repr=False)
    seconds: float = 0.0

    @property
    def items(self) -> Path:
        return self.step_dir / "items"


class Lab:
    """Writes each checkpoint once a session."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._written: dict[str, LabCheckpoint] = {}

    def checkpoint(
        self,
        *overrides: Mapping[str, object],
        full_state: bool = False,
        step: int = 0,
        seed: int = 0,
    ) -> LabCheckpoint:
        """The checkpoint of BASE with `overrides` (later ones win); do not write into it."""
        merged = {key: value for part in overrides for key, value in part.items()}
        key = repr((sorted(merged.items()), full_state, step, seed))
        if key not in self._written:
            name = f"{merged.get('decoder_block', 'default')}-{len(self._written):03d}"
            self._written[key] = write_checkpoint(
                self.root / name, merged, full_state=full_state, step=step, seed=seed
            )
        return self._written[key]


def write_checkpoint(
    run_dir: Path,
    overrides: Mapping[str, object],
    *,
    full_state: bool = False,
    step: int = 0,
    seed: int = 0,
) -> LabCheckpoint:
    """Write `<run_dir>/checkpoints/<step>/items` by MaxText.

    Args:
        run_dir: Becomes <base_output_directory>/<run_name>.
        overrides: MaxText keys over BASE. Those of storage count too: `weight_dtype` (what is
            stored), `checkpoint_storage_use_ocdbt`, `checkpoint_storage_use_zarr3`,
            `param_scan_axis`, and `ici_*_parallelism` (as many devices are used; by default one,
            so that each array is one chunk).
        full_state: A whole train state (weights, Adam, step, random streams) as training saves it,
            else parameters only.
        step: The step's directory, and the optimizer's count.
        seed: Chooses the model.
    """
    import jax
    from maxtext.common import checkpointing
    from maxtext.utils import maxtext_utils

    start = time.perf_counter()
    given = {**BASE, **overrides}
    with _quiet():
        config = _resolve(run_dir, given)
        axes = [value for key, value in {**_MACHINE, **given}.items() if key.startswith("ici_")]
        count = int(np.prod([int(str(value)) for value in axes]))
        if len(jax.devices()) < count:
            raise RuntimeError(f"{count} devices wanted: XLA_FLAGS of tests/conftest.py is missing")
        mesh = maxtext_utils.get_mesh_from_config(config, jax.devices()[:count])
        state = _train_state(config, mesh, _Weights(config, seed), step)
        params, collections = _params(state), _collections(state)
        step_dir = run_dir / "checkpoints" / str(step)
        ocdbt, zarr3 = config.checkpoint_storage_use_ocdbt, config.checkpoint_storage_use_zarr3
        if full_state:
            manager = checkpointing.create_orbax_checkpoint_manager(
                config.checkpoint_dir, True, False, 1, use_ocdbt=ocdbt, use_zarr3=zarr3
            )
            checkpointing.save_checkpoint(manager, step, state, config, force=True)
            manager.close()
        else:
            tree = {"params": params, **collections}
            checkpointing.save_params_to_path(step_dir, tree, ocdbt, zarr3)
    return LabCheckpoint(
        run_dir=run_dir,
        step_dir=step_dir,
        config=given,
        resolved=dict(config.get_keys()),
        params={
            name: np.asarray(value)
            for part in (params, *collections.values())
            for name, value in _flat(part)
        },
        seconds=time.perf_counter() - start,
    )


def _resolve(run_dir: Path, given: Mapping[str, object]) -> Any:
    """MaxText's config, as its command line would make it."""
    from maxtext.configs import pyconfig

    base = Path(pyconfig.__file__).with_name("base.yml")
    keys = {
        **_MACHINE,
        **given,
        "base_output_directory": str(run_dir.parent),
        "run_name": run_dir.name,
    }
    return pyconfig.initialize(["", str(base)], **keys)


def _train_state(config: Any, mesh: Any, weights: "_Weights", step: int) -> Any:
    """MaxText's train state as its trainer holds it, every leaf filled by us, none initialised."""
    import jax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.common import train_state_nnx
    from maxtext.layers import moe
    from maxtext.utils import maxtext_utils, model_creation_utils, train_utils

    with logical_axis_rules(config.logical_axis_rules):
        create, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
        _, optimizer = train_utils.create_training_optimizer(config, model, mesh=mesh)

    def init() -> Any:
        fresh = create()
        return train_state_nnx.TrainStateNNX(fresh, nnx.Optimizer(fresh, optimizer, wrt=nnx.Param))

    state, _, _ = maxtext_utils.get_abstract_state_nnx(config, mesh, init)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        leaf = variable.get_value()
        name = ".".join(map(str, path))
        if path[0] == "model" and isinstance(variable, nnx.Param | moe.MoEBiasVar):
            parameter = isinstance(variable, nnx.Param)
            value = weights(name.removeprefix("model."), leaf, parameter=parameter)
        elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            value = jax.random.split(jax.random.key(1), leaf.shape) if leaf.shape else _key()
        elif np.issubdtype(leaf.dtype, np.floating):  # Adam's moments: plausible, never the weights
            value = np.full(leaf.shape, 1e-3, leaf.dtype)
        else:  # counters
            value = np.full(leaf.shape, step, leaf.dtype)
        filled.append((path, variable.replace(value=jax.device_put(value, leaf.sharding))))
    return nnx.from_flat_state(filled)


@functools.cache
def _key() -> Any:
    import jax

    return jax.random.key(0)


def _params(state: Any) -> dict[str, Any]:
    from maxtext.common import train_state_nnx

    tree: dict[str, Any] = train_state_nnx.to_checkpoint_dict(state)["params"]["params"]
    return tree


def _collections(state: Any) -> dict[str, Any]:
    """The variables of classes of their own, as MaxText's converter stores them.

    In the Flax collection of each class' name (checkpoint_conversion/to_maxtext.py); a parameters-
    only checkpoint of a train state has none of them.
    """
    from flax import nnx
    from maxtext.layers import moe

    found = nnx.filter_state(state, moe.MoEBiasVar).to_pure_dict()
    return {"MoEBiasVar": found["model"]} if found else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Weights:
    """Values that make every mistake visible.

    Logits come out with a standard deviation near 1, attention and routing are peaked (scores of
    about 2), and no norm scale is 1, so a wrong theta, scale, order or missing fold shows as a
    difference of the logits above 0.1.
    """

    def __init__(self, config: Any, seed: int) -> None:
        self._seed = seed
        self._scan_axis = config.param_scan_axis if config.scan_layers else None
        self._layers = config.num_decoder_layers
        self._dense = config.first_num_dense_layers
        width, heads, head = config.emb_dim, config.num_query_heads, config.head_dim
        folded = blocks()[config.decoder_block.value].query_scale_in_kernel
        normalized = config.normalize_embedding_logits or not config.logits_via_embedding
        self._scale = {
            "query.kernel": 1.5 / np.sqrt(width) / (np.sqrt(head) if folded else 1.0),
            "key.kernel": 1.5 / np.sqrt(width),
            "value.kernel": 1.0 / np.sqrt(width),
            "out.kernel": 1.0 / np.sqrt(heads * head),
            "gate.kernel": 2.0 / np.sqrt(width),
            "wq_a.kernel": 1.0 / np.sqrt(width),
            "wq_b.kernel": 1.5 / np.sqrt(config.q_lora_rank or 1),
            "wkv_a.kernel": 1.5 / np.sqrt(width),
            "wkv_b.kernel": 1.5 / np.sqrt(config.kv_lora_rank),
            ".wi_0": 1.5 / np.sqrt(width),
            ".wi_1": 1.5 / np.sqrt(width),
            ".wo": 1.0 / np.sqrt(config.moe_mlp_dim),
            "wi_0.kernel": 1.5 / np.sqrt(width),
            "wi_1.kernel": 1.5 / np.sqrt(width),
            "wo.kernel": 1.0 / np.sqrt(config.mlp_dim),
            "logits_dense.kernel": 1.0 / np.sqrt(width),
            "token_embedder.embedding": 1.0 if normalized else 1.0 / np.sqrt(width),
        }

    def __call__(self, name: str, leaf: Any, *, parameter: bool = True) -> np.ndarray:
        """The values of variable `name`, which has the shape and dtype of `leaf`."""
        parts = name.split(".")
        # The layers of DeepSeek's two stacks are numbered on.
        first = {"dense_layers": 0, "moe_layers": self._dense}
        if self._scan_axis is not None and parts[0] == "decoder" and parts[1] in first:
            shape, rest = list(leaf.shape), ".".join(parts[2:])
            # layers/nnx_scan.py stacks all but `nnx.Param` on axis 0.
            axis = self._scan_axis if parameter and len(shape) > self._scan_axis else 0
            length = shape.pop(axis)
            layers = range(first[parts[1]], first[parts[1]] + length)
            value = np.stack([self._array(rest, n, tuple(shape)) for n in layers], axis=axis)
        elif parts[0] == "decoder" and parts[1].rpartition("_")[0] in first:
            stack, _, number = parts[1].rpartition("_")
            value = self._array(".".join(parts[2:]), first[stack] + int(number), leaf.shape)
        elif self._scan_axis is not None and parts[:2] == ["decoder", "layers"]:
            # decoder.layers.layers_1.rest: index i of its stack is layer i * cycle + 1.
            rest = parts[2:]
            offset = 0
            if rest[0].startswith("layers_"):
                offset, rest = int(rest[0].removeprefix("layers_")), rest[1:]
            shape = list(leaf.shape)
            # MaxText stacks parameters of too few axes on axis 0 (layers/nnx_scan.py).
            axis = self._scan_axis if len(shape) > self._scan_axis else 0
            length = shape.pop(axis)
            # A remainder has fewer layers than there are blocks.
            layers = [offset + self._layers // length * entry for entry in range(length)]
            value = np.stack(
                [self._array(".".join(rest), layer, tuple(shape)) for layer in layers],
                axis=axis,
            )
        elif parts[:2] == ["decoder", "layers_remainder"]:
            # Behind the blocks of six (layers/nnx_decoders.py `_init_scanned_gemma3`).
            layer = self._layers // 6 * 6 + int(parts[2].removeprefix("layers_"))
            value = self._array(".".join(parts[3:]), layer, leaf.shape)
        elif parts[0] == "decoder" and parts[1].startswith("layers_"):
            layer = int(parts[1].removeprefix("layers_"))
            value = self._array(".".join(parts[2:]), layer, leaf.shape)
        else:
            value = self._array(name, None, leaf.shape)
        return value.astype(leaf.dtype)

    def _array(self, name: str, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
        seed = (self._seed, zlib.crc32(name.encode()), -1 if layer is None else layer)
        draw = np.random.default_rng([part % 2**32 for part in seed]).standard_normal(shape)
        if name.endswith(".scale"):
            return 1.0 + 0.25 * draw
        if name.endswith(("bias", "sinks")):
            return 0.3 * draw
        suffixes = [suffix for suffix in self._scale if name.endswith(suffix)]
        if not suffixes:
            raise NotImplementedError(f"the lab has no scale for {name}")
        return self._scale[suffixes[0]] * draw


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without MaxText's logs and warnings, and without what its config does to XLA_FLAGS."""
    import jax

    jax.devices()
    before, flags = logging.root.manager.disable, os.environ.get("XLA_FLAGS")
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if flags is None:
            os.environ.pop("XLA_FLAGS", None)
