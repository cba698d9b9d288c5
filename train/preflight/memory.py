"""How much memory the run's real train step needs on its target.

XLA compiles it ahead of time, for two T4s without having one; the numbers are its buffer
assignment's. Nothing is estimated: without the CUDA plugin there is an error, not a guess.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeconv_train.preflight.config import overrides, resolve
from moeconv_train.preflight.report import MemoryReport, MemoryRow, word
from moeconv_train.preflight.target import MEMORY_FRACTION, Target, gpus, memory_fraction

from moeconv.errors import ConfigError, MoeconvError

# A directory with the plugin's wheels unpacked (`pip install --target DIR --no-deps …`), for an
# environment that should not have them: with a plugin and no driver, bare `import jax` may crash.
PLUGIN_DIRECTORY = "MOECONV_CUDA_PLUGINS"
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=\d+")

INSTALL = (
    "The CUDA plugin of JAX, which compiles for a GPU that is not there, is missing: "
    'pip install "moeconv[train,cuda12]"'
)


class PluginMissingError(MoeconvError):
    """The CUDA plugin of JAX is not installed."""


@dataclass(frozen=True)
class Patch:
    """A context manager of the trainer, by name, that is open while MaxText traces the step."""

    function: str = "moeconv_train.preflight.patches:trainer"
    arguments: Mapping[str, Any] = field(default_factory=dict)


STOCK = Patch("moeconv_train.preflight.patches:stock")


@dataclass(frozen=True)
class Variant:
    """One configuration to compile: settings over the run's own.

    `forced` are values that MaxText's config cannot be given (aot.py); `patch` stands in the place
    of the run's.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    forced: Mapping[str, Any] = field(default_factory=dict)
    patch: Patch | None = None


def ladder(config: Mapping[str, Any]) -> list[Variant]:
    """Settings that need less memory and train the same model, the cheapest in time first."""
    given = resolve(config)
    rungs: list[dict[str, Any]] = []
    tiling = {"num_vocab_tiling": 4} if given["num_vocab_tiling"] < 4 else {}
    saving = str(given["remat_policy"]).startswith("minimal")
    some = {"remat_policy": "save_dot_except_mlpwi"} if saving else {}
    remat = {"remat_policy": "full"} if given["remat_policy"] not in ("full", None) else {}
    if given["scan_layers"]:
        rungs.append({"scan_layers": False})
    rungs += [tiling, some, {**some, **tiling}, remat, {**remat, **tiling}]
    batch, steps = given["per_device_batch_size"], given["gradient_accumulation_steps"]
    while batch % 2 == 0:
        batch, steps = batch // 2, steps * 2
        half = {"per_device_batch_size": batch, "gradient_accumulation_steps": steps}
        rungs += [half, {**half, **remat, **tiling}]
    seen: list[dict[str, Any]] = [{}]
    for rung in rungs:
        if rung not in seen:
            seen.append(rung)
    return [Variant(name_of(rung), rung) for rung in seen[1:]]


def name_of(settings: Mapping[str, Any]) -> str:
    """Settings as MaxText's command line takes them."""
    return " ".join(f"{key}={word(value)}" for key, value in settings.items())


def plugin_installed() -> bool:
    """Whether JAX in this environment finds a CUDA plugin, to train with."""
    return any(importlib.util.find_spec(name) for name in _PLUGINS)


