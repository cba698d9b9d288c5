"""MaxText's own train step on one device, timed step by step; train_step.py starts it.

python _train_maxtext.py SPEC     JSON in; for each of its patches a line of JSON on stdout out
"""

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _hlo

HARMLESS = {
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "jax_cache_dir": "",
    "enable_checkpointing": False,
    "save_checkpoint_on_completion": False,
    "async_checkpointing": False,
    "eval_interval": -1,
    "tokenizer_path": "",
    "grain_train_files": "",
    "run_name": "bench",
    "ici_data_parallelism": 1,
    "ici_fsdp_parallelism": 1,
}


def build(keys: dict[str, Any], scratch: str) -> tuple[Any, Any, Any, Any]:
    """MaxText's config, mesh, first state and jitted step, as `train_loop` has them."""
    import jax
    import maxtext
    from flax import nnx
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

    base = str(Path(maxtext.__path__[0]) / "configs" / "base.yml")
    hardware = "cpu" if jax.devices()[0].platform == "cpu" else "gpu"
    config = pyconfig.initialize(
        ["", base], **{**keys, **HARMLESS, "hardware": hardware, "base_output_directory": scratch}
    )
    _, _, shardings, _, mesh, *_, state = train_utils.setup_train_loop(
        config, None, jax.devices()[:1]
    )
    graph, state = nnx.split(state)
    params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    jitted, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, train.eval_step, None, params
    )
    return config, mesh, state, jitted


def batch(config: Any) -> dict[str, Any]:
    """Full rows of random tokens, one story each: those that _train_torch.py draws too."""
    import numpy as np

    shape = (config.global_batch_size_to_train_on, config.max_target_length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (shape[0], shape[1] + 1))
    shared = {
        "position": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segmentation": np.ones(shape, np.int32),
    }
    data = {"inputs": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}
    return data | {f"{side}_{key}": value for side in data for key, value in shared.items()}


def run(spec: dict[str, Any], patch: dict[str, bool], scratch: str) -> dict[str, Any]:
    """Compiles once, runs `steps` steps."""
    import jax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from moeconv_train.preflight import patches

    with contextlib.redirect_stdout(sys.stderr), patches.trainer(**patch):
        config, mesh, state, jitted = build(spec["keys"], scratch)
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            begin = time.perf_counter()
            compiled = jitted.lower(state, batch(config)).compile()
            compiling = time.perf_counter() - begin
            data = jax.device_put(batch(config), compiled.input_shardings[0][1])
            parameters = sum(
                leaf.get_value().size
                for path, leaf in nnx.to_flat_state(state)
                if path[0] == "model" and isinstance(leaf, nnx.Param)
            )
            seconds, cpu, losses = [], [], []
            for _ in range(1 + spec["steps"]):
                begin, used = time.perf_counter(), time.process_time()
                state, metrics = compiled(state, data)
                losses.append(float(metrics["scalar"]["learning/loss"]))  # waits for the step
                seconds.append(time.perf_counter() - begin)
                cpu.append(time.process_time() - used)
    memory, counts = compiled.memory_analysis(), _hlo.count(compiled.as_text())
    statistics = jax.devices()[0].memory_stats() or {}
    return {
        "parameters": parameters,
        "seconds": seconds[1:],  # the first is a warm-up
        "cpu": cpu[1:],
        "losses": losses,
        "compiling": compiling,
        "flops": sum(counts.flops.values()),
        "bytes": counts.traffic,
        "planned": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        "peak": statistics.get("peak_bytes_in_use"),
    }


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    for each in request["patches"]:
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(run(request, each, directory)))
