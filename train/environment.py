"""What JAX and MaxText read from the environment, set for one run."""

import contextlib
import os
from collections.abc import Iterator

from moeconv_train.plan import Plan
from moeconv_train.preflight.target import gpu_environment


@contextlib.contextmanager
def environment(plan: Plan) -> Iterator[None]:
    """Sets it, and puts back what was there at the end."""
    values: dict[str, str] = {}
    if plan.config["hardware"] == "cpu":
        values["JAX_PLATFORMS"] = "cpu"
        flag = "--xla_force_host_platform_device_count"
        flags = os.environ.get("XLA_FLAGS", "")
        if flag not in flags:
            values["XLA_FLAGS"] = f"{flags} {flag}={plan.devices}".strip()
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
