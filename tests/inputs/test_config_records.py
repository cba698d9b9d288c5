"""Configs that are not MaxText's own: W&B's record in all its forms, sidecars, and what is none."""

import json
import re

import pytest
import synthetic
import yaml
from cli_runner import moeconv
from inputs_lab import log_of, resolved_config, wandb_of, warnings, yaml_of

from moeconv.arch.config_file import load_config_file
from moeconv.arch.config_sources import from_config_file
from moeconv.errors import ConfigError, UnsupportedError
from moeconv.maxtext.checkpoint import open_checkpoint


@pytest.fixture
def made(tmp_path):
    return synthetic.write(tmp_path / "run")


def wrapped(config):
    return {key: {"value": value} for key, value in config.items()}


RECORDS = {
    "its API": lambda c: {"_wandb": {"value": {"t": {}}}, **c},
    "its API, a version": lambda c: {"wandb_version": 1, **c},
    "values alone": wrapped,
    "with descriptions": lambda c: {k: {"desc": "a", "value": v} for k, v in c.items()},
    "some wrapped": lambda c: {**c, "_wandb": {}, "num_experts_per_tok": {"value": 2}},
    "below one name": lambda c: {"wandb_version": 1, "config": {"desc": None, "value": c}},
    "below one name, plain": lambda c: {"_wandb": {}, "maxtext": c, "git": "abc"},
    "below two names": lambda c: {"_wandb": {}, "cli": {"value": {"model": wrapped(c)}}},
    "beside others": lambda c: {
        "_wandb": {}, "config": {"value": c}, "learning_rate": {"value": 1}, "git": {"value": "a"},
    },
}  # fmt: skip


@pytest.mark.parametrize("form", RECORDS)
@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_w_and_b_s_record_in_all_forms(tmp_path, made, form, kind):
    config = resolved_config(made)
    path = tmp_path / f"config.{kind}"
    content = RECORDS[form](config)
    # A tab is what JSON allows and YAML does not.
    text = json.dumps(content, indent="\t") if kind == "json" else yaml.safe_dump(content)
    path.write_text(text)
    found = load_config_file(path)
    assert found.kind == "W&B's record of the run" and found.whole
    accepted = [key for key in ("git",) if key in found]
    assert not config.keys() - found.keys()
    opened = open_checkpoint(str(made.run), config=path, accept=accepted)
    assert opened.resolution.model().rope_theta == 500_000
    if kind == "yaml":
        source = str(opened.resolution.sources["rope_theta"])
        line = int(source.rpartition(":")[2])
        assert "rope_max_timescale" in text.splitlines()[line - 1]


def test_sections_of_a_record_that_contradict_each_other(tmp_path, made):
    config = resolved_config(made)
    path = tmp_path / "config.yaml"
    content = {"_wandb": {}, "a": {"value": config}, "b": {"value": {"rope_max_timescale": 7}}}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(
        ConfigError, match=r"rope_max_timescale has two values, 500000 at .*:\d+ and"
    ):
        open_checkpoint(str(made.run), config=path)


def test_a_record_without_settings_of_maxtext(tmp_path, made):
    path = tmp_path / "config.yaml"
    path.write_text("wandb_version: 1\n_wandb:\n  value: {}\nlr: {value: 1}\n")
    with pytest.raises(
        ConfigError, match=r"W&B's record of the run, and has no setting of MaxText"
    ):
        open_checkpoint(str(made.run), config=path)


def test_the_sidecar_of_another_place_is_taken(tmp_path, made):
    path = tmp_path / "moeconv_run.json"
    sidecar = {"format": "moeconv-run", "version": 1, "config": resolved_config(made)}
    path.write_text(json.dumps(sidecar))
    opened = open_checkpoint(str(made.run), config=path)
    assert opened.resolution.model().rope_theta == 500_000
    assert str(opened.resolution.sources["rope_theta"]).startswith(f"config file: {path}")
    assert "is the sidecar of a run of moeconv; of it the settings alone" in warnings(opened)[0]


