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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
from maxtext_weights import Weights

# Every test model differs from this only where it says so; those of the families are the rows of
# tests/checkpoints/.
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
        state = _train_state(config, mesh, Weights(config, seed), step)
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


def _train_state(config: Any, mesh: Any, weights: Weights, step: int) -> Any:
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
