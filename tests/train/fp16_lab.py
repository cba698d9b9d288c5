"""MaxText's own train step on a small interleaved MoE with a tied head, to be stepped by hand.

PYTHONPATH=tests python tests/train/fp16_lab.py     prints the table of docs/fp16.md
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
from checkpoints.envy import ENVY
from checkpoints.row import TIED
from maxtext_lab import BASE, _quiet

_FP16 = {"dtype": "float16", "float32_logits": True, "float32_gate_logits": True}
_RUN = {
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "jax_cache_dir": "",
    "log_config": False,
    "attention": "dot_product",
    "megablox": False,
    "sparse_matmul": False,
    "capacity_factor": -1,
    "override_model_config": True,
    "enable_checkpointing": False,
    "async_checkpointing": False,
    "save_checkpoint_on_completion": False,
    "enable_tensorboard": False,
    "ici_data_parallelism": 1,
    "ici_fsdp_parallelism": 1,
    "per_device_batch_size": 4,
    "steps": 1000,
    "warmup_steps_fraction": 0.0,
    "learning_rate": 1e-3,
    "load_balance_loss_weight": 0.01,
    "scan_layers": False,
}
FP32 = {**BASE, **ENVY, **TIED, **_RUN}
FP16 = {**FP32, **_FP16}
# Over both, for gradients that are compared: test modules with one way to build a step in common
# find what the other has compiled.
SHARED = {
    "base_num_decoder_layers": 2,
    "vocab_size": 16384,
    "gradient_clipping_threshold": 0.0,
    "float32_logits": True,
}


def resolve(keys: dict[str, object], directory: Path, run: str = "run") -> Any:
    """MaxText's config of these keys."""
    from maxtext.configs import pyconfig

    base = str(Path(pyconfig.__file__).with_name("base.yml"))
    flags = os.environ.get("XLA_FLAGS")
    with _quiet():
        config = pyconfig.initialize(
            ["", base], **keys, base_output_directory=str(directory), run_name=run
        )
    if flags is not None:
        os.environ["XLA_FLAGS"] = flags
    return config


