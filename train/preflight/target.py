"""Which GPUs a run is for, two T4s that need not be there or what is, and how JAX uses them."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from moeconv.errors import ConfigError

if TYPE_CHECKING:
    from moeconv_train.plan import Plan

# jaxlib/xla_client.py `generate_pjrt_gpu_plugin_options`: the second is deprecated, both together
# an error, which jax's discovery of plugins swallows.
MEMORY_FRACTION, DEFAULT_FRACTION = "XLA_CLIENT_MEM_FRACTION", 0.88
FRACTIONS = (MEMORY_FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION")
_SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"


@dataclass(frozen=True)
class Target:
    """Devices of one kind.

    Attributes:
        name: For people.
        devices: How many.
        compute_capability: Of each; None where it is not known, as of a CPU.
        memory: Bytes of each, where they are not here to be asked.
        config_file: XLA's description of them in data_files/, to compile without one, likewise.
    """

    name: str
    devices: int
    compute_capability: tuple[int, int] | None = None
    memory: int | None = None
    config_file: str | None = None

    @property
    def target_config(self) -> str | None:
        """The text of `config_file`."""
        if self.config_file is None:
            return None
        return (resources.files("moeconv_train") / "data_files" / self.config_file).read_text()

    @property
    def has_bf16(self) -> bool:
        """Whether the tensor cores multiply bfloat16 (Ampere and later)."""
        return self.compute_capability is None or self.compute_capability >= (8, 0)


# device_memory_size of the target config: what CUDA reports of a T4's 16 GB.
T4X2 = Target("2xT4", 2, (7, 5), 15_642_329_088, "t4_target_config.txtpb")


def gpus() -> Target | None:
    """The GPUs of this machine that CUDA would show, as the first is; None without a driver.

    Raises:
        ConfigError: The driver hangs.
    """
    program, shown = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None or shown in ("", "-1"):
        return None
    command = [program, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    if shown and not shown.startswith("MIG"):  # which it lists with their GPU only
        command.append(f"--id={shown}")
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"{program}: gives no answer about the GPUs ({type(error).__name__}); restart the "
            "machine if it hangs, or set CUDA_VISIBLE_DEVICES=-1 to do without them"
        ) from None
    lines = result.stdout.splitlines() if result.returncode == 0 else []
    if not lines:
        return None
    name, _, capability = lines[0].rpartition(",")
    digits = re.fullmatch(r"(\d+)\.(\d+)", capability.strip())  # "[N/A]" of some old ones
    known = (int(digits[1]), int(digits[2])) if digits else None
    return Target(f"{len(lines)}x{name.strip()}", len(lines), known)


def memory_fraction(patches: Mapping[str, Any]) -> float:
    """The part of a GPU that JAX takes: what the user says, else ours (JAX's own is 0.75).

    CUDA, NCCL, cuBLAS and CUDA graphs live in the rest. With both patches a step needs so much less
    (docs/memory.md) that they get more.

    Raises:
        ConfigError: It is no number, or is said in both of JAX's ways.
    """
    told = {name: os.environ[name] for name in FRACTIONS if os.environ.get(name)}
    if len(told) > 1:
        raise ConfigError(f"{' and '.join(told)} are both set, which JAX refuses; unset the latter")
    for name, text in told.items():
        try:
            return float(text)
        except ValueError:
            raise ConfigError(f"{name}={text}: must be a number, such as 0.88") from None
    cheaper = patches.get("expert_tiles") and patches.get("attention_blocks")
    return 0.80 if cheaper else DEFAULT_FRACTION


def gpu_environment(patches: Mapping[str, Any]) -> dict[str, str]:
    """What JAX and XLA read of the environment on a GPU; what the user has set stays.

    The scheduler hides the gradients' all-reduce behind the backward pass. MaxText's own way to say
    so, `compile_xla_flags`, has no effect on the step that runs (traps.py).

    Raises:
        ConfigError: See `memory_fraction`.
    """
    fraction, flags = memory_fraction(patches), os.environ.get("XLA_FLAGS", "")
    found = {} if any(map(os.environ.get, FRACTIONS)) else {MEMORY_FRACTION: str(fraction)}
    if _SCHEDULER not in flags:
        found["XLA_FLAGS"] = f"{flags} --{_SCHEDULER}=true".strip()
    return found


@contextlib.contextmanager
def environment(plan: "Plan") -> Iterator[None]:
    """Sets it, and puts back what was there at the end."""
    values: dict[str, str] = {}
    if plan.config["hardware"] == "cpu":
        values["JAX_PLATFORMS"] = "cpu"
        flag = "--xla_force_host_platform_device_count"
        flags = os.environ.get("XLA_FLAGS", "")
        if flag not in flags:
            values["XLA_FLAGS"] = f"{flags} {flag}={plan.target.devices}".strip()
    elif str(plan.config["hardware"]).startswith("gpu"):
        values |= gpu_environment(plan.patches)
        # Left to itself JAX takes the CPU where CUDA fails. MaxText puts some arrays on the CPU.
        values["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cuda,cpu"
    values["TOKENIZERS_PARALLELISM"] = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    # MaxText itself changes some of these.
    touched = {*values, "XLA_FLAGS", "LIBTPU_INIT_ARGS", "TFDS_DATA_DIR"}
    before = {key: os.environ.get(key) for key in touched}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
