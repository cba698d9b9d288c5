"""What a run is told: recipes, files, key=value, run files; what is refused names the nearest."""

import pytest
from moeconv_train import recipe, settings
from moeconv_train.loss_scaling import LossScaleSettings
from moeconv_train.settings import read_settings, run_file_of, seconds_of

from moeconv.errors import ConfigError, UsageError


def test_the_default_recipe_is_the_reference_run():
    found = recipe.read([])
    assert found.name == recipe.DEFAULT == recipe.recipes()[0]
    run = found.run
    assert (run.epochs, run.evaluations_per_epoch) == (2, 1)
    assert run.data.source == "roneneldan/TinyStories"
    assert (run.data.tokenizer, run.data.seed) == ("llama3", 0)
    assert (run.wandb.entity, run.wandb.project, run.wandb.enabled) == (
        "gwhwh153td-china-times-org",
        "moe-llama3-200m",
        True,
    )
    assert (run.hub_repo, run.language) == ("lyyh/llama3-200m-moe", "en")
    assert licenses() == ("Meta Llama 3 Community License", "CDLA-Sharing-1.0")
    assert run.loss_scale == LossScaleSettings()
    assert run.patches == {"expert_tiles": True, "attention_blocks": True}


def licenses(*words):
    """What the run file of the default recipe says of the tokenizer and of the data."""
    run = recipe.read(words).run
    return run.tokenizer_license, run.data_license


@pytest.mark.parametrize(
    ("words", "stated"),
    [
        (["run.epochs=1", "run.license=mit"], (True, True)),
        (["run.data.source=mine.jsonl"], (True, False)),
        (["run.data.tokenizer=mine"], (False, True)),
        (["run.data.directory=rows"], (False, False)),
        (["grain_train_files=rows/*"], (True, False)),
        (["dataset_type=hf", "hf_path=me/data", "tokenizer_path=mine"], (False, False)),
    ],
)
def test_nothing_is_said_of_the_license_of_what_a_user_brings(words, stated):
    assert tuple(text is not None for text in licenses(*words)) == stated


def test_the_license_of_what_a_user_brings_is_theirs_to_state():
    words = ["run.data.source=mine.jsonl", "run.data_license=CC-BY-4.0"]
    assert licenses(*words) == ("Meta Llama 3 Community License", "CC-BY-4.0")


@pytest.mark.parametrize("name", recipe.recipes())
def test_every_recipe_has_a_run_file_and_names_no_key_of_ours(name):
    found = recipe.read([name])
    assert run_file_of(found.file).is_file()
    assert not any(key.startswith("run.") for key in found.keys)
    assert found.run.data.source


def test_words_may_come_in_any_order():
    found = recipe.read(["steps=2", "tiny_cpu", "run.epochs=3", "run_name=a=b"])
    assert found.name == "tiny_cpu"
    assert found.given == {"steps": "2", "run_name": "a=b"}
    assert found.run.epochs == 3 and found.told == {"epochs"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny"], "'tiny' is no recipe; did you mean tiny_cpu?"),
        (["quite_another"], "'quite_another' is no recipe; there are "),
        (["absent.yml"], "absent.yml: there is no such config file"),
        (["tiny_cpu", "steps"], "'steps': only one recipe or file can be trained"),
        (["stepz=1"], "stepz: MaxText has no such setting; did you mean steps?"),
        (["steps=1", "steps=2"], "steps: is given twice, as 1 and as 2"),
        (["=1"], "'=1' is neither a recipe, a file nor key=value"),
        (["zzzzqqq=1"], "what is not MaxText's is written run.KEY=VALUE"),
        (["hf_access_token=x"], "secrets come from the environment; set HF_TOKEN"),
        (["run.epoch=1"], "run.epoch: no such setting; did you mean epochs?"),
        (["run.data.sauce=x"], "run.data.sauce: no such setting; did you mean source?"),
        (["run.wandb=x"], "run.wandb: has fields of its own; give wandb.FIELD"),
        (["run.epochs=0"], "run.epochs: Input should be greater than or equal to 1, not 0"),
        (["run.time_limit=soon"], "'soon' is no duration such as 8h30m, 45m or 90s"),
        (["run.loss_scale.initial=3"], "initial must be a power of two, not 3"),
        (["run.patches.fp16_heat=false"], "fp16_heat: String should match pattern '^(fp16_head|"),
        (["run.data.validation_fraction=1"], "run.data.validation_fraction: Input should be less"),
    ],
)
def test_what_is_wrong_is_named(words, message):
    with pytest.raises(UsageError) as raised:
        recipe.read(words)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_what_was_given_is_said_once():
    with pytest.raises(UsageError) as raised:
        recipe.read(["run.time_limit=soon"])
    assert str(raised.value).count("soon") == 1


