"""What is decided before MaxText is imported: data, steps, evaluations."""

import importlib
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_runner import moeconv
from hypothesis import given, settings
from hypothesis import strategies as st
from moeconv_train import feed, run_dir, start, trainer
from moeconv_train.plan import evaluations
from moeconv_train.preflight.target import T4X2
from plan_lab import TWO_T4S, planned, tiny

from moeconv.errors import ConfigError, OutputError, TimeLimitError, UsageError
from moeconv.maxtext.sidecar import RunFacts, RunSidecar


def test_the_default_run_is_for_two_t4s_wherever_it_is_planned():
    made = planned()
    assert made.target == T4X2 and made.target.devices == 2 and made.batch == 8
    assert made.tokens_per_step == 16_384
    assert made.run_dir == Path("runs", "llama3-moe-200m").absolute()
    assert made.settings["enable_wandb"] is True
    assert planned(found=TWO_T4S).target.name == "2xTesla T4"


def test_steps_are_counted_for_exactly_the_epochs(prepared):
    made = tiny(prepared, "run.epochs=3")
    # 375 rows, 8 a step: the last batch of three epochs is not full.
    assert (made.steps, made.available) == (141, 141)
    assert made.config["num_epoch"] == 3 and made.epochs == 3
    assert made.config["eval_interval"] == 47 and made.config["eval_start_step"] == 46


def test_before_the_data_are_there_steps_are_the_recipes(tmp_path):
    all_moe, where = "llama3_moe_200m_tinystories_all_moe", f"base_output_directory={tmp_path}"
    made = planned(all_moe, where, "run.epochs=1")
    assert made.steps == 57_700 and made.epochs is None
    assert "tokens, until they are counted for run.epochs=1;" in start.describe(made)
    given = planned(all_moe, where, "run.epochs=1", "steps=10")
    assert given.steps == 10 and "until" not in start.describe(given)
    begun = start.plan_run(["tiny_cpu", where], network=False)
    assert begun.plan.config["eval_interval"] > 0, "so both steps are compiled"
    never = planned("tiny_cpu", where, "run.evaluations_per_epoch=0")
    assert never.config["eval_interval"] == -1


def test_fewer_steps_may_be_given(prepared):
    made = tiny(prepared, "run.epochs=2", "steps=10")
    assert (made.steps, made.available, made.config["num_epoch"]) == (10, 94, 2)
    assert made.epochs == pytest.approx(10 / 47)
    assert (made.config["eval_interval"], made.config["eval_start_step"]) == (10, 9)


def test_more_steps_than_there_are_batches_are_refused(prepared):
    words = ["tiny_cpu", f"run.data.directory={prepared}", "run.epochs=1", "steps=48"]
    begun = start.plan_run(words, network=False)
    with pytest.raises(ConfigError, match="steps=48 is more than the 47 batches"):
        begun.refuse()


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
    start.plan_run(["tiny_cpu", f"run.data.directory={prepared}", *words]).refuse()


def test_epochs_are_not_given_behind_our_back(prepared):
    with pytest.raises(UsageError, match=r"num_epoch=3: .* set run\.epochs=3 instead"):
        tiny(prepared, "num_epoch=3")
    with pytest.raises(UsageError, match="num_epoch=3"):
        planned("num_epoch=3")  # before the data are prepared


def test_a_loss_that_is_no_number_is_the_loss_scales_to_skip_unless_the_user_says_otherwise(
    prepared,
):
    aborts = ("abort_on_nan_loss", "abort_on_inf_loss")
    fp16 = planned("run.wandb.enabled=false").config
    assert [fp16[key] for key in aborts] == [False, False]
    given = planned("abort_on_inf_loss=true")
    assert "abort_on_inf_loss=true" in given.argv() and given.config["abort_on_nan_loss"] is False
    assert all(tiny(prepared).config[key] for key in aborts), "without a loss scale MaxText's own"


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


def test_a_run_without_data_is_refused(tmp_path):
    (tmp_path / "mine.yml").write_text("dataset_type: grain\nhardware: cpu\n")
    with pytest.raises(UsageError, match=r"there is no data to train on: set run\.data\.source"):
        planned(str(tmp_path / "mine.yml"))
    (tmp_path / "mine.yml").write_text("dataset_type: grain\ngrain_train_files: a*\n")
    with pytest.raises(UsageError, match="both name data"):
        planned(str(tmp_path / "mine.yml"), "run.data.source=stories.txt")
    with pytest.raises(ConfigError, match="no prepared dataset"):
        planned("tiny_cpu", "run.data.source=none", f"run.data.directory={tmp_path}")


