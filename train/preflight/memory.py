"""How much memory the run's real train and evaluation step need on its target.

XLA compiles them ahead of time, for two T4s without having one; the numbers are its buffer
assignment's. Nothing is estimated: without the CUDA plugin there is an error, not a guess.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeconv_train.preflight.config import maxtext_configs, maxtext_defaults, resolve
from moeconv_train.preflight.report import MemoryRow
from moeconv_train.preflight.target import Target, gpu_environment, memory_fraction

from moeconv.errors import ConfigError, MissingPackageError, MoeconvError, to_install

# A directory with the plugin's wheels unpacked (`pip install --target DIR --no-deps …`), for an
# environment that should not have them: with a plugin and no driver, bare `import jax` may crash.
PLUGIN_DIRECTORY = "MOECONV_CUDA_PLUGINS"
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=\d+")


@dataclass(frozen=True)
class Variant:
    """One configuration to compile.

    Attributes:
        name: For people, and of the file with its HLO.
        overrides: MaxText settings over the run's own.
        patches: Arguments of `patches.trainer`; None for stock MaxText.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    patches: Mapping[str, Any] | None = field(default_factory=dict)


def ladder(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings that need less memory and train the same model, the cheapest in time first.

    Not a smaller batch with gradients accumulated: those are kept in float32 between its parts,
    4 bytes a parameter, which costs the recipe more than it saves (docs/memory.md).
    """
    given = resolve(config)
    policy = given["remat_policy"]
    tiling = {"num_vocab_tiling": 4} if given["num_vocab_tiling"] < 4 else {}
    some = {"remat_policy": "save_dot_except_mlpwi"} if str(policy).startswith("minimal") else {}
    full = {"remat_policy": "full"} if policy not in ("full", None) else {}
    unrolled = {"scan_layers": False} if given["scan_layers"] else {}
    rungs: list[dict[str, Any]] = []
    for rung in (unrolled, tiling, some, {**some, **tiling}, full, {**full, **tiling}):
        if rung and rung not in rungs:
            rungs.append(rung)
    return rungs


def plugin_installed() -> bool:
    """Whether JAX in this environment finds a CUDA plugin, to train with."""
    return any(importlib.util.find_spec(name) for name in _PLUGINS)


def plugin_environment() -> dict[str, str]:
    """Environment variables under which a new process finds the CUDA plugin.

    Raises:
        MissingPackageError: There is none.
    """
    if directory := os.environ.get(PLUGIN_DIRECTORY):
        if not any((Path(directory) / name).is_dir() for name in _PLUGINS):
            raise MissingPackageError(
                f"{PLUGIN_DIRECTORY}={directory} holds no CUDA plugin of JAX; "
                f"pip install --no-deps --target {directory} jax-cuda12-plugin jax-cuda12-pjrt"
            )
        paths = [str(Path(directory).absolute()), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if not plugin_installed():
        raise MissingPackageError(
            "the CUDA plugin of JAX, which compiles for a GPU that is not there, is missing; "
            + to_install("train", "cuda12")
        )
    return {}


def measure(
    config: Mapping[str, Any],
    target: Target,
    variants: Sequence[Variant],
    *,
    until_fit: bool = False,
    hlo: Path | None = None,
) -> tuple[list[MemoryRow], dict[str, str]]:
    """Compiles the train step of `config`, and the evaluation step if it evaluates, for `target`.

    Args:
        config: MaxText settings, over base.yml or a whole resolved config.
        target: Compiled for; needs no device if it has a `config_file`.
        variants: What to compile, by one process.
        until_fit: Whether to stop at the first that fits.
        hlo: A folder for the train step's optimised HLO, `<variant's name>.hlo` each.

    Returns:
        The rows, and why other variants do not compile.

    Raises:
        MissingPackageError: The CUDA plugin of JAX is not installed.
        ConfigError: MaxText refuses the config of the first.
        MoeconvError: The first does not compile.
    """
    defaults, ours = maxtext_defaults(), variants[0].patches or {}
    fraction = memory_fraction(ours)
    given = resolve(config).items()
    request = {
        "config": {k: v for k, v in given if k not in defaults or defaults[k] != v},
        "base_yml": str(maxtext_configs() / "base.yml"),
        "devices": target.devices,
        "target_config": target.target_config,
        "usable": int((target.memory or 0) * fraction),
        "variants": [asdict(variant) for variant in variants],
        "until_fit": until_fit,
        "hlo": str(hlo.absolute()) if hlo else None,
    }
    environment = {**os.environ, **plugin_environment(), **gpu_environment(ours)}
    flags = _DEVICE_COUNT.sub("", environment.get("XLA_FLAGS", "")).strip()
    if target.config_file:
        # MaxText takes the number of devices from the host's (types.py `get_num_target_devices`).
        flags += f" --xla_force_host_platform_device_count={target.devices}"
    environment["JAX_PLATFORMS"] = "cpu" if target.config_file else "cuda,cpu"
    environment["XLA_FLAGS"] = flags
    # Compiling beside whatever else uses the GPU.
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    rows, failed = [], {}
    # The others are not compiled beyond the first that fits.
    for variant, answer in zip(variants, _answers(request, environment), strict=False):
        if "row" in answer:
            rows.append(MemoryRow(**answer["row"]))
        elif variant is not variants[0]:
            failed[variant.name] = answer["error"]
        elif answer["refused"]:
            raise ConfigError(f"MaxText refuses this config: {answer['error']}")
        else:
            raise MoeconvError(f"the run does not compile: {answer['error']}")
    return rows, failed


def _answers(request: Mapping[str, Any], environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """What aot.py says of each variant.

    Raises:
        MoeconvError: It ended otherwise.
    """
    done = subprocess.run(
        [sys.executable, "-m", "moeconv_train.preflight.aot"],
        input=json.dumps(request),
        capture_output=True,
        env=environment,
        text=True,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise MoeconvError(
            f"the compiler's process ended with {done.returncode}, at last saying {last[:300]!r}"
        )
    return json.loads(done.stdout)
