"""What is decided before MaxText is imported: data, steps, evaluations, devices, model size."""

import importlib
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_runner import moeconv
from hypothesis import given, settings
from hypothesis import strategies as st
from moeconv_train import feed, plan, recipe, run_dir, start, trainer, values
from moeconv_train.environment import environment
from moeconv_train.model_size import model_size, peak
from moeconv_train.preflight import check, memory
from moeconv_train.preflight import config as preflight_config
from moeconv_train.preflight.target import T4X2, Gpu, gpus, local
from moeconv_train.settings import EMBEDDED, DataSettings
from moeconv_train.sidecar import public_config
from moeconv_train.steps import evaluations

from moeconv.arch.sidecar import RunFacts, RunSidecar
from moeconv.errors import ConfigError, TimeLimitError, UsageError

T4 = Gpu("Tesla T4", 15 * 2**30, (7, 5))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The embedded corpus as the tiny recipe wants it."""
    data = DataSettings(source=EMBEDDED, tokenizer=EMBEDDED)
    found = feed.Feed("prepared", data, tmp_path_factory.mktemp("data"))
    return feed.prepare(found, 128, progress=lambda _: None, note=lambda _: None).directory


def planned(*words, found=()):
    return plan.make(recipe.read(words), list(found))


def tiny(prepared, *words):
    return planned("tiny_cpu", f"run.data.directory={prepared}", *words)


def test_the_default_run_is_for_two_t4s_wherever_it_is_planned():
    made = planned()
    assert made.target == T4X2 and made.devices == 2 and made.batch == 8
    assert made.tokens_per_step == 16_384
    assert made.run_dir == Path("runs", "llama3-moe-200m").absolute()
    assert made.settings["enable_wandb"] is True
    assert planned(found=[T4, T4]).target.name == "2xTesla T4"


def test_steps_are_counted_for_exactly_the_epochs(prepared):
    made = tiny(prepared, "run.epochs=3")
    # 375 rows, 8 a step: the last batch of three epochs is not full.
    assert (made.steps, made.available) == (141, 141)
    assert made.config["num_epoch"] == 3 and made.epochs == 3
    assert made.config["eval_interval"] == 47 and made.config["eval_start_step"] == 46


def test_before_the_data_are_there_steps_are_about_those_of_the_epochs(tmp_path):
    all_moe, where = "llama3_moe_200m_tinystories_all_moe", f"base_output_directory={tmp_path}"
    assert planned(all_moe, where).steps == 57_700
    made = planned(all_moe, where, "run.epochs=1")
    assert made.steps == 28_850 and made.epochs is None  # told as "about"
    assert made.config["eval_interval"] == 28_850
    assert planned(all_moe, where, "run.epochs=1", "steps=10").steps == 10
    begun = start.plan_run(["tiny_cpu", where], network=False)
    assert begun.plan.config["eval_interval"] == 47
    assert "no evaluation" not in [finding.check for finding in begun.report.findings]
    never = planned("tiny_cpu", where, "run.evaluations_per_epoch=0")
    assert never.config["eval_interval"] == -1


def test_data_that_are_to_be_prepared_are_about_the_recipes_or_the_files(prepared, tmp_path):
    where = f"base_output_directory={tmp_path}"
    assert planned(where).known().data_bytes == pytest.approx(1.9e9, rel=0.02)
    assert planned(where, "steps=10").known().data_bytes == pytest.approx(1.9e9, rel=0.02)
    assert planned(where, "run.data.source=some/other").known().data_bytes is None
    (tmp_path / "a.jsonl").write_text("x" * 100)
    assert planned(where, f"run.data.source={tmp_path}/a.jsonl").known().data_bytes == 100
    assert tiny(prepared).known().data_bytes == planned("tiny_cpu", where).known().data_bytes == 0


def test_fewer_steps_may_be_given(prepared):
    made = tiny(prepared, "run.epochs=2", "steps=10")
    assert (made.steps, made.available, made.config["num_epoch"]) == (10, 94, 2)
    assert made.epochs == pytest.approx(10 / 47)
    assert (made.config["eval_interval"], made.config["eval_start_step"]) == (10, 9)


def test_more_steps_than_there_are_batches_are_refused(prepared):
    words = ["tiny_cpu", f"run.data.directory={prepared}", "run.epochs=1", "steps=48"]
    begun = start.plan_run(words, network=False)
    with pytest.raises(ConfigError, match="steps=48 is more than the 47 batches"):
        start.refuse(begun)


def test_steps_without_epochs_take_as_many_epochs_as_they_need(prepared):
    made = tiny(prepared, "run.epochs=none", "steps=100")
    assert made.config["num_epoch"] == 3 and made.steps == 100


@pytest.mark.parametrize("batch", [1, 2, 4, 7])
@pytest.mark.parametrize("steps", [1, 47, 94, 1000, 5000])
def test_epochs_for_steps_are_enough_and_not_one_too_many(prepared, steps, batch):
    # 375 rows; an epoch's last batch is filled with rows of the next.
    words = ["run.epochs=none", f"steps={steps}", f"per_device_batch_size={batch}"]
    made = tiny(prepared, *words)
    assert made.available >= steps
    assert (made.config["num_epoch"] - 1) * 375 < steps * made.batch
    start.refuse(start.plan_run(["tiny_cpu", f"run.data.directory={prepared}", *words]))


def test_epochs_are_not_given_behind_our_back(prepared):
    with pytest.raises(UsageError, match=r"num_epoch=3: .* set run\.epochs=3 instead"):
        tiny(prepared, "num_epoch=3")
    with pytest.raises(UsageError, match="num_epoch=3"):
        planned("num_epoch=3")  # before the data are prepared


def test_evaluations_are_the_users_if_said(prepared):
    made = tiny(prepared, "eval_interval=5", "eval_start_step=3")
    assert (made.config["eval_interval"], made.config["eval_start_step"]) == (5, 3)
    assert tiny(prepared, "run.evaluations_per_epoch=0").config["eval_interval"] == -1
    often = tiny(prepared, "run.epochs=2", "run.evaluations_per_epoch=3").config
    assert (often["eval_interval"], often["eval_start_step"]) == (15, 18)


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 4), st.integers(1, 5))
def test_the_last_evaluation_is_of_the_last_step(steps, epochs, each):
    made = planned("tiny_cpu", f"run.evaluations_per_epoch={each}")
    epoch = steps / epochs
    found = evaluations(made, True, steps, epoch)
    interval, first = found["eval_interval"], found["eval_start_step"]
    at = [s for s in range(steps) if s >= first and (s - first) % interval == 0]
    assert at[-1] == steps - 1
    assert len(at) == min(steps, epochs * each)


def test_data_that_do_not_fit_are_refused(prepared):
    with pytest.raises(ConfigError, match="rows of 128 tokens and max_target_length is 64"):
        tiny(prepared, "max_target_length=64")
    with pytest.raises(ConfigError, match="its tokenizer has 1024 ids and vocab_size is 512"):
        tiny(prepared, "vocab_size=512")
    with pytest.raises(ConfigError, match=r"per_device_batch_size=0\.5: must be a whole number"):
        tiny(prepared, "per_device_batch_size=0.5")


def test_prepared_files_by_their_maxtext_name_are_ours(prepared):
    files = prepared / "train-*.array_record"
    made = planned("tiny_cpu", f"grain_train_files={files}", "run.epochs=1")
    assert made.feed.kind == "prepared" and made.feed.packed and made.steps == 47


def test_files_of_others_are_maxtexts(tmp_path):
    made = planned("tiny_cpu", f"grain_train_files={tmp_path}/rows.array_record", "steps=9")
    assert made.feed.kind == "maxtext" and made.steps == 9 and made.epochs is None
    assert planned("tiny_cpu", "dataset_type=synthetic").feed.kind == "maxtext"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("steps=abc", "steps=abc: must be a whole number"),
        ("steps=20.5", r"steps=20\.5: must be a whole number"),
        ("steps=0", "steps=0: must be 1 or more"),
        ("steps=-5", "steps=-5: must be 1 or more"),
        ("steps=none", "steps=none: must be a whole number"),
        ("per_device_batch_size=abc", "per_device_batch_size=abc: must be a number"),
        ("base_emb_dim=abc", "base_emb_dim=abc: must be a whole number"),
        ("learning_rate=abc", "learning_rate=abc: must be a number, 0 or more"),
        ("scan_layers=abc", "scan_layers=abc: must be true or false"),
        ("dtype=bf16", "dtype=bf16: must be one of bfloat16, "),
        ("hardware=xpu", "hardware=xpu: must be one of cpu, gpu, gpu_multiprocess, tpu"),
        ("model_name=mixtral-8x8b", "model_name=mixtral-8x8b: must be .* such as mixtral-8x7b"),
        ("weight_dtype=flaot32", "weight_dtype=flaot32: must be one of"),
        ("remat_policy=foo", "remat_policy=foo: must be one of full"),
        ("num_experts_per_tok=9", "num_experts_per_tok=9: must be at most num_experts, which is 4"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_key(tmp_path, word, told):
    with pytest.raises(UsageError, match=told):
        planned("tiny_cpu", word)
    key, _, value = word.partition("=")
    file = tmp_path / "mine.yml"
    file.write_text(f"num_experts: 4\n{key}: {value}\n")
    with pytest.raises(ConfigError, match=rf"mine\.yml: {told}"):
        planned(str(file))


def test_values_that_maxtext_itself_has_are_none_of_another_kind():
    maxtexts = preflight_config.maxtext_defaults()
    values.check_values(maxtexts, recipe._types(), "", ConfigError)
    assert planned("tiny_cpu", "learning_rate=1e-3").config["learning_rate"] == 1e-3


def test_a_finished_run_is_compared_before_it_is_called_finished(prepared, tmp_path, monkeypatch):
    where = f"base_output_directory={tmp_path}"
    made = tiny(prepared, where, "steps=20")
    made.run_dir.mkdir()
    told = {"learning_rate_schedule_steps": -1, **public_config(made.config), **made.told}
    facts = RunFacts(dataset_digest=made.feed.dataset.digest)
    before = RunSidecar(format="moeconv-run", version=1, config=public_config(told), run=facts)
    sidecar = made.run_dir / "moeconv.json"
    sidecar.write_text(before.model_dump_json())
    monkeypatch.setattr(run_dir, "saved_step", lambda _: 19)
    notes = []

    def again(*words):
        return trainer.train(tiny(prepared, where, *words), note=notes.append)

    assert again("steps=20").completed == 20 and "all 20 steps are trained" in notes[-1]
    with pytest.raises(ConfigError, match=r"learning_rate was 0\.003 and is 0\.1"):
        again("steps=20", "learning_rate=0.1")
    with pytest.raises(ConfigError, match="learning_rate_schedule_steps was 20 and is 10"):
        again("steps=10")
    with pytest.raises(ConfigError, match="has 20 steps already, more than steps=10"):
        again("steps=10", "learning_rate_schedule_steps=20")
    sidecar.write_text("{")
    with pytest.raises(ConfigError, match=r"moeconv\.json: the file"):
        again("steps=20")


def test_a_run_without_data_is_refused(tmp_path):
    (tmp_path / "mine.yml").write_text("dataset_type: grain\nhardware: cpu\n")
    with pytest.raises(UsageError, match=r"there is no data to train on: set run\.data\.source"):
        planned(str(tmp_path / "mine.yml"))
    (tmp_path / "mine.yml").write_text("dataset_type: grain\ngrain_train_files: a*\n")
    with pytest.raises(UsageError, match="both name data"):
        planned(str(tmp_path / "mine.yml"), "run.data.source=stories.txt")
    with pytest.raises(ConfigError, match="no prepared dataset"):
        planned("tiny_cpu", "run.data.source=none", f"run.data.directory={tmp_path}")


def test_a_damaged_dataset_is_refused(prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    shard = next(copy.glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="absent or not of the"):
        tiny(copy)


def ready(begun):
    return start.with_data(begun, note=lambda _: None, progress=lambda _: None, quiet=True)


def test_data_that_are_there_are_those_that_are_asked_for(prepared, tmp_path):
    words = ["tiny_cpu", f"run.data.directory={prepared}"]
    assert ready(start.plan_run(words, network=False)).plan.steps == 188
    stories = tmp_path / "stories.txt"
    stories.write_text("another story")
    for other in (f"run.data.source={stories}", "run.data.layout=stories", "run.data.seed=1"):
        begun = start.plan_run([*words, other], network=False)
        with pytest.raises(
            ConfigError, match=r"with another .*; give another run\.data\.directory"
        ):
            ready(begun)


def test_preparing_counts_for_the_time_limit(tmp_path, monkeypatch):
    hours = itertools.count(step=3600)
    clock = SimpleNamespace(monotonic=lambda: next(hours))
    monkeypatch.setattr(importlib.import_module("moeconv.cli.train"), "time", clock)
    words = ["tiny_cpu", f"base_output_directory={tmp_path}"]
    ran = moeconv("train", *words, "--time-limit", "1h")
    assert ran.code == TimeLimitError.exit_code
    assert "embedded-128: the data were not prepared before the time limit" in ran.error
    assert not (tmp_path / "tiny").exists()


def test_what_is_found_once_rows_are_counted_is_told_and_an_interrupt_names_what_is_saved(
    tmp_path, monkeypatch
):
    stories = tmp_path / "mine.txt"
    stories.write_text("<|endoftext|>".join(f"A story of {n} mice at home." for n in range(9000)))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", interrupted)
    words = ["tiny_cpu", f"run.data.source={stories}", f"base_output_directory={tmp_path}"]
    words += ["run.epochs=1", "learning_rate_schedule_steps=48"]
    ran = moeconv("train", *words)
    assert ran.code == 130
    assert ran.err.count("schedule: learning_rate_schedule_steps=48 ends before steps=") == 1
    assert f"interrupted: {tmp_path}/tiny: nothing was saved" in ran.err
    monkeypatch.setattr(run_dir, "saved_step", lambda _: 19)
    assert "checkpoint 19 is the last one saved" in moeconv("train", *words).err


def test_a_local_source_may_be_gone_once_it_is_prepared(tmp_path):
    stories = tmp_path / "mine.jsonl"
    stories.write_text("".join(f'{{"text": "A story of {n} mice."}}\n' for n in range(200)))
    words = ["tiny_cpu", f"run.data.source={stories}", f"run.data.directory={tmp_path}/rows"]
    first = ready(start.plan_run(words, network=False)).plan
    assert first.steps == first.available > 0
    stories.unlink()
    assert ready(start.plan_run(words, network=False)).plan.steps == first.steps
    other = ["tiny_cpu", "run.data.source=gone.jsonl", f"run.data.directory={tmp_path}/rows"]
    with pytest.raises(ConfigError, match=r"was prepared from mine\.jsonl, not from gone\.jsonl"):
        ready(start.plan_run(other, network=False))


def test_streaming_sets_what_maxtext_needs(tmp_path):
    made = planned("dataset_type=hf", "steps=50")
    config = made.config
    assert made.feed.kind == "hf" and made.steps == 50 and made.epochs is None
    assert (config["hf_path"], config["hf_eval_split"]) == ("roneneldan/TinyStories", "validation")
    assert config["packing"] and config["tokenize_train_data"] and config["grain_worker_count"] == 1
    local = tmp_path / "stories.jsonl"
    local.write_text('{"text": "a"}\n')
    config = planned("dataset_type=hf", f"run.data.source={local}").config
    assert (config["hf_path"], config["hf_train_files"]) == ("json", str(local))
    tiny = planned("tiny_cpu", "dataset_type=hf", f"run.data.source={local}", "run.epochs=1").config
    assert tiny["num_epoch"] == 1, "not the recipe's, which stands for prepared rows"
    assert config["eval_interval"] == -1


def test_a_stream_that_maxtexts_settings_name_is_that_and_no_other(tmp_path):
    mine = planned("dataset_type=hf", "hf_path=other/set", "packing=false")
    config = mine.config
    assert config["hf_path"] == "other/set" and not config["packing"]
    # The recipe's own are for prepared rows.
    assert config["tokenize_train_data"] and config["tokenizer_type"] == "huggingface"
    assert config["eval_interval"] == -1
    assert feed.hub_id(mine.feed) == mine.known().dataset == "other/set"
    assert start.facts(mine)["data"]["source"] == "other/set"
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    files = f"hf_train_files={tmp_path}/*.jsonl"
    local = start.plan_run(
        ["dataset_type=hf", "hf_path=json", files, "hf_eval_split=train"], network=False
    )
    assert feed.hub_id(local.plan.feed) is None and local.plan.config["eval_interval"] > 0
    assert local.report.of("dataset").message == f"{tmp_path}/rows.jsonl is a local path."
    with pytest.raises(UsageError, match=r"hf_path and run\.data\.source: both name data"):
        planned("dataset_type=hf", "hf_path=other/set", "run.data.source=one/more")
    (tmp_path / "mine.yml").write_text("dataset_type: hf\nhf_path: a/b\npacking: false\n")
    assert not planned(str(tmp_path / "mine.yml")).config["packing"]


def test_other_data_of_maxtexts_own_are_another_run(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "moved").mkdir()
    words = ["dataset_type=hf", "hf_path=json", f"tokenizer_path={tmp_path}/tokenizer"]

    def digest(folder, *more):
        return planned(*words, f"hf_train_files={folder}/*.jsonl", *more).source_digest

    begun = digest(tmp_path)
    facts = RunFacts(source_digest=begun)
    before = RunSidecar(format="moeconv-run", version=1, config={}, run=facts)
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "moved")
    moved = run_dir.Data(source_digest=digest(tmp_path / "moved"))
    assert run_dir.check_same(tmp_path, before, {}, moved) == []
    (tmp_path / "rows.jsonl").write_text('{"text": "other"}\n')
    for other in (digest(tmp_path), digest(tmp_path / "moved", "train_split=x"), None):
        with pytest.raises(ConfigError, match="the data or the tokenizer have other names"):
            run_dir.check_same(tmp_path, before, {}, run_dir.Data(source_digest=other))
    assert planned("dataset_type=synthetic").source_digest != begun


def test_other_releases_are_told(tmp_path):
    then = {"jax": "0.1", "maxtext": "0.2.5", "grain": "0.1"}
    before = RunSidecar(
        format="moeconv-run", version=1, config={}, moeconv_version="0.0.9", versions=then
    )
    (note,) = run_dir.check_same(tmp_path, before, {}, run_dir.Data())
    assert note.startswith("moeconv was 0.0.9 and is ") and ", jax was 0.1 and is " in note
    assert note.endswith("the last bits may differ") and "grain" not in note


def test_what_a_stream_cannot_read():
    with pytest.raises(UsageError, match="streams from the Hub or from one local file"):
        planned("tiny_cpu", "dataset_type=hf")


def test_hardware_that_is_not_said_is_what_there_is(tmp_path):
    (tmp_path / "mine.yml").write_text("dataset_type: synthetic\n")
    assert planned(str(tmp_path / "mine.yml")).settings["hardware"] == "cpu"
    made = planned(str(tmp_path / "mine.yml"), found=[T4])
    assert made.settings["hardware"] == "gpu" and made.run_dir.name == "mine"
    assert made.settings["skip_jax_distributed_system"] is True


def test_a_bucket_is_no_place_for_a_run():
    with pytest.raises(ConfigError, match="writes to a local folder"):
        planned("tiny_cpu", "base_output_directory=gs://bucket/runs")


@pytest.mark.parametrize("name", ["../../x", "/abs", "a/../../x", ".", "./"])
def test_a_run_stays_below_its_directory(name):
    with pytest.raises(ConfigError, match=r"leaves runs; name a folder below it"):
        planned("tiny_cpu", f"run_name={name}")


def test_a_run_may_lie_deeper_but_has_a_name():
    assert planned("tiny_cpu", "run_name=a/b").run_dir == Path("runs/a/b").absolute()
    with pytest.raises(UsageError, match="run_name: is empty; is a shell variable not set"):
        planned("tiny_cpu", "run_name=")


def test_the_command_line_for_maxtext_has_each_key_once(prepared):
    made = tiny(prepared, "learning_rate=1e-4", "steps=5")
    argv = made.argv()
    keys = [word.split("=", 1)[0] for word in argv[2:]]
    assert argv[:2] == ["", str(made.recipe.file)] and len(keys) == len(set(keys))
    assert "learning_rate=1e-4" in argv and "enable_wandb=false" in argv


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        (0.5, "0.5"),
        ("a/b-*.x", "a/b-*.x"),
        ("with space", "with space"),
        ("a #b", '"a #b"'),
        ("007", '"007"'),
        (["text"], '["text"]'),
    ],
)
def test_what_we_say_is_read_as_it_is_meant(value, text):
    from omegaconf import OmegaConf

    assert plan.said(value) == text
    read = OmegaConf.from_dotlist([f"key={text}"]).key
    assert read == ("none" if value is None else value)


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("0", 1), ("1,0", 2), ("-1", 0), ("", 0), ("0,7,1", 1)]
)
def test_gpus_are_those_that_cuda_shows(tmp_path, monkeypatch, visible, count):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Tesla T4, 15360, 7.5'\necho 'Tesla T4, 15360, 7.5'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(gpus()) == count


def test_gpus_that_nvidia_smi_does_not_know_all_of(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA GB10, [N/A], 12.1'\necho 'Old, 1024, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = gpus()
    assert found == [Gpu("NVIDIA GB10", None, (12, 1)), Gpu("Old", 2**30, None)]
    assert check.check_gpus(found[1:], local(found[1:])).status == "warn"

    def hangs(*_, **options):
        raise subprocess.TimeoutExpired(str(program), options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(ConfigError, match="gives no answer about the GPUs"):
        gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpus() == []


def test_a_gpu_run_is_told_to_jax_and_never_falls_back(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    words = [f"base_output_directory={tmp_path}", "run.wandb.enabled=false"]
    with environment(planned(*words, found=[T4, T4])):
        assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"
    assert "JAX_PLATFORMS" not in os.environ
    monkeypatch.setattr(memory, "_PLUGINS", ("no_such_plugin",))
    monkeypatch.setattr(check, "gpus", lambda: [T4, T4])
    monkeypatch.setattr(start, "gpus", lambda: [T4, T4])
    with pytest.raises(ConfigError, match=r"would compute on the CPU.*moeconv\[train,cuda12\]"):
        start.refuse(start.plan_run(words, network=False))


def test_a_gpu_run_does_not_train_on_the_cpu():
    """JAX in a process of its own, as this one may not import it."""
    code = "from moeconv_train.trainer import check_gpu; check_gpu()"
    for platforms in ("cpu", "cuda,cpu"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "JAX_PLATFORMS": platforms},
            capture_output=True,
            text=True,
        )
        assert "MissingPackageError: hardware=gpu: JAX computes on" in done.stderr
        assert "moeconv[train,cuda12]" in done.stderr


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


def test_peaks_are_only_those_that_are_known():
    assert peak("Tesla T4", "float16") == 65e12
    assert peak("Tesla T4", "bfloat16") is None and peak("Tesla T4", "float32") is None
    assert peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak("NVIDIA L40S", "float16") == 362e12 and peak("NVIDIA L4", "float16") == 121e12
    assert peak("NVIDIA A100-SXM4-40GB", "bfloat16") == 312e12
    for other in ("L40", "A10G", "T400", "RTX A1000", "T4G", "A100-SXM4-40GB MIG 1g.5gb", "GH200"):
        assert peak(f"NVIDIA {other}", "float16") is None
    assert peak("cpu", "float16") is None and peak("NVIDIA GeForce RTX 9999", "float16") is None
