"""Disk, GPUs, targets and the report as a whole; nothing here compiles or needs a network."""

import io
import json
import os
import stat
from pathlib import Path

import pytest
from moeconv_train.preflight import LOCAL, T4X2, PreflightReport, RunSettings, preflight
from moeconv_train.preflight import memory as compiled
from moeconv_train.preflight.case import Case
from moeconv_train.preflight.check import check_gpus
from moeconv_train.preflight.config import maxtext_defaults, overrides, resolve
from moeconv_train.preflight.disk import check_disk
from moeconv_train.preflight.target import Gpu, Target, gpus, local
from moeconv_train.recipe import read_config

from moeconv.errors import MoeconvError, UsageError

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
RECIPE = read_config(CONFIGS / "llama3_moe_200m_tinystories.yml")
T4 = Gpu("Tesla T4", 15_360 * 2**20, (7, 5))
KNOWN = {"tokenizer_size": 128_256, "pad_id": -1, "wandb": False, "state_bytes": 3_645_453_372}


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi that says `lines` before everything else on PATH."""

    def make(lines: str, code: int = 0) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\nprintf '{lines}'\nexit {code}\n")
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    return make


def disk(directory: Path, state_bytes: int | None, **changes: object):
    keys = {**RECIPE, "base_output_directory": str(directory), **changes}
    return check_disk(Case.of(keys, RunSettings(), T4X2), state_bytes)


def test_the_disk_must_hold_one_checkpoint_more_than_are_kept(tmp_path, monkeypatch):
    free = {"bytes": 300}
    monkeypatch.setattr(
        "moeconv_train.preflight.disk.shutil.disk_usage",
        lambda _: type("usage", (), {"free": free["bytes"]}),
    )
    assert disk(tmp_path / "not" / "there", 100).status == "ok"
    free["bytes"] = 299
    finding = disk(tmp_path, 100)
    assert finding.status == "refused"
    assert "299 B free" in finding.message and "300 B" in finding.message
    # What a resumed run has already needs no new space.
    for step in ("200", "400", "400.orbax-checkpoint-tmp"):
        (tmp_path / RECIPE["run_name"] / "checkpoints" / step).mkdir(parents=True)
    free["bytes"] = 100
    assert disk(tmp_path, 100).status == "ok"
    free["bytes"] = 99
    assert disk(tmp_path, 100).status == "refused"


def test_data_that_are_not_prepared_yet_need_space_too(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 310})
    monkeypatch.setattr("moeconv_train.preflight.disk.shutil.disk_usage", lambda _: usage)
    keys = {**RECIPE, "base_output_directory": str(tmp_path)}

    def check(data):
        return check_disk(Case.of(keys, RunSettings(data_bytes=data), T4X2), 100)

    assert check(0).status == check(10).status == check(None).status == "ok"
    assert "not counted" in check(None).message
    assert check(11).status == "warn" and "prepared about 11 B" in check(11).message


def test_disks_that_are_not_measured(tmp_path):
    assert disk(tmp_path, None).status == "skipped"
    assert disk(tmp_path, 1, enable_checkpointing=False).status == "note"
    assert disk(tmp_path, 1, max_num_checkpoints_to_keep=None).status == "refused"
    assert disk("gs://bucket", 1).status == "skipped"


def test_the_real_disk(tmp_path):
    assert disk(tmp_path, 1).status == "ok"
    assert disk(tmp_path, 10**18).status == "refused"


def test_gpus_are_those_of_nvidia_smi(smi):
    smi("Tesla T4, 15360, 7.5\\nTesla T4, 15360, 7.5\\n")
    assert gpus() == [T4, T4]
    smi("NVIDIA-SMI has failed because it could not communicate with the driver", code=9)
    assert gpus() == []


@pytest.mark.parametrize(
    ("found", "target", "status", "says"),
    [
        ([], T4X2, "note", "No NVIDIA GPU"),
        ([], LOCAL, "warn", "No NVIDIA GPU"),
        ([T4, T4], T4X2, "ok", "no bfloat16"),
        ([T4], T4X2, "warn", "set ici_data_parallelism=1"),
        ([Gpu("Tesla P100", 2**34, (6, 0))], LOCAL, "warn", "no tensor cores"),
        ([Gpu("Tesla V100", 2**34, (7, 0))], LOCAL, "warn", "not the T4"),
        ([Gpu("NVIDIA H200", 2**37, (9, 0))], LOCAL, "warn", "dtype=bfloat16 is possible"),
    ],
)
def test_what_is_said_of_gpus(found, target, status, says):
    finding = check_gpus(found, target)
    assert (finding.status, says in finding.message) == (status, True), finding.message


def test_the_gpus_of_this_machine_as_a_target():
    target = local([T4, T4])
    assert (target.name, target.devices, target.has_bf16) == ("2xTesla T4", 2, False)


def test_the_t4_and_how_much_of_it_jax_takes(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert round(T4X2.usable / 2**30, 2) == 13.40
    assert f"device_memory_size: {T4X2.memory}" in T4X2.target_config
    assert 'device_description_str: "Tesla T4"' in T4X2.target_config
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert T4X2.usable == T4X2.memory // 2


def test_a_whole_report(tmp_path):
    keys = {
        **RECIPE,
        "base_output_directory": str(tmp_path),
        "max_num_checkpoints_to_keep": None,
        "capacity_factor": 1.5,
    }
    report = preflight(keys, KNOWN, target=T4X2, memory=False, online=False)
    statuses = {finding.check: finding.status for finding in report.findings}
    assert statuses["token dropping"] == "warn"
    assert statuses["checkpoints kept"] == "mended"
    assert report.mended == {"max_num_checkpoints_to_keep": 2}
    # The other checks see the mended run: two checkpoints and one being saved.
    assert "2 checkpoints of 3.65 GB and one being saved" in report.of("disk").message
    assert report.ok == (statuses["disk"] == "ok")

    assert PreflightReport.model_validate(json.loads(report.model_dump_json())) == report
    from rich.console import Console

    console = Console(width=240, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "max_num_checkpoints_to_keep=2" in text and "capacity_factor=1.5 drops" in text


def test_a_refused_run_is_not_compiled(tmp_path):
    keys = {**RECIPE, "base_output_directory": str(tmp_path), "vocab_size": 128_000}
    report = preflight(keys, KNOWN, target=T4X2, memory=True, online=False)
    assert [finding.check for finding in report.refused] == ["vocabulary"]
    assert report.of("memory").status == "skipped" and report.memory is None


def test_without_the_plugin_there_is_a_sentence_and_no_guess(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_PLUGINS", ("no_such_plugin",))
    monkeypatch.delenv(compiled.PLUGIN_DIRECTORY, raising=False)
    keys = {**RECIPE, "base_output_directory": str(tmp_path)}
    report = preflight(keys, KNOWN, target=T4X2, memory=True, online=False)
    finding = report.of("memory")
    assert finding.status == "warn" and report.memory is None
    assert finding.message.startswith("Memory was not checked: ")
    assert finding.message.endswith('pip install "moeconv[train,cuda12]"')

    monkeypatch.setenv(compiled.PLUGIN_DIRECTORY, str(tmp_path))
    with pytest.raises(compiled.PluginMissingError, match="pip install --no-deps --target"):
        compiled.plugin_environment()


def test_a_run_on_the_cpu_says_why_memory_is_not_checked(tmp_path):
    keys = {**RECIPE, "base_output_directory": str(tmp_path), "hardware": "cpu"}
    report = preflight(keys, KNOWN, target=T4X2, memory=True, online=False)
    assert report.of("memory").message.startswith("Memory was not checked: hardware=cpu")


def test_without_a_gpu_there_is_nothing_to_compile_for_it(monkeypatch, tmp_path):
    (tmp_path / "jax_cuda12_plugin").mkdir()
    monkeypatch.setenv(compiled.PLUGIN_DIRECTORY, str(tmp_path))
    monkeypatch.setattr(compiled, "gpus", lambda: [])
    with pytest.raises(MoeconvError, match="There is no NVIDIA GPU here"):
        compiled.measure(RECIPE, LOCAL)


def test_a_setting_that_is_not_known():
    with pytest.raises(UsageError, match="'epochs'"):
        preflight({}, {"epochs": 2}, online=False)


def test_a_resolved_config_says_the_same_as_its_overrides():
    resolved = {**resolve(RECIPE), "num_target_devices": 2, "logical_axis_rules": (("a", "b"),)}
    assert overrides(resolved) == overrides(RECIPE)
    assert overrides(RECIPE)["vocab_size"] == 128_256
    assert overrides({}) == {}
    assert maxtext_defaults()["max_num_checkpoints_to_keep"] is None


def test_the_ladder_keeps_the_batch_and_the_model():
    rungs = compiled.ladder(RECIPE)
    assert rungs[0].name == "num_vocab_tiling=4"
    assert rungs[1].overrides == {"remat_policy": "save_dot_except_mlpwi"}
    assert rungs[3].overrides == {"remat_policy": "full"}
    for rung in rungs:
        given = resolve({**RECIPE, **rung.overrides})
        assert given["per_device_batch_size"] * given["gradient_accumulation_steps"] == 4
        assert set(rung.overrides) <= {
            "num_vocab_tiling",
            "remat_policy",
            "per_device_batch_size",
            "gradient_accumulation_steps",
        }
    assert len({str(rung.overrides) for rung in rungs}) == len(rungs)
    assert compiled.ladder({**RECIPE, "scan_layers": True})[0].overrides == {"scan_layers": False}
    last = compiled.ladder({"remat_policy": "full", "num_vocab_tiling": 8, "scan_layers": False})
    assert all("gradient_accumulation_steps" in rung.overrides for rung in last)


def test_a_target_of_one_device_wants_another_mesh():
    report = preflight(RECIPE, KNOWN, target=Target("1xT4", 1, (7, 5)), memory=False, online=False)
    assert "ici_data_parallelism=1" in report.of("mesh").message
