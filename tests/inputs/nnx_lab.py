"""What MaxText's training engine saves, which fine-tunes: the whole NNX state of a model.

Source: MaxText training_engine/checkpointing.py `CheckpointManager` (its handlers and items).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import maxtext_lab
import numpy as np
from maxtext_weights import Weights


def write(run_dir: Path, overrides: Mapping[str, object], *, step: int = 10, seed: int = 0) -> Path:
    """Writes `<run_dir>/checkpoints/<step>/model_params`; returns the step.

    The weights are those of `maxtext_lab.write_checkpoint` with this seed.
    """
    import jax
    import orbax.checkpoint as ocp
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.utils import maxtext_utils, model_creation_utils

    given = {**maxtext_lab.BASE, **overrides}
    with maxtext_lab._quiet():
        config = maxtext_lab._resolve(run_dir, given)
        mesh = maxtext_utils.get_mesh_from_config(config, jax.devices()[:1])
        with logical_axis_rules(config.logical_axis_rules):
            _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
        weights = Weights(config, seed)
        filled = []
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            leaf: Any = variable.get_value()
            if isinstance(variable, nnx.Param):
                value = weights(".".join(map(str, path)), leaf)
            elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                value = jax.random.key(0)
                value = jax.random.split(value, leaf.shape) if leaf.shape else value
            else:
                value = np.zeros(leaf.shape, leaf.dtype)
            filled.append((path, variable.replace(value=jax.device_put(value, leaf.sharding))))
        with ocp.CheckpointManager(
            run_dir / "checkpoints",
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
            item_handlers={
                "model_params": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
            },
        ) as manager:
            item = ocp.args.PyTreeSave(item=nnx.from_flat_state(filled))
            manager.save(step, args=ocp.args.Composite(model_params=item))
    return run_dir / "checkpoints" / str(step)
