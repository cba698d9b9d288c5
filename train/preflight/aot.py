"""Compiles MaxText's own train step ahead of time, in a process of its own; memory.py starts it.

As MaxText's trainers/pre_train/train_compile.py does for TPUs, whose functions it uses, but for
CUDA devices that need not be there. Reads one JSON request from stdin, writes one JSON object a
line to the file descriptor in its argument.
"""

import contextlib
import importlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from moeconv_train.words import first_line

# What the compiled step does not depend on, and what must not touch the network or the disk.
_HARMLESS = {
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
    """MaxText does not take the config; its own exception is the cause."""


def main() -> None:
    """One request."""
    request = json.load(sys.stdin)
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as out:
        try:
            devices, usable = _devices(request)
        except Exception as error:
            _say(out, kind="error", stage="devices", message=_one_line(error))
            return
        for index, variant in enumerate(request["variants"]):
            try:
                with tempfile.TemporaryDirectory() as scratch, _patched(variant["patch"]):
                    config = _config(request, variant, scratch)
                    step = _Step(config, devices)
                    if index == 0:
                        _say(out, kind="state", **step.state_size())
                    if request["state_only"]:
                        return
                    row = step.compile(request, variant["name"])
            except Exception as error:
                refused = isinstance(error, _RefusedError)
                message = _one_line(error.__cause__ if refused and error.__cause__ else error)
                _say(out, kind="error", stage=variant["name"], refused=refused, message=message)
                continue
            _say(out, kind="row", name=variant["name"], usable=usable, **row)
            if request["until_fit"] and row["total"] <= (usable or 0):
                return


def _say(out: IO[str], **what: Any) -> None:
    out.write(json.dumps(what) + "\n")
    out.flush()


def _one_line(error: BaseException) -> str:
    kind = type(error).__name__
    text = first_line(error)
    named = text == kind or callable(getattr(error, "errors", None))  # pydantic's names a field
    return text if named else f"{kind}: {text}"


def _devices(request: Mapping[str, Any]) -> tuple[list[Any], int | None]:
    """The devices to compile for, and how many bytes of each JAX would allocate."""
    import jax

    if request["state_only"]:
        return jax.devices()[: request["devices"] or None], None
    if request["target_config"] is None:
        found = jax.devices("cuda")[: request["devices"] or None]
        return found, int(found[0].memory_stats()["bytes_limit"])
    from jax.experimental.topologies import get_topology_desc

    shape = f"1x1x{request['devices']}"
    topology = get_topology_desc(
        platform="cuda", topology_name=shape, topology=shape, target_config=request["target_config"]
    )
    return list(topology.devices), request["usable"]


@contextlib.contextmanager
def _patched(patch: Mapping[str, Any]) -> Iterator[None]:
    """The trainer's own changes to MaxText: a context manager by name, `module:function`."""
    module, _, name = patch["function"].partition(":")
    with getattr(importlib.import_module(module), name)(**patch["arguments"]):
        yield


def _config(request: Mapping[str, Any], variant: Mapping[str, Any], scratch: str) -> Any:
    from maxtext.configs import pyconfig

    keys = {
        **request["config"],
        **variant["overrides"],
        **_HARMLESS,
        "base_output_directory": scratch,
    }
    if not request["state_only"]:
        keys["hardware"] = "gpu"
    try:
        config = pyconfig.initialize(["", request["base_yml"]], **keys)
    except SystemExit as error:  # pyconfig.py `_handle_config_exception`
        raise _RefusedError("no reason given") from error.__context__
    except (ValueError, TypeError) as error:  # the same, where some library has loaded unittest
        raise _RefusedError("no reason given") from error
    # Values that no YAML can give, such as the word "none", which pyconfig.py turns into None.
    object.__getattribute__(config, "_flat_config").update(variant["forced"])
    return config


class _Step:
    """MaxText's train step over its abstract state, for some devices."""

    def __init__(self, config: Any, devices: list[Any]) -> None:
        from jax.sharding import AxisType, Mesh
        from maxtext.common.common_types import ShardMode
        from maxtext.trainers.pre_train import train_compile
        from maxtext.utils import maxtext_utils

        axis = AxisType.Explicit if config.shard_mode == ShardMode.EXPLICIT else AxisType.Auto
        self.config = config
        self.mesh = Mesh(
            maxtext_utils.create_device_mesh(config, devices),
            config.mesh_axes,
            axis_types=(axis,) * len(config.mesh_axes),
        )
        self.arguments, self.keywords, self.shardings, _, self.model = (
            train_compile.get_shaped_inputs(self.mesh, config)
        )

    def state_size(self) -> dict[str, int]:
        """Parameters, and bytes of the whole train state: what a checkpoint holds."""
        import math

        from flax import nnx

        leaves = [(path, v, v.get_value()) for path, v in nnx.to_flat_state(self.arguments[0])]
        return {
            "parameters": sum(
                math.prod(leaf.shape)
                for path, variable, leaf in leaves
                if path[0] == "model" and isinstance(variable, nnx.Param)
            ),
            "state_bytes": sum(
                math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 4) for *_, leaf in leaves
            ),
        }

    def compile(self, request: Mapping[str, Any], name: str) -> dict[str, Any]:
        """XLA's own numbers of the optimised executable."""
        import jax
        from flax.core.spmd import logical_axis_rules
        from maxtext.trainers.pre_train import train
        from maxtext.utils import maxtext_utils, sharding

        begun = time.perf_counter()
        config = self.config
        # The rest is train_compile.py `main`, but for the compiler's options.
        params, state = sharding.maybe_update_params_sharding_with_opt(config, self.shardings)
        inputs = sharding.build_zero1_input_state_mesh_shardings(config, state, params)
        data = sharding.get_input_data_sharding(config, self.mesh)
        function, in_shard, out_shard, static, donated = (
            maxtext_utils.get_functional_train_with_signature(
                train.train_step, data, inputs, self.model, config, params
            )
        )
        with jax.set_mesh(self.mesh), logical_axis_rules(config.logical_axis_rules):
            lowered = jax.jit(
                function,
                in_shardings=in_shard,
                out_shardings=out_shard,
                static_argnums=static,
                donate_argnums=donated,
            ).lower(*self.arguments, **self.keywords)
        # Autotuning would run kernels on the device.
        options = {"xla_gpu_autotune_level": "0"} if request["target_config"] else {}
        compiled = lowered.compile(compiler_options=options)
        memory, text = compiled.memory_analysis(), compiled.as_text()
        if request["hlo"]:
            Path(request["hlo"], f"{name}.hlo").write_text(text, encoding="utf-8")
        arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
        temporaries, aliased = memory.temp_size_in_bytes, memory.alias_size_in_bytes
        return {
            "arguments": arguments,
            "outputs": outputs,
            "temporaries": temporaries,
            "aliased": aliased,
            "total": arguments + outputs + temporaries - aliased,
            "xla_rematerialised": rematerialised(text),
            "seconds": time.perf_counter() - begun,
        }


def rematerialised(hlo: str) -> bool:
    """Whether XLA computes values twice to save memory (hlo_rematerialization.cc names them so)."""
    return re.search(r"%[\w.\-]+\.remat\d* = ", hlo) is not None


if __name__ == "__main__":
    main()
