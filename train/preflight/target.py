"""Which GPUs a run is for: two T4s that need not be there, or whatever CUDA devices are."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import resources

from moeconv.errors import ConfigError

# JAX takes 75 % of a GPU unless told otherwise; the trainer sets this.
MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
DEFAULT_FRACTION = 0.92


@dataclass(frozen=True)
class Target:
    """Devices to check for.

    Attributes:
        name: For people.
        devices: How many; 0 means all that are there.
        compute_capability: Of each, None where only the devices know.
        memory: Bytes of each, None likewise.
        config_file: XLA's description of the device in data_files/, for compiling without one.
    """

    name: str
    devices: int
    compute_capability: tuple[int, int] | None = None
    memory: int | None = None
    config_file: str | None = None

    @property
    def usable(self) -> int | None:
        """Bytes of each device that JAX allocates to itself."""
        return None if self.memory is None else int(self.memory * memory_fraction())

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
LOCAL = Target("the GPUs of this machine", 0)


def memory_fraction() -> float:
    """The part of a GPU that JAX will take."""
    return float(os.environ.get(MEMORY_FRACTION) or DEFAULT_FRACTION)


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi describes it; None for what it does not know."""

    name: str
    memory: int | None
    compute_capability: tuple[int, int] | None


def gpus() -> list[Gpu]:
    """The GPUs of this machine; none where there is no driver.

    Raises:
        ConfigError: The driver hangs.
    """
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "-1":
        return []
    query = ["--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run([program, *query], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"{program}: gives no answer about the GPUs ({type(error).__name__}); restart the "
            "machine if it hangs, or set CUDA_VISIBLE_DEVICES=-1 to do without them"
        ) from None
    found: list[Gpu] = []
    for line in result.stdout.splitlines() if result.returncode == 0 else []:
        name, memory, capability = (part.strip() for part in line.rsplit(",", 2))
        # "[N/A]" where the driver does not know, as of memory that is shared with the CPU.
        size = int(memory) * 2**20 if memory.isdigit() else None
        digits = re.fullmatch(r"(\d+)\.(\d+)", capability)
        found.append(Gpu(name, size, (int(digits[1]), int(digits[2])) if digits else None))
    return _visible(found)


def _visible(found: list[Gpu]) -> list[Gpu]:
    """Those that CUDA shows to a process: up to the first of CUDA_VISIBLE_DEVICES that is none."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None or "-" in shown.removeprefix("-1"):  # not said, or by UUID
        return found
    indices = []
    for word in shown.split(","):
        if not (word.strip().isdigit() and int(word) < len(found)):
            break
        indices.append(int(word))
    return [found[index] for index in indices]


def local(found: list[Gpu]) -> Target:
    """The target that the GPUs of this machine are: as many as there are of the first kind."""
    first = found[0]
    return Target(f"{len(found)}x{first.name}", len(found), first.compute_capability, first.memory)
