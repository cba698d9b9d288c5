"""Values of a run's settings: kinds, places, and what MaxText's command line is told."""

from pathlib import Path

import pytest
from moeconv_train import plan, recipe, run_dir, trainer, values
from moeconv_train.preflight import config as preflight_config
from moeconv_train.sidecar import public_config
from plan_lab import planned, tiny

from moeconv.arch.sidecar import RunFacts, RunSidecar
from moeconv.errors import ConfigError, UsageError


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