@contextlib.contextmanager
def little_optimisation() -> Iterator[None]:
    """For tests that compile much and compute little."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@dataclass
class Stepper:
    """A state of MaxText's, its jitted train step, and batches of its shape."""

    keys: dict[str, object]
    config: Any
    mesh: Any
    state: Any
    jitted: Any
    manager: Any
    first: Any  # the state before any step
    compiled: Any = None
    text: str = ""  # as jax lowers the step, before any compiler

    @classmethod
    def make(
        cls,
        keys: dict[str, object],
        directory: Path,
        run: str = "run",
        like: "Stepper | None" = None,
    ) -> "Stepper":
        """As `train_loop` does; whatever is to be installed must be.

        `like` has the same keys: its compiled step is used again.
        """
        import jax
        from flax import nnx
        from maxtext.trainers.pre_train import train
        from maxtext.utils import sharding, train_utils

        config = resolve(keys, directory, run)
        devices = jax.devices()[: config.ici_data_parallelism * config.ici_fsdp_parallelism]
        with _quiet():
            _, manager, shardings, _, mesh, _, _, _, _, _, state = train_utils.setup_train_loop(
                config, None, devices
            )
            graph, state = nnx.split(state)
            params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
            steps = (train.train_step, train.eval_step)
            jitted, _ = train_utils.jit_train_and_eval_step(
                config, graph, mesh, state, shardings, *steps, None, params
            )
        stepper = cls(dict(keys), config, mesh, state, jitted, manager, _copy(state))
        if like is not None:
            stepper.compiled = like.compiled
        return stepper

    @contextlib.contextmanager
    def _mesh(self) -> Iterator[None]:
        import jax
        from flax.core.spmd import logical_axis_rules

        with jax.set_mesh(self.mesh), logical_axis_rules(self.config.logical_axis_rules), _quiet():
            yield

    def batch(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random tokens; a fifth of each row is padding, as in real rows."""
        draw = np.random.default_rng(seed)
        rows, length = self.config.global_batch_size_to_train_on, self.config.max_target_length
        tokens = draw.integers(0, self.config.vocab_size, (rows, length + 1), np.int32)
        segments = np.broadcast_to(np.arange(length) < length * 4 // 5, (rows, length))
        shared = {
            "position": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
            "segmentation": segments.astype(np.int32),
        }
        data = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        return data | {f"{side}_{key}": value for side in data for key, value in shared.items()}

    def lower(self) -> Any:
        """The step as jax lowers it, before any compiler."""
        with self._mesh():
            return self.jitted.lower(self.state, self.batch())

    def compile(self) -> None:
        """Once; what was installed for it is then needed no more."""
        lowered = self.lower()
        self.text = lowered.as_text()
        with self._mesh():
            self.compiled = lowered.compile()

    def step(self, seed: int = 0) -> dict[str, float]:
        """One step of training; MaxText's scalar metrics."""
        if self.compiled is None:
            self.compile()
        import jax

        with self._mesh():
            batch = jax.device_put(self.batch(seed), self.compiled.input_shardings[0][1])
            self.state, metrics = self.compiled(self.state, batch)
        return {key: float(value) for key, value in metrics["scalar"].items()}

    def reset(self, **scaling: float) -> None:
        """Back to the state before any step, the loss scale's fields set."""
        self.state = _copy(self.first)
        self.set(**scaling)

    def set(self, **scaling: float) -> None:
        """Sets fields of the loss scale's state."""
        import jax
        from flax import nnx

        for path, variable in nnx.to_flat_state(self.state):
            if path[-1] in scaling:
                old = variable.get_value()
                value = np.full(old.shape, scaling[path[-1]], old.dtype)
                variable.set_value(jax.device_put(value, old.sharding))

    def scaling(self) -> tuple[float, int, int]:
        """The loss scale, good steps since it changed, and steps skipped."""
        leaves = self.leaves()
        last = max(name for name in leaves if name.endswith("loss_scale")).rsplit(".", 1)[0]
        fields = ("loss_scale", "good_steps", "skipped_steps")
        return tuple(leaves[f"{last}.{field}"].item() for field in fields)

    def gradient(self, **scaling: float) -> dict[str, np.ndarray]:
        """The first step's gradient, which without clipping is in Adam's first moment."""
        self.reset(**scaling)
        self.step()
        part = 1 - self.config.adam_b1
        # A chain of optimizers counts its states; one that is alone, as adam_pax, has no number.
        moments = {
            found[1]: leaf
            for name, leaf in self.leaves().items()
            if (found := re.fullmatch(r"optimizer\.opt_state\.(?:0\.)?mu\.(.+)", name))
        }
        return {name: leaf.astype(np.float64) / part for name, leaf in moments.items()}

    def leaves(self) -> dict[str, np.ndarray]:
        """The whole train state by dotted name, keys of random streams left out."""
        import jax
        from flax import nnx

        return {
            ".".join(map(str, path)): np.array(value)
            for path, variable in nnx.to_flat_state(self.state)
            if not jax.dtypes.issubdtype((value := variable.get_value()).dtype, jax.dtypes.prng_key)
        }

    def save(self) -> None:
        """A checkpoint by MaxText of the step just made."""
        from maxtext.common import checkpointing

        step = int(self.leaves()["optimizer.step"])
        with _quiet():
            checkpointing.save_checkpoint(self.manager, step, self.state, self.config, force=True)
            checkpointing.wait_until_finished(self.manager)


def _copy(state: Any) -> Any:
    """Steps take their state's memory."""
    import jax

    return jax.tree.map(lambda leaf: leaf.copy(), state)


def flushed(gradient: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """The share of gradient entries that fp16 made 0."""
    lost = sum(np.sum((gradient[k] == 0) & (reference[k] != 0)) for k in reference)
    return lost / sum(value.size for value in reference.values())


def error(gradient: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """The norm of the difference, relative to the gradient's."""
    difference = sum(np.sum(np.square(gradient[k] - reference[k])) for k in reference)
    return np.sqrt(difference / sum(np.sum(np.square(v)) for v in reference.values()))


# Vocabulary and rows of a batch, each of them 51 predicted tokens long.
CASES = ((160, 16), (16_384, 16), (2048, 256))
SCALES = (None, 2.0**5, 2.0**10, 2.0**15, 2.0**18, 2.0**20, 2.0**22)


def compare(vocabulary: int, rows: int, directory: Path) -> list[str]:
    """One column: how far off the fp16 gradient is under each scale, and what flushed."""
    from moeconv_train import fp16_head, loss_scaling

    keys = {
        "base_num_decoder_layers": 2,
        "gradient_clipping_threshold": 0.0,
        "vocab_size": vocabulary,
        "per_device_batch_size": rows,
    }
    reference = Stepper.make({**FP32, **keys}, directory).gradient()
    cells = []
    for mode in ("off", "dynamic"):
        settings = loss_scaling.LossScaleSettings(mode=mode)
        with loss_scaling.install(settings), fp16_head.install():
            stepper = Stepper.make({**FP16, **keys}, directory)
            for scale in SCALES[:1] if mode == "off" else SCALES[1:]:
                found = stepper.gradient(**({"loss_scale": scale} if scale else {}))
                if scale and stepper.scaling()[2]:
                    cells.append("overflows")
                    continue
                off, lost = error(found, reference), flushed(found, reference)
                cells.append(f"{off:.2%} off, {lost:.2%} flushed")
    return cells


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as directory:
        columns = [compare(*case, Path(directory)) for case in CASES]
    titles = " | ".join(f"V = {v:,}, W = {51 * rows:,}" for v, rows in CASES)
    print(f"| S | {titles} |\n| --- |{' ---: |' * len(CASES)}")
    for scale, *cells in zip(SCALES, *columns, strict=True):
        name = f"2^{int(np.log2(scale))}" if scale else "none"
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
