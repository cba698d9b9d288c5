"""GPUs that are there or not, and the model's size, FLOPs and peaks."""

import os
import re
import subprocess
import sys

import pytest
from moeconv_train import recipe, start, trainer
from moeconv_train.model_size import model_size, peak
from moeconv_train.preflight import memory
from moeconv_train.preflight.target import environment, gpus
from plan_lab import TWO_T4S, planned

from moeconv.errors import ConfigError, MissingPackageError
from moeconv.families import blocks


def test_hardware_that_is_not_said_is_what_there_is(tmp_path):
    (tmp_path / "mine.yml").write_text("dataset_type: synthetic\n")
    assert planned(str(tmp_path / "mine.yml")).settings["hardware"] == "cpu"
    made = planned(str(tmp_path / "mine.yml"), found=TWO_T4S)
    assert made.settings["hardware"] == "gpu" and made.run_dir.name == "mine"
    assert made.settings["skip_jax_distributed_system"] is True


def test_a_driver_that_hangs_is_told(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def hangs(*_, **options):
        raise subprocess.TimeoutExpired(str(program), options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(ConfigError, match="gives no answer about the GPUs"):
        gpus()


def test_a_gpu_run_is_told_to_jax_and_never_falls_back(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    words = [f"base_output_directory={tmp_path}", "run.wandb.enabled=false"]
    with environment(planned(*words, found=TWO_T4S)):
        assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"
    assert "JAX_PLATFORMS" not in os.environ
    monkeypatch.setattr(memory, "_PLUGINS", ("no_such_plugin",))
    monkeypatch.setattr(start, "gpus", lambda: TWO_T4S)
    told = r"cuda: .*would compute on the CPU.*pip install \"\.\[train,cuda12\]"
    with pytest.raises(MissingPackageError, match=told):
        start.plan_run(words, network=False).refuse()


@pytest.mark.maxtext
def test_a_gpu_run_does_not_train_on_the_cpu():
    """Neither where JAX is told so, as here, nor where it falls back."""
    told = r'hardware=gpu: JAX computes on .*pip install "\.\[train,cuda12\]"'
    with pytest.raises(MissingPackageError, match=told), trainer.on_gpu():
        pass
    done = subprocess.run(
        [sys.executable, "-c", "from moeconv_train.trainer import on_gpu\nwith on_gpu(): pass"],
        env={**os.environ, "JAX_PLATFORMS": "cuda,cpu"},
        capture_output=True,
        text=True,
    )
    assert re.search(f"MissingPackageError: {told}", done.stderr)


def test_a_gpu_run_does_not_start_without_one():
    begun = start.plan_run([], network=False)
    with pytest.raises(ConfigError, match="there is no NVIDIA GPU here"):
        start.with_data(begun, note=print, progress=print, quiet=True)


# MaxText's own numbers (test_recipes.py).
@pytest.mark.parametrize(
    ("name", "total"),
    [(recipe.DEFAULT, 303_787_776), ("llama3_moe_200m_tinystories_all_moe", 452_441_856)],
)
def test_parameters_are_maxtexts(name, total):
    size = planned(name).size
    assert size.total == total and size.state_bytes == 12 * total


def test_flops_are_those_of_the_active_parameters():
    config = planned(recipe.DEFAULT).config
    size = model_size(config)
    D, F, V, L, T = 768, 3072, 128_256, 6, 2048
    attention, dense, moe = 4 * D * D, 3 * D * F, 2 * 3 * D * F + 8 * D
    norms = (2 * L + 1) * D
    assert size.active == L * attention + 3 * dense + 3 * moe + V * D + norms
    # Scores and their sum: 2 x 2 x D for each of T / 2 keys and layer, three times with backward.
    assert size.flops == 6 * size.active + 3 * L * 4 * D * T / 2
    assert model_size({**config, "decoder_block": "deepseek"}) is None
    assert model_size({**config, "use_qk_norm": True}) is None


def test_axes_of_one_family_take_the_size_away_from_no_other():
    config = planned(recipe.DEFAULT).config
    sizes = {name: model_size({**config, "decoder_block": name}) for name in blocks()}
    assert sizes["envy"] == model_size(config)
    assert {name for name, size in sizes.items() if size} == {"envy", "mixtral"}


def test_peaks_are_only_those_that_are_known():
    assert peak("Tesla T4", "float16") == 65e12
    assert peak("Tesla T4", "bfloat16") is None and peak("Tesla T4", "float32") is None
    assert peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak("NVIDIA A100-SXM4-40GB", "float16") == 312e12
    for other in ("Tesla T40", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "cpu"):
        assert peak(other, "float16") is None
