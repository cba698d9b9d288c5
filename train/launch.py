"""Trains with MaxText's own loop, and leaves beside the checkpoints what they do not record.

A MaxText checkpoint holds no model config (top-k, RoPE theta, norm epsilon, the block kind) and no
tokenizer. The run directory gets both before step 1, so `moeconv convert RUN OUT` needs no flag.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from moeconv_train.data import prepare, read_stories
from moeconv_train.sidecar import write_sidecar

# Stories that lie beside the run, for `moeconv verify`.
SAMPLED = 32


def parse_args(argv: list[str]) -> tuple[Path, Path, dict[str, str]]:
    """The config file, the output directory and the `key=value` overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m moeconv_train",
        description="Train CONFIG with MaxText; the run lies in DIR/<run_name>.",
    )
    parser.add_argument("config", metavar="CONFIG.yml", type=Path)
    parser.add_argument("--output", metavar="DIR", type=Path, required=True)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="MaxText settings")
    args = parser.parse_intermixed_args(argv)
    if not args.config.is_file():
        parser.error(f"there is no config file {args.config}")
    if wrong := [override for override in args.overrides if "=" not in override]:
        parser.error(f"{wrong[0]!r} is not of the form key=value")
    overrides = dict(override.split("=", 1) for override in args.overrides)
    return args.config, args.output.absolute(), overrides


def host_devices(settings: dict[str, Any]) -> int:
    """How many devices the config's mesh spans on one host (an axis of -1 takes what is left)."""
    axes = [int(value) for key, value in settings.items() if key.startswith("ici_")]
    return math.prod(axis for axis in axes if axis > 0)


def use_cpu(devices: int) -> None:
    """Tells jax, which must not be imported yet, to be `devices` CPU devices."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={devices}".strip()


def train(config_file: Path, output: Path, overrides: dict[str, str]) -> None:
    """One run. A second call with the same output and run name resumes it."""
    settings = {**yaml.safe_load(config_file.read_text(encoding="utf-8")), **overrides}
    if settings.get("hardware") == "cpu":
        use_cpu(host_devices(settings))
    sample: list[str] = []
    if settings.get("dataset_type") == "grain" and not settings.get("grain_train_files"):
        overrides = {**prepare(output / "data").overrides(), **overrides}
        sample = read_stories()[:SAMPLED]
    overrides = {"base_output_directory": str(output), **overrides}

    from maxtext.trainers.pre_train import train as maxtext

    argv = ["", str(config_file), *(f"{key}={value}" for key, value in overrides.items())]
    config, recorder = maxtext.initialize(argv)
    write_sidecar(config.get_keys(), sample)
    maxtext.get_train_func(config, recorder, argv)()


def main() -> None:
    """The command line; absl's `run` sets up the logging that MaxText's messages go through."""
    config_file, output, overrides = parse_args(sys.argv[1:])

    from absl import app

    app.run(lambda _: train(config_file, output, overrides), argv=sys.argv[:1])