def test_a_sidecar_of_another_place_names_its_release(tmp_path):
    """As the run's own does: the blocks of 0.2.4 were others before it, or not there."""
    made = synthetic.write(tmp_path / "run", "envy")
    path = tmp_path / "moeconv_run.json"
    sidecar = {"format": "moeconv-run", "version": 1, "maxtext_version": "0.2.2"}
    path.write_text(json.dumps({**sidecar, "config": made.config}))
    with pytest.raises(UnsupportedError, match=r"moeconv_run.json: maxtext_version=0.2.2, but"):
        open_checkpoint(str(made.run), config=path)


HF = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 64,
      "num_experts_per_tok": 2, "head_dim": 4, "eos_token_id": 2}  # fmt: skip
OTHERS = {
    "config.json": (HF, "the config.json of a Hugging Face model"),
    "generation_config.json": (
        {"eos_token_id": 2, "transformers_version": "5.0.0"}, "generation_config.json"),
    "adapter_config.json": ({"peft_type": "LORA", "r": 8}, "of an adapter for PEFT"),
    "tokenizer_config.json": ({"tokenizer_class": "X"}, "the tokenizer_config.json"),
    "model.safetensors.index.json": ({"weight_map": {}, "metadata": {}}, "index of a Hugging"),
    "moeconv.json": ({"format": "moeconv", "version": 2}, "manifest of a model that moeconv"),
    "plan.json": ({"format": "moeconv plan"}, "a plan of moeconv's"),
    "_METADATA": ({"tree_metadata": {}, "use_zarr3": True}, "metadata of a checkpoint's arrays"),
    "_CHECKPOINT_METADATA": ({"item_handlers": {}}, "metadata of a checkpoint's step"),
    "wandb-metadata.json": ({"heartbeatAt": "x", "args": ["a.yml"]}, "wandb-metadata.json"),
    "wandb-summary.json": ({"_runtime": 1, "_step": 2, "loss": 3}, "wandb-summary.json"),
    "docker-compose.yml": ({"services": {"a": 1}}, "has no setting of MaxText (it has services)"),
    "recipe.yml": ({"maxtext": {"decoder_block": "mixtral"}}, "settings below maxtext, where"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_config_is_recognised(tmp_path, made, name):
    content, words = OTHERS[name]
    path = tmp_path / name
    path.write_text(json.dumps(content))
    ran = moeconv("inspect", made.run, "--config", path)
    assert ran.code == ConfigError.exit_code
    assert str(path) in ran.error and words in ran.error
    assert "--accept-key" not in ran.error


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "{}\n", "\ufeff"])
def test_a_config_without_settings(tmp_path, made, text):
    path = tmp_path / "run.yml"
    path.write_text(text)
    below = tmp_path / "below.yml"
    below.write_text("base_config: run.yml\n")
    for given in (path, below):
        with pytest.raises(ConfigError, match=r"run.yml is empty, or has comments alone"):
            open_checkpoint(str(made.run), config=given)


def test_a_base_config_that_is_a_log(tmp_path, made):
    (tmp_path / "train.log").write_text(log_of(resolved_config(made)))
    (tmp_path / "config.yaml").write_text(wandb_of(resolved_config(made)))
    path = tmp_path / "run.yml"
    for name, kind in (("train.log", "MaxText's log"), ("config.yaml", "W&B's record")):
        path.write_text(f"base_config: {name}\n")
        with pytest.raises(
            ConfigError, match=rf"run.yml: its base_config {name} is {kind}.*--config"
        ):
            from_config_file(path)


def test_a_circle_of_base_configs_is_named(tmp_path):
    for name, base in (("a", "b"), ("b", "c"), ("c", "b"), ("d", "d")):
        (tmp_path / f"{name}.yml").write_text(f"base_config: {base}.yml\nsteps: 1\n")
    with pytest.raises(ConfigError, match=r"c.yml: its base_config b.yml builds on c.yml in turn"):
        from_config_file(tmp_path / "a.yml")
    with pytest.raises(ConfigError, match=r"d.yml: its base_config d.yml is this file itself"):
        from_config_file(tmp_path / "d.yml")
    (tmp_path / "e.yml").symlink_to("a.yml")
    (tmp_path / "c.yml").write_text("base_config: e.yml\n")
    with pytest.raises(ConfigError, match=r"c.yml: its base_config e.yml builds on"):
        from_config_file(tmp_path / "a.yml")


