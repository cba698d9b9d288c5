"""Values of a run's settings: kinds, places, and what MaxText's command line is told."""

from pathlib import Path

import pytest
from moeconv_train import recipe, run_dir, trainer
from moeconv_train.preflight.config import said
from moeconv_train.sidecar import public_config
from plan_lab import planned, tiny

from moeconv.errors import ConfigError, UsageError
from moeconv.maxtext.sidecar import RunFacts, RunSidecar


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("steps=abc", "steps=abc: must be a number"),
        ("steps=none", "steps=none: must be a number"),
        ("steps=.inf", r"steps=\.inf: must be a number"),
        ("learning_rate=1e-", "learning_rate=1e-: must be a number"),
        ("base_emb_dim=wide", "base_emb_dim=wide: must be a number"),
        ("steps=0", "steps=0: must be 1 or more"),
    ],
)
def test_what_a_plan_counts_on_is_a_number(tmp_path, word, told):
    with pytest.raises(UsageError, match=told):
        planned("tiny_cpu", word)
    key, _, value = word.partition("=")
    file = tmp_path / "mine.yml"
    file.write_text(f"{key}: {value}\n")
    with pytest.raises((UsageError, ConfigError), match=key):
        planned(str(file))


def test_other_values_are_maxtexts_to_refuse():
    """As far as a plan goes; trainer.py and the compiled check make a sentence of MaxText's."""
    assert planned("tiny_cpu", "dtype=bf16").config["dtype"] == "bf16"
    assert planned("tiny_cpu", "attn_logits_soft_cap=none").config["attn_logits_soft_cap"] is None
    assert planned("tiny_cpu", "learning_rate=1e-3").config["learning_rate"] == 1e-3


def test_the_settings_of_maxtext_are_those_of_its_types():
    keys = recipe.maxtext_keys()
    assert {"steps", "lora", "global_batch_size_to_load", "run_name", "ici_parallelism"} <= keys
    assert len(keys) > 900 and "stepz" not in keys
    assert recipe._types()["attn_logits_soft_cap"].startswith("None |")


def test_a_finished_run_is_compared_before_it_is_called_finished(prepared, tmp_path, monkeypatch):
    where = f"base_output_directory={tmp_path}"
    made = tiny(prepared, where, "steps=20")
    made.run_dir.mkdir()
    told = {"learning_rate_schedule_steps": -1, **public_config(made.config), **made.told}
    facts = RunFacts(dataset_digest=made.feed.dataset.digest)
    before = RunSidecar(format="moeconv-run", version=1, config=public_config(told), run=facts)
    sidecar = made.run_dir / "moeconv_run.json"
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
    with pytest.raises(ConfigError, match=r"moeconv_run\.json: "):
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

    assert said(value) == text
    read = OmegaConf.from_dotlist([f"key={text}"]).key
    assert read == ("none" if value is None else value)