def plugin_environment() -> dict[str, str]:
    """Environment variables under which a new process finds the CUDA plugin.

    Raises:
        PluginMissingError: There is none.
    """
    if directory := os.environ.get(PLUGIN_DIRECTORY):
        if not any((Path(directory) / name).is_dir() for name in _PLUGINS):
            raise PluginMissingError(
                f"{PLUGIN_DIRECTORY}={directory} holds no CUDA plugin of JAX; "
                f"pip install --no-deps --target {directory} jax-cuda12-plugin jax-cuda12-pjrt"
            )
        paths = [str(Path(directory).absolute()), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if not plugin_installed():
        raise PluginMissingError(INSTALL)
    return {}


def measure(
    config: Mapping[str, Any],
    target: Target,
    *,
    variants: Sequence[Variant] | None = None,
    until_fit: bool = True,
    patch: Patch | None = None,
    hlo: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> MemoryReport:
    """Compiles the train step of `config` for `target`.

    Args:
        config: MaxText settings, over base.yml or a whole resolved config.
        target: Compiled for; needs no device if it has a `config_file`.
        variants: What to compile; by default the run as it is, then its ladder.
        until_fit: Whether to stop at the first variant that fits.
        patch: The trainer's changes to MaxText where a variant has no others; by default
            `patches.trainer`.
        hlo: A folder for the optimised HLO text of each variant, as `<its name>.hlo`.
        progress: Told before and after each compilation.

    Raises:
        PluginMissingError: The CUDA plugin of JAX is not installed.
        ConfigError: MaxText refuses the config.
        MoeconvError: The compilation failed.
    """
    chosen = list(variants) if variants is not None else [Variant("as given"), *ladder(config)]
    environment = plugin_environment()
    if target.config_file is None and not gpus():
        raise MoeconvError(
            "There is no NVIDIA GPU here to compile for (nvidia-smi finds none); choose the target "
            "T4X2, which needs none."
        )
    answers = _run(config, target, chosen, until_fit, patch or Patch(), hlo, environment, progress)
    return _report(target, chosen, answers)


def state_size(config: Mapping[str, Any], devices: int, patch: Patch | None = None) -> MemoryReport:
    """Parameters and bytes of the train state alone, which needs no CUDA plugin.

    Raises:
        ConfigError: MaxText refuses the config.
    """
    target = Target("cpu", devices)
    answers = _run(config, target, [Variant("as given")], True, patch or Patch(), None, None, None)
    return _report(target, [], answers)


def _run(
    config: Mapping[str, Any],
    target: Target,
    variants: Sequence[Variant],
    until_fit: bool,
    patch: Patch,
    hlo: Path | None,
    environment: Mapping[str, str] | None,
    progress: Callable[[str], None] | None,
) -> list[dict[str, Any]]:
    """The worker's answers; `environment` None asks for the state's size only."""
    state_only = environment is None
    request = {
        "config": overrides(config),
        "base_yml": str(_base_yml()),
        "devices": target.devices,
        "target_config": None if state_only else target.target_config,
        "usable": target.usable,
        "variants": [
            {
                "name": v.name,
                "overrides": dict(v.overrides),
                "forced": dict(v.forced),
                "patch": asdict(v.patch or patch),
            }
            for v in variants
        ],
        "until_fit": until_fit,
        "hlo": str(hlo.absolute()) if hlo else None,
        "state_only": state_only,
    }
    on_cpu = state_only or target.config_file is not None
    env = {**os.environ, **(environment or {}), **_jax_environment(target.devices, on_cpu)}
    answers = []
    read, write = os.pipe()
    with tempfile.TemporaryFile("w+") as log, os.fdopen(read, encoding="utf-8") as lines:
        process = subprocess.Popen(
            [sys.executable, "-m", "moeconv_train.preflight.aot", str(write)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=[write],
            text=True,
        )
        os.close(write)
        try:
            assert process.stdin is not None
            with process.stdin as stdin:
                stdin.write(json.dumps(request))
            for line in lines:
                answers.append(json.loads(line))
                if progress and answers[-1]["kind"] == "row":
                    row = answers[-1]
                    progress(f"{row['name']}: {row['total'] / 2**30:.2f} GiB a device")
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if code != 0:
            log.seek(0)
            raise MoeconvError(
                "The train step could not be compiled: the compiler's process ended with "
                f"{code}, at last saying {_last_line(log.read())!r}"
            )
    return answers


def _base_yml() -> Path:
    spec = importlib.util.find_spec("maxtext")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError('MaxText is not installed; pip install "moeconv[train]"')
    return Path(spec.submodule_search_locations[0]) / "configs" / "base.yml"


def _jax_environment(devices: int, on_cpu: bool) -> dict[str, str]:
    """JAX's own, whatever that of this process is."""
    flags = _DEVICE_COUNT.sub("", os.environ.get("XLA_FLAGS", "")).strip()
    if not on_cpu:
        return {
            "JAX_PLATFORMS": "cuda,cpu",
            "XLA_FLAGS": flags,
            # Compiling beside whatever else uses the GPU.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            MEMORY_FRACTION: str(memory_fraction()),
        }
    # MaxText takes the number of devices from the host's (types.py `get_num_target_devices`).
    count = f"--xla_force_host_platform_device_count={max(devices, 1)}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {count}".strip()}


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _report(
    target: Target, variants: Sequence[Variant], answers: Sequence[Mapping[str, Any]]
) -> MemoryReport:
    """The answers, checked; the first variant must have been compiled."""
    state = next((a for a in answers if a["kind"] == "state"), None)
    rows = [a for a in answers if a["kind"] == "row"]
    failures = [a for a in answers if a["kind"] == "error"]
    errors = {a["stage"]: a["message"] for a in failures}
    if "devices" in errors:
        raise MoeconvError(f"There is no device to compile for: {errors['devices']}")
    if state is None or (variants and variants[0].name in errors):
        first = failures[0] if failures else {"message": "the compiler's process said nothing"}
        if first.get("refused"):
            raise ConfigError(f"MaxText refuses this config: {first['message']}")
        raise MoeconvError(f"The train step does not compile: {first['message']}")
    by_name = {variant.name: dict(variant.overrides) for variant in variants}
    return MemoryReport(
        target=target.name,
        parameters=state["parameters"],
        state_bytes=state["state_bytes"],
        rows=[
            MemoryRow.model_validate(
                {**{k: v for k, v in r.items() if k != "kind"}, "overrides": by_name[r["name"]]}
            )
            for r in rows
        ],
        failed=errors,
    )