TEXTS = {"log": ("train.log", log_of), "err": ("slurm-7.err", log_of),
         "rotated": ("train.log.1", log_of), "step": ("checkpoints/0/out.txt", log_of),
         "record": ("wandb/run-1-a/files/config.yaml", wandb_of),
         "yaml": ("config.yml", yaml_of)}  # fmt: skip


def place(made, name, **changes):
    path, text = TEXTS[name]
    (made.run / path).parent.mkdir(parents=True, exist_ok=True)
    (made.run / path).write_text(text(resolved_config(made, **changes)))
    return made.run / path


@pytest.mark.parametrize("name", TEXTS)
def test_files_of_other_kinds_that_a_run_has_are_compared(made, name):
    one, other = place(made, "log" if name != "log" else "yaml"), place(made, name, steps=7)
    opened = open_checkpoint(str(made.run))
    assert opened.resolution.model() and len(warnings(opened)) == 1
    place(made, name, rope_max_timescale=10_000)
    ran = moeconv("inspect", made.run)
    assert ran.code == ConfigError.exit_code
    assert "rope_max_timescale has two values, " in ran.error
    for path in (one, other):
        lines = path.read_text().splitlines()
        line = next(
            n for n, text in enumerate(lines, 1) if re.search(r"\brope_max_timescale:", text)
        )
        value = 10_000 if path == other else 500_000
        assert f"{value} at {path}:{line}" in ran.error
    given = open_checkpoint(str(made.run), config=other)
    assert given.resolution.model().rope_theta == 10_000


def test_a_part_of_a_log_is_compared_but_not_taken(made):
    part = made.run / "part.log"
    part.write_text("Config param rope_max_timescale: 10000\n")
    assert "rope_max_timescale" in open_checkpoint(str(made.run)).resolution.missing
    place(made, "yaml")
    with pytest.raises(ConfigError, match=r"10000 at .*part.log:1"):
        open_checkpoint(str(made.run))


def test_a_yaml_that_the_run_was_started_with_is_not_compared(made):
    """Its command line may have changed it."""
    made.config_file(rope_max_timescale=7)
    place(made, "log")
    assert open_checkpoint(str(made.run)).resolution.model().rope_theta == 500_000


@pytest.mark.parametrize("value", ["1,2", "'1, 2'", "'[1, 2]'", "[1, 2]", "['1', '2']", "1 2"])
@pytest.mark.parametrize("way", ["file", "flag"])
def test_several_ids_of_an_end(tmp_path, made, value, way):
    config = made.config_file(tmp_path)
    if way == "file":
        config.write_text(f"{config.read_text()}eos_token_id: {value}\n")
    sets = [f"eos_token_id={value}"] if way == "flag" else []
    opened = open_checkpoint(str(made.run), config=config, sets=sets)
    assert opened.resolution.model().eos_token_id == (1, 2)


@pytest.mark.parametrize(
    ("pair", "words"),
    [("eos_token_id=</s>", "should be a token's number, or several as [1, 2]"),
     ("eos_token_id='1,</s>'", "should be a token's number, or several"),
     ("eos_token_id=[1, [2]]", "should be a token's number, or several"),
     ("bos_token_id=1,2", "should be a token's number"),
     ("eos_token_id=1,99", "is no row of the embedding, which has 64"),
     ("eos_token_id=[]", "is no row of the embedding")],
)  # fmt: skip
def test_ids_that_are_none(tmp_path, made, pair, words):
    ran = moeconv("inspect", made.run, "--config", made.config_file(tmp_path), "--set", pair)
    assert ran.code == ConfigError.exit_code and words in ran.error
