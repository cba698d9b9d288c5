"""Compiles MaxText's own train and evaluation step ahead of time, in a process of its own.

As MaxText's trainers/pre_train/train_compile.py does for TPUs, whose functions it uses, but for
CUDA devices that need not be there. memory.py starts it: a JSON request on stdin, a JSON list of
answers on stdout.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeconv_train.preflight import patches
from moeconv_train.preflight.report import MemoryRow
from moeconv_train.words import first_line

# What the compiled steps do not depend on, and what must not touch the network or the disk.
_HARMLESS = {
    "hardware": "gpu",
    "dataset_type": "synthetic",
    "eval_interval": -1,
    "skip_jax_distributed_system": True,
    "jax_cache_dir": "",
    "enable_tensorboard": False,
    "enable_wandb": False,
    "enable_checkpointing": False,
    "metrics_file": "",
    "tokenizer_path": "",
    "log_config": False,
    "run_name": "preflight",
}


class _RefusedError(Exception):
    """MaxText does not take the config."""


def main() -> None:
    """One request."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # MaxText prints
    with out:
        json.dump(serve(json.load(sys.stdin)), out)


def serve(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each variant a `row` or an `error`, up to the first that fits if no more is asked for."""
    devices, limit = _devices(request["target_config"], request["devices"])
    answers = []
    for variant in request["variants"]:
        try:
            row = _row(request, variant, devices, request["usable"] or limit)
        except _RefusedError as error:
            answers.append({"refused": True, "error": first_line(error.__cause__)})
        except Exception as error:
            said = f"{type(error).__name__}: {first_line(error)}"
            answers.append({"refused": False, "error": said})
        else:
            answers.append({"row": asdict(row)})
            if request["until_fit"] and row.fits:
                break
    return answers


def _devices(target_config: str | None, count: int) -> tuple[list[Any], int]:
    """The devices to compile for, and how many bytes of each JAX would allocate if it is there."""
    import jax

    if target_config is None:
        found = jax.devices("cuda")[:count]
        return found, int(found[0].memory_stats()["bytes_limit"])
    from jax.experimental.topologies import get_topology_desc

    shape = f"1x1x{count}"
    topology = get_topology_desc(
        platform="cuda", topology_name=shape, topology=shape, target_config=target_config
    )
    return list(topology.devices), 0


def _row(
    request: Mapping[str, Any], variant: Mapping[str, Any], devices: list[Any], usable: int
) -> MemoryRow:
    """One variant, compiled."""
    keys = {**request["config"], **variant["overrides"]}
    change: contextlib.AbstractContextManager[None] = contextlib.nullcontext()  # stock MaxText
    if variant["patches"] is not None:
        change = patches.trainer(**variant["patches"])
    with tempfile.TemporaryDirectory() as scratch, change:
        config = _config(request["base_yml"], keys, scratch)
        # Autotuning would run kernels on the device.
        options = {"xla_gpu_autotune_level": "0"} if request["target_config"] else {}
        sizes, hlo = _compiled(config, devices, options, keys.get("eval_interval", -1) > 0)
    if request["hlo"]:
        Path(request["hlo"], f"{variant['name']}.hlo").write_text(hlo, encoding="utf-8")
    remat = rematerialised(hlo)
    return MemoryRow(**sizes, name=variant["name"], usable=usable, xla_rematerialised=remat)


def _config(base_yml: str, keys: Mapping[str, Any], scratch: str) -> Any:
    from maxtext.configs import pyconfig

    told = {**keys, **_HARMLESS, "base_output_directory": scratch}
    try:
        return pyconfig.initialize(["", base_yml], **told)
    except SystemExit as error:  # pyconfig.py `_handle_config_exception`
        raise _RefusedError from error.__context__
    except (ValueError, TypeError) as error:  # the same, where some library has loaded unittest
        raise _RefusedError from error


def _compiled(
    config: Any, devices: list[Any], options: Mapping[str, str], evaluates: bool
) -> tuple[dict[str, int], str]:
    """XLA's numbers of both optimised executables, and the HLO of the train step."""
    import jax
    from flax.core.spmd import logical_axis_rules
    from jax.sharding import AxisType, Mesh
    from maxtext.common.common_types import ShardMode
    from maxtext.trainers.pre_train import train, train_compile
    from maxtext.utils import maxtext_utils, sharding, train_utils

    axis = AxisType.Explicit if config.shard_mode == ShardMode.EXPLICIT else AxisType.Auto
    axes = config.mesh_axes
    device_mesh = maxtext_utils.create_device_mesh(config, devices)
    mesh = Mesh(device_mesh, axes, axis_types=(axis,) * len(axes))
    (state, batch), _, shardings, _, graph = train_compile.get_shaped_inputs(mesh, config)
    # The rest as train.py `train_loop` does it.
    params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    train_step, eval_step = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, train.eval_step, evaluates, params
    )
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        compiled = train_step.lower(state, batch).compile(compiler_options=options)
    memory, evaluation = compiled.memory_analysis(), 0
    if evaluates:
        rules = config.logical_axis_rules_for_eval
        with jax.set_mesh(mesh), logical_axis_rules(rules):
            batch_sharding = sharding.get_input_data_sharding(config, mesh, rules=rules)
            batch = maxtext_utils.get_shaped_batch(
                config, batch_sharding=batch_sharding, is_eval=True
            )
            found = eval_step.lower(state, batch).compile(compiler_options=options)
        # Its arguments are of the state, which is there already.
        evaluated = found.memory_analysis()
        evaluation = evaluated.temp_size_in_bytes + evaluated.output_size_in_bytes
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "evaluation": evaluation,
    }
    return sizes, compiled.as_text()


def rematerialised(hlo: str) -> bool:
    """Whether XLA computes values twice to save memory (hlo_rematerialization.cc names them so)."""
    return re.search(r"%[\w.\-]+\.remat\d* = ", hlo) is not None


if __name__ == "__main__":
    main()
