"""Disk, GPUs, targets and the report as a whole; nothing here compiles or needs a network."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runner import moeconv
from moeconv_train import run_dir
from moeconv_train.preflight import aot
from moeconv_train.preflight import memory as compiled
from moeconv_train.preflight.check import check_disk, check_gpus, preflight
from moeconv_train.preflight.config import maxtext_defaults, resolve
from moeconv_train.preflight.report import Finding, MemoryRow, Preflight
from moeconv_train.preflight.target import (
    T4X2,
    Target,
    environment,
    gpu_environment,
    gpus,
    memory_fraction,
)
from moeconv_train.recipe import read_config
from plan_lab import TWO_T4S, planned

from moeconv.errors import (
    ConfigError,
    HubError,
    MissingPackageError,
    MoeconvError,
    OutputError,
)

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
RECIPE = read_config(CONFIGS / "llama3_moe_200m_tinystories.yml")
QUIET = ("run.wandb.enabled=false", "run.hub_repo=none")
NEW, OLD = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in (NEW, OLD, "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path):
    """The recipe in a folder of its own, with these words."""

    def make(*words):
        return planned(f"base_output_directory={tmp_path}", *QUIET, *words)

    return make


def checked(plan, **how):
    return preflight(plan, **{"memory": False, "online": False, **how})


STATE = 12 * 303_787_776


@pytest.fixture
def free(monkeypatch):
    """Sets the free bytes of every disk."""

    def make(count):
        usage = type("usage", (), {"free": count})
        monkeypatch.setattr("moeconv_train.preflight.check.shutil.disk_usage", lambda _: usage)

    return make


def test_the_disk_must_hold_one_checkpoint_more_than_are_kept(run, tmp_path, free):
    free(3 * STATE)
    finding = check_disk(planned("base_output_directory=/not/there"))
    assert finding.status == "ok" and "still to be prepared" in finding.message
    free(3 * STATE - 1)
    finding = check_disk(run())
    assert (finding.status, finding.error) == ("refused", OutputError)
    assert "10.9 GB free; 2 checkpoints of 3.65 GB and one being saved need" in finding.message
    # What a resumed run has already needs no new space.
    for step in ("200", "400", "400.orbax-checkpoint-tmp"):
        (tmp_path / RECIPE["run_name"] / "checkpoints" / step).mkdir(parents=True)
    free(STATE)
    assert check_disk(run()).status == "ok"
    free(STATE - 1)
    assert check_disk(run()).status == "refused"


def test_disks_that_are_not_measured(run):
    assert check_disk(run("enable_checkpointing=false")).status == "note"
    assert check_disk(run("decoder_block=simple")).status == "skipped"


@pytest.mark.parametrize(
    ("target", "dtype", "status", "says"),
    [
        (T4X2, "float16", "note", "No NVIDIA GPU"),
        (TWO_T4S, "float16", "ok", "2xTesla T4"),
        (Target("1xTesla P100", 1, (6, 0)), "float16", "warn", "no tensor cores"),
        (Target("1xTesla V100", 1, (7, 0)), "float16", "ok", "V100"),
        (Target("1xNVIDIA H200", 1, (9, 0)), "float16", "note", "dtype=bfloat16"),
        (Target("1xNVIDIA H200", 1, (9, 0)), "bfloat16", "ok", "H200"),
        (Target("1xOld", 1), "float16", "warn", "no tensor cores that nvidia-smi knows of"),
    ],
)
def test_what_there_is_against_what_the_run_is_for(monkeypatch, target, dtype, status, says):
    monkeypatch.setattr(compiled, "plugin_installed", lambda: True)
    (finding,) = check_gpus(target, dtype)
    assert (finding.status, says in finding.message) == (status, True), finding.message


def test_the_memory_fraction_leaves_room_and_is_the_users_if_said(monkeypatch):
    both = {"expert_tiles": True, "attention_blocks": True}
    assert memory_fraction({"expert_tiles": True}) == 0.88 and memory_fraction(both) == 0.80
    assert gpu_environment({})[NEW] == "0.88"
    for name in (NEW, OLD):
        with monkeypatch.context() as patch:
            patch.setenv(name, "0.5")
            assert memory_fraction(both) == 0.5
            assert not {NEW, OLD} & gpu_environment(both).keys()
    monkeypatch.setenv(NEW, "most")
    with pytest.raises(ConfigError, match=f"{NEW}=most: must be a number"):
        memory_fraction({})
    monkeypatch.setenv(OLD, "0.9")
    with pytest.raises(ConfigError, match=f"{NEW} and {OLD} are both set, which JAX refuses"):
        checked(planned())  # before anything is prepared
    checked(planned("tiny_cpu"))  # which is none of a CPU's business


def test_a_gpu_run_hides_communication_unless_the_user_says_otherwise(monkeypatch, run):
    with environment(run()):
        assert os.environ["XLA_FLAGS"] == f"{SCHEDULER}=true"
        assert os.environ[NEW] == str(memory_fraction(run().patches))
        assert os.environ["JAX_PLATFORMS"] == "cpu"  # as this process was told
    assert "XLA_FLAGS" not in os.environ and NEW not in os.environ
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    assert gpu_environment({})["XLA_FLAGS"] == f"--xla_dump_to=x {SCHEDULER}=true"
    monkeypatch.setenv("XLA_FLAGS", f"{SCHEDULER}=false")
    assert "XLA_FLAGS" not in gpu_environment({})
    with environment(planned("tiny_cpu")):
        assert NEW not in os.environ


def test_the_compiler_sees_the_flags_and_memory_of_the_run(monkeypatch):
    asked = {}

    def answers(request, environment):
        asked.update(request=request, environment=environment)
        return []

    monkeypatch.setattr(compiled, "plugin_environment", lambda: {})
    monkeypatch.setattr(compiled, "_answers", answers)
    both = {"expert_tiles": True, "attention_blocks": True}
    compiled.measure(RECIPE, T4X2, [compiled.Variant("as given", {}, both)])
    (variant,) = asked["request"]["variants"]
    assert asked["request"]["usable"] == int(0.80 * T4X2.memory) and variant["patches"] == both
    flags = asked["environment"]["XLA_FLAGS"].split()
    assert flags == [f"{SCHEDULER}=true", "--xla_force_host_platform_device_count=2"]
    # What MaxText's base.yml says itself is not repeated.
    config, defaults = asked["request"]["config"], maxtext_defaults()
    assert config["vocab_size"] == 128_256 and "megablox" in config
    assert all(key not in defaults or defaults[key] != value for key, value in config.items())


def test_a_whole_report(run):
    plan = run("max_num_checkpoints_to_keep=none", "inhomogeneous_layer_cycle_interval=1")
    plan = replace(plan, derived={**plan.derived, "decoder_block": "mixtral"})
    report = checked(plan)
    statuses = {finding.check: finding.status for finding in report.findings}
    assert statuses["interleaving"] == "warn" and statuses["checkpoints kept"] == "mended"
    assert report.plan.mended == {"max_num_checkpoints_to_keep": 2}
    # The other checks see the mended run: two checkpoints and one being saved.
    assert "2 checkpoints of " in report.of("disk").message
    told = json.loads(json.dumps(report.to_json()))
    assert [each["check"] for each in told["findings"]] == list(statuses)
    text = "\n".join(report.lines())
    assert "max_num_checkpoints_to_keep=2" in text and "ignores interleave_moe" in text


def test_a_refused_run_is_not_compiled(run):
    report = checked(run("vocab_size=128000"), memory=True)
    assert [each.check for each in report.findings if each.status == "refused"] == ["vocabulary"]
    assert report.of("memory").status == "skipped" and report.memory == []


def test_without_the_plugin_there_is_a_sentence_and_no_guess(run, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_PLUGINS", ("no_such_plugin",))
    monkeypatch.delenv(compiled.PLUGIN_DIRECTORY, raising=False)
    said = []
    report = checked(run(), memory=True, progress=said.append)
    finding = report.of("memory")
    assert finding.status == "warn" and report.memory == []
    assert finding.message.startswith("Memory was not checked: ")
    assert finding.message.endswith('pip install ".[train,cuda12]".')
    assert said == []  # that it compiles
    # In the answer of --check once, and not as a warning besides.
    ran = moeconv("train", "--check", f"base_output_directory={tmp_path}", *QUIET)
    assert ran.code == 0 and ran.out.count("Memory was not checked") == 1
    assert "compiling" not in ran.err and "Memory" not in ran.err

    monkeypatch.setenv(compiled.PLUGIN_DIRECTORY, str(tmp_path))
    with pytest.raises(MissingPackageError, match="pip install --no-deps --target"):
        compiled.plugin_environment()


def test_what_is_refused_is_told_once(tmp_path):
    words = ["vocab_size=128000", "remat_policy=none", f"base_output_directory={tmp_path}"]
    ran = moeconv("train", "--check", *words, *QUIET)
    assert ran.code == ConfigError.exit_code and "error: vocabulary: vocab_size=128000" in ran.err
    assert "remat: remat_policy=none" in ran.err
    assert "has no rows" not in ran.out and ran.out.count("see below") == 2


@pytest.mark.parametrize("error", [ConfigError, HubError, MissingPackageError, OutputError])
def test_a_refusal_ends_with_the_code_of_its_first_reason(error):
    findings = [
        Finding("gpu", "ok", "Fine."),
        Finding("a", "refused", "Do so.", error=error),
        Finding("b", "refused", "And so."),
    ]
    begun = Preflight(planned(), findings)
    with pytest.raises(error, match=r"^a: Do so\.\nb: And so\.$"):
        begun.refuse()


def test_a_run_on_the_cpu_says_why_memory_is_not_checked(tmp_path):
    report = checked(planned("tiny_cpu", f"base_output_directory={tmp_path}"), memory=True)
    assert report.of("memory").message == "Not compiled: this run is on the CPU."


def test_the_compilers_own_words_where_it_fails(run, monkeypatch):
    monkeypatch.setattr(compiled, "plugin_environment", lambda: {})
    monkeypatch.setattr(compiled, "_answers", lambda *_: [refusal])
    refusal = {"refused": True, "error": "dtype: no such"}
    finding = checked(run(), memory=True).of("memory")
    assert finding.message == "MaxText refuses this config: dtype: no such."
    refusal["refused"] = False
    finding = checked(run(), memory=True).of("memory")
    assert (finding.status, finding.error) == ("refused", MoeconvError)
    assert finding.message == "the run does not compile: dtype: no such."


def test_a_compiler_that_ends_is_told(monkeypatch):
    monkeypatch.setattr(compiled, "plugin_environment", lambda: {"PYTHONPATH": "/nowhere"})
    monkeypatch.setattr(compiled.sys, "executable", "/bin/false")
    with pytest.raises(MoeconvError, match="the compiler's process ended with 1"):
        compiled.measure(RECIPE, T4X2, [compiled.Variant("as given")])


def row(name, **sizes):
    given = {"usable": 100, "evaluation": 0, "xla_rematerialised": False, **sizes}
    return MemoryRow(name=name, outputs=0, aliased=0, **given)


@pytest.mark.parametrize(("until_fit", "answered"), [(True, ["a", "?", "c"]), (False, [*"a?cd"])])
def test_what_is_compiled_ends_with_the_first_that_fits(monkeypatch, until_fit, answered):
    sizes = {"a": 90, "b": None, "c": 20, "d": 10}

    def compiled_row(request, variant, devices, usable):
        if (size := sizes[variant["name"]]) is None:
            raise ValueError("?")
        return row(variant["name"], arguments=size, temporaries=0, usable=usable)

    monkeypatch.setattr(aot, "_devices", lambda config, count: ([], 0))
    monkeypatch.setattr(aot, "_row", compiled_row)
    request = {
        "target_config": "",
        "devices": 2,
        "usable": 50,
        "variants": [{"name": name} for name in sizes],
        "until_fit": until_fit,
    }
    answers = json.loads(json.dumps(aot.serve(request)))
    found = [each["row"]["name"] if "row" in each else each["error"][-1] for each in answers]
    assert found == answered


def test_the_larger_of_both_steps_counts():
    assert row("a", arguments=40, temporaries=30, evaluation=10).total == 70
    late = row("a", arguments=40, temporaries=30, evaluation=61)
    assert late.total == 101 and not late.fits


def test_what_fits_is_named_and_nothing_that_a_resume_refuses(run, monkeypatch):
    asked = []

    def measure(config, target, variants, **_):
        asked.append([variant.name for variant in variants])
        given = row("as given", arguments=99, temporaries=9)
        return [given, row(rung, arguments=9, temporaries=9)], {}

    rung = "remat_policy=full"
    monkeypatch.setattr(compiled, "plugin_environment", lambda: {})
    monkeypatch.setattr(compiled, "measure", measure)
    said = []
    plan = run("scan_layers=true")
    report = checked(plan, memory=True, progress=said.append)
    finding = report.of("memory")
    assert finding.status == "refused" and f"{rung} would need" in finding.message
    assert "train and evaluation step" in said[0] and "scan_layers=false" in asked[0]
    assert report.to_json()["memory"][0]["total"] == 108
    monkeypatch.setattr(run_dir, "saved_step", lambda _: 19)
    checked(plan, memory=True)
    assert asked[1] == [name for name in asked[0] if name != "scan_layers=false"]
    assert len(asked[1]) > 2


def test_the_ladder_keeps_the_batch_and_the_model():
    rungs = compiled.ladder(RECIPE)
    assert rungs[0] == {"num_vocab_tiling": 4}
    assert rungs[1] == {"remat_policy": "save_dot_except_mlpwi"}
    assert rungs[3] == {"remat_policy": "full"}
    for rung in rungs:
        assert all(map(run_dir.may_change, rung))
    assert len({str(rung) for rung in rungs}) == len(rungs)
    assert compiled.ladder({**RECIPE, "scan_layers": True})[0] == {"scan_layers": False}
    last = {"remat_policy": "full", "num_vocab_tiling": 8, "scan_layers": False}
    assert compiled.ladder(last) == []


def test_a_target_of_one_device_wants_another_mesh():
    plan = planned(found=Target("1xT4", 1, (7, 5)))
    assert "ici_data_parallelism=1" in checked(plan).of("mesh").message


def test_maxtexts_defaults_are_those_of_its_own_file():
    assert resolve({"steps": "7"})["steps"] == 7
    assert maxtext_defaults()["max_num_checkpoints_to_keep"] is None


def test_the_t4_is_that_of_the_target_file():
    assert f"device_memory_size: {T4X2.memory}" in T4X2.target_config
    assert 'device_description_str: "Tesla T4"' in T4X2.target_config


def test_gpus_are_those_of_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def smi(script):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    smi("echo 'Tesla T4, 7.5'; echo 'Tesla T4, 7.5'")
    assert gpus() == TWO_T4S
    smi("echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9")
    assert gpus() is None
    smi("echo 'Old, one, [N/A]'")
    assert gpus() == Target("1xOld, one", 1)
    smi('echo "$*, 7.5"')
    assert "--id" not in gpus().name
    for shown, asked in (("1,0", "--id=1,0"), ("GPU-12ab", "--id=GPU-12ab")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert asked in gpus().name
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-12ab")
    assert "--id" not in gpus().name
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert gpus() is None