def test_rows_of_one_token_are_refused():
    with pytest.raises(UsageError, match="max_target_length=1: a row needs at least 2 tokens"):
        planned("tiny_cpu", "max_target_length=1")


def test_a_damaged_dataset_is_refused(prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    shard = next(copy.glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"has not the \d+ bytes"):
        tiny(copy)


def ready(begun):
    return start.with_data(begun, note=lambda _: None, progress=lambda _: None, quiet=True)


def test_data_that_are_there_are_those_that_are_asked_for(prepared, tmp_path):
    words = ["tiny_cpu", f"run.data.directory={prepared}"]
    assert ready(start.plan_run(words, network=False)).plan.steps == 188
    stories = tmp_path / "stories.txt"
    stories.write_text("another story")
    for other in (f"run.data.source={stories}", "run.data.column=story", "run.data.seed=1"):
        begun = start.plan_run([*words, other], network=False)
        with pytest.raises(OutputError, match=r"with another .*; choose another folder"):
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
    more = moeconv("train", *words, "run.epochs=1", "steps=9000")
    assert more.code == ConfigError.exit_code and "steps=9000 is more than the" in more.error
    ran = moeconv("train", *words)
    assert ran.code == 130
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
    with pytest.raises(OutputError, match="prepared with another source;"):
        ready(start.plan_run(other, network=False))


def test_streaming_sets_what_maxtext_needs(tmp_path):
    made = planned("dataset_type=hf", "steps=50")
    config = made.config
    assert made.feed.kind == "hf" and made.steps == 50 and made.epochs is None
    assert (config["hf_path"], config["hf_eval_split"]) == ("roneneldan/TinyStories", "validation")
    assert config["packing"] and config["tokenize_train_data"] and config["grain_worker_count"] == 1
    local = tmp_path / "stories.jsonl"
    local.write_text('{"text": "a"}\n')
    with pytest.raises(UsageError, match=r"stories.jsonl is no dataset on the Hub; use dataset_t"):
        planned("dataset_type=hf", f"run.data.source={local}")
    named = ["dataset_type=hf", "hf_path=json", f"hf_train_files={local}"]
    assert planned(*named).config["eval_interval"] == -1
    tiny = planned("tiny_cpu", *named, "run.epochs=1").config
    assert tiny["num_epoch"] == 1, "not the recipe's, which stands for prepared rows"


def test_a_stream_that_maxtexts_settings_name_is_that_and_no_other(tmp_path):
    mine = planned("dataset_type=hf", "hf_path=other/set", "packing=false")
    config = mine.config
    assert config["hf_path"] == "other/set" and not config["packing"]
    # The recipe's own are for prepared rows.
    assert config["tokenize_train_data"] and config["tokenizer_type"] == "huggingface"
    assert config["eval_interval"] == -1
    assert feed.hub_id(mine.feed) == mine.feed.named == "other/set"
    assert start.facts(mine)["data"]["source"] == "other/set"
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    files = f"hf_train_files={tmp_path}/*.jsonl"
    local = start.plan_run(
        ["dataset_type=hf", "hf_path=json", files, "hf_eval_split=train"], network=False
    )
    assert feed.hub_id(local.plan.feed) is None and local.plan.config["eval_interval"] > 0
    assert local.of("dataset").message == f"{tmp_path}/rows.jsonl is a local path."
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
    moved = RunFacts(source_digest=digest(tmp_path / "moved"))
    assert run_dir.check_same(tmp_path, before, {}, moved) == []
    for other in (digest(tmp_path, "hf_name=x"), digest(tmp_path, "train_split=x"), None):
        with pytest.raises(ConfigError, match=r"the data or the tokenizer ha(ve|d) other names"):
            run_dir.check_same(tmp_path, before, {}, RunFacts(source_digest=other))
    assert planned("dataset_type=synthetic").source_digest != begun


def test_other_releases_are_told(tmp_path):
    then = {"jax": "0.1", "maxtext": "0.2.5", "grain": "0.1"}
    before = RunSidecar(
        format="moeconv-run", version=1, config={}, moeconv_version="0.0.9", versions=then
    )
    (note,) = run_dir.check_same(tmp_path, before, {}, RunFacts())
    assert note.startswith("moeconv was 0.0.9 and is ") and ", jax was 0.1 and is " in note
    assert note.endswith("the last bits may differ") and "grain" not in note


def test_what_a_stream_cannot_read():
    with pytest.raises(UsageError, match="source=embedded is no dataset on the Hub"):
        planned("tiny_cpu", "dataset_type=hf")
