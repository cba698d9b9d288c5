"""LoRA adapters as MaxText makes them: qwix puts the factors into MaxText's model, MaxText saves
them, and its own forward pass with them is the reference; the lab only chooses their values."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import maxtext_lab
import numpy as np
from maxtext_lab import LabCheckpoint

RANK, ALPHA = 3, 4.5
# The linear layers of attention and MLPs, as MaxText's own configs/post_train/lora_module_path.yml.
LINEAR = (
    r"decoder/.*([Aa]ttention/(query|key|value|out|wq_a|wq_b|wkv_a|wkv_b)"
    r"|(mlp|shared_experts)/(wi_0|wi_1|wo))"
)


@dataclass(frozen=True)
class LoraCheckpoint:
    """An adapter on disk, its base, and what MaxText computes with both."""

    step_dir: Path
    both_dir: Path
    base: LabCheckpoint
    logits: np.ndarray
    tokens: np.ndarray
    factors: Mapping[str, np.ndarray]


def write(
    root: Path, base: LabCheckpoint, *, modules: str = LINEAR, seed: int = 0
) -> LoraCheckpoint:
    """Writes the adapter alone, as a training saves it, and a checkpoint with base and adapter.

    Args:
        root: A new folder.
        base: The model that is adapted.
        modules: `lora.lora_module_path`.
        seed: Chooses the factors.
    """
    import jax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from helpers import tokens_for
    from maxtext.common import checkpointing, train_state_nnx
    from maxtext.utils import lora_utils, maxtext_utils, model_creation_utils
    from optax import sgd

    from moeconv.verification.models.maxtext import MaxTextModel

    settings = {"enable_lora": True, "lora_rank": RANK, "lora_alpha": ALPHA}
    given = {**base.config, "lora": {**settings, "lora_module_path": modules}}
    with maxtext_lab._quiet():
        config = maxtext_lab._resolve(root / "lora", given)
        mesh = maxtext_utils.get_mesh_from_config(config, jax.devices()[:1])
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            model = model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(0))
            model = lora_utils.apply_lora_to_model(model, mesh, config)
        factors = {}
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            name = ".".join(map(str, path))
            if isinstance(variable, nnx.LoRAParam):
                value = factors[name] = _factor(name, variable.get_value(), seed)
            elif name in base.params:
                value = base.params[name]
            else:
                continue
            _set(model, path, jax.numpy.asarray(value))
        state = nnx.state(
            train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, sgd(0.1), wrt=nnx.LoRAParam))
        )
        manager = checkpointing.create_orbax_checkpoint_manager(
            str(root / "lora" / "checkpoints"), True, False, 1
        )
        checkpointing.save_checkpoint(manager, 7, state, config, force=True)
        manager.close()
        whole = train_state_nnx.to_checkpoint_dict(state)["params"]
        checkpointing.save_params_to_path(root / "both" / "checkpoints" / "7", whole)
        graph, split = nnx.split(model)
    reference = MaxTextModel(config, mesh, graph, split)
    tokens = tokens_for(base)
    return LoraCheckpoint(
        root / "lora" / "checkpoints" / "7",
        root / "both" / "checkpoints" / "7",
        base,
        reference.logits(tokens, head="unrounded"),
        tokens,
        factors,
    )


def _factor(name: str, leaf: np.ndarray, seed: int) -> np.ndarray:
    """Values by which logits move as much as they are large."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    width = max(leaf.shape) if name.endswith("lora_a") else 4 * RANK
    return (rng.standard_normal(leaf.shape) / np.sqrt(width)).astype(leaf.dtype)


def _set(model: object, path: tuple[object, ...], value: object) -> None:
    for key in path:
        model = (
            model[key]
            if not isinstance(key, str) or hasattr(model, "keys")
            else getattr(model, key)
        )
    model.set_value(value)