def test_durations():
    assert seconds_of("8h30m") == 30_600
    assert [seconds_of(text) for text in ("90s", "2m", "1h")] == [90, 120, 3600]
    assert recipe.read(["run.time_limit=90"]).run.time_limit == 90
    for wrong in ("", "h", "8h30", "-"):
        with pytest.raises(ValueError, match="no duration"):
            seconds_of(wrong)


def test_nothing_is_written_none():
    assert read_settings(None, {"run.epochs": "none", "run.data.source": "None"}).epochs is None


@pytest.fixture
def files(tmp_path):
    def write(**content):
        for name, text in content.items():
            (tmp_path / name.replace("__", ".")).write_text(text)
        return tmp_path / "mine.yml"

    return write


def test_a_users_file_with_its_own_run_file(files):
    file = files(
        mine__yml="base_config: base.yml\nsteps: 7\nlearning_rate: 1e-4\n",
        mine__run__yml="epochs: 2\ndata: {source: corpus.txt}\n",
    )
    found = recipe.read([str(file), "run.data.column=story"])
    assert dict(found.keys) == {"steps": 7, "learning_rate": 1e-4}
    assert (found.run.epochs, found.run.data.source) == (2, "corpus.txt")
    assert found.run.data.column == "story"


def test_a_users_file_may_be_alone(files):
    found = recipe.read([str(files(mine__yml="base_config: base.yml\nsteps: 7\n"))])
    assert found.run == settings.RunFile()


@pytest.mark.parametrize("word", ["off", "'off'"])
def test_the_word_off_is_a_mode_of_the_loss_scale(files, word):
    file = files(mine__yml="steps: 7\n", mine__run__yml=f"loss_scale: {{mode: {word}}}\n")
    assert recipe.read([str(file)]).run.loss_scale.mode == "off"
    given = recipe.read(["tiny_cpu", f"run.loss_scale.mode={word}"])
    assert given.run.loss_scale.mode == "off"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mine__yml": "a: [\n"}, "mine.yml: cannot be read as YAML"),
        ({"mine__yml": "- a\n"}, "mine.yml: must be settings with values"),
        ({"mine__yml": "stepz: 1\n"}, "stepz: MaxText has no such setting; did you mean steps?"),
        (
            {"mine__yml": "base_config: below.yml\n"},
            "mine.yml: base_config: below.yml: moeconv reads one file over MaxText's base.yml",
        ),
        ({"mine__yml": "hf_access_token: x\n"}, "secrets come from the environment"),
        ({"mine__yml": "steps: 1\n", "mine__run__yml": "epoch: 2\n"}, "did you mean epochs?"),
        ({"mine__yml": "steps: 1\n", "mine__run__yml": "epochs: two\n"}, "mine.run.yml: epochs: "),
        ({"mine__yml": "steps: 1\n", "mine__run__yml": "- a\n"}, "must be settings with values"),
        ({"mine__yml": "steps: 1\n", "mine__run__yml": "a: [\n"}, "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(files, content, message):
    with pytest.raises(ConfigError) as raised:
        recipe.read([str(files(**content))])
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_yaml_by_another_name_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: 1\n")
    with pytest.raises(UsageError, match=r"takes config files named \.yml only; rename it"):
        recipe.read([str(tmp_path / "mine.yaml")])


def test_a_model_name_brings_its_settings(files):
    found = recipe.read([str(files(mine__yml="model_name: mixtral-8x7b\nsteps: 7\n"))])
    assert found.keys["num_experts"] == 8 and found.keys["base_emb_dim"] == 4096
    assert found.keys["steps"] == 7
    given = recipe.read([str(files(mine__yml="steps: 7\n")), "model_name=mixtral-8x7b"])
    assert given.keys["num_experts"] == 8
    for odd in ("../models/mixtral-8x7b", "no_such_model"):
        file = files(mine__yml=f"model_name: {odd}\nsteps: 7\n")
        assert set(recipe.read([str(file)]).keys) == {"model_name", "steps"}
