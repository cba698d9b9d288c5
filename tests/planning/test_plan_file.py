"""A plan as a file: another process reads it back, and carries out the same, or nothing."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic
from cli_runner import moeconv
from engine_lab import contents

import moeconv as api
from moeconv.errors import ConfigError, NotACheckpointError, TensorError, TokenizerError, UsageError
from moeconv.planning.plan_file import load_plan
from moeconv.untrusted import strict_json

DIRECTORY = Path(__file__).parents[2] / "train" / "corpus" / "tokenizer"


@pytest.fixture
def run(tmp_path):
    """A tied model with dense layers, so with folds, copies, filled tensors and warnings."""
    checkpoint = synthetic.write(tmp_path / "run", "envy", split={"D": 2}, sizes={"V": 4200})
    checkpoint.config_file()
    return checkpoint


@pytest.fixture
def planned(run, tmp_path):
    """A plan, and the file of it."""
    made = api.plan(
        run.run,
        config=run.run / "config.yml",
        dtype="bfloat16",
        max_shard_size="40kB",
        tokenizer=DIRECTORY,
    )
    made.save(tmp_path / "plan.json")
    return made


def test_what_is_read_back_is_the_plan(planned, tmp_path):
    again = load_plan(tmp_path / "plan.json")
    assert again == planned
    assert again.model.sources == planned.model.sources
    assert again.digest == planned.digest


def test_a_plan_pickles(planned):
    assert pickle.loads(pickle.dumps(planned)) == planned


def test_another_process_writes_the_same_bytes(run, planned, tmp_path):
    api.convert(planned, tmp_path / "here")
    code = "import sys, moeconv; moeconv.convert(moeconv.load_plan(sys.argv[1]), sys.argv[2])"
    there = [sys.executable, "-c", code, tmp_path / "plan.json", tmp_path / "there"]
    subprocess.run(there, check=True, timeout=120)
    options = ["--config", run.run / "config.yml", "--dtype", "bfloat16", "--tokenizer", DIRECTORY]
    ran = moeconv("convert", run.run, tmp_path / "all", *options, "--max-shard-size", "40kB")
    assert ran.code == 0, ran.err
    wanted = contents(tmp_path / "here")
    assert len([name for name in wanted if name.endswith(".safetensors")]) > 1
    assert contents(tmp_path / "there") == contents(tmp_path / "all") == wanted


def test_the_command_prints_and_takes_it(run, tmp_path):
    config = ["--config", run.run / "config.yml"]
    ran = moeconv("convert", run.run, "--dry-run", "--json", *config)
    assert ran.code == 0, ran.err
    (tmp_path / "plan.json").write_text(ran.out)
    ran = moeconv("convert", "--plan", tmp_path / "plan.json", tmp_path / "out", "--jobs", "1")
    assert ran.code == 0, ran.err
    assert moeconv("convert", run.run, tmp_path / "direct", *config).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "direct")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--plan", "PLAN"], "give SRC and OUT, or --plan FILE and OUT"),
        (["RUN"], "give SRC and OUT, or --plan FILE and OUT"),
        (["OUT", "--plan", "PLAN", "--dtype", "float32"], "--dtype: decided by the plan"),
        (["OUT", "--plan", "PLAN", "--accept-key", "x"], "--accept-key: decided by the plan"),
        (["RUN", "OUT", "--plan", "PLAN", "--untie"], "--untie: decided by the plan"),
    ],
)
def test_a_plan_takes_no_second_source_or_decision(run, planned, tmp_path, given, said):
    places = {"RUN": run.run, "OUT": tmp_path / "out", "PLAN": tmp_path / "plan.json"}
    ran = moeconv("convert", *(places.get(each, each) for each in given))
    assert ran.code == 2
    assert said in ran.err
    assert not (tmp_path / "out").exists()


def test_the_call_takes_no_second_decision(planned, tmp_path):
    with pytest.raises(UsageError, match="dtype: decided by the plan"):
        api.convert(planned, tmp_path / "out", dtype="float32")


CHANGES = {
    "a target": lambda plan: plan["request"].update(target="ernie4_5_moe"),
    "no target": lambda plan: plan["request"].update(target="nobody"),
    "a size": lambda plan: plan["request"]["model"]["vocab_size"].update(value=160),
    "a shape": lambda plan: plan["request"]["source"]["arrays"][0].update(shape=[3, 3]),
    "no path": lambda plan: plan["request"]["source"]["arrays"][0].update(path=[]),
    "an array less": lambda plan: plan["request"]["source"]["arrays"].pop(),
    "an accepted key": lambda plan: plan["request"]["accepted_keys"].append("use_magic"),
    "a warning": lambda plan: plan["request"]["warnings"].clear(),
    "the digest": lambda plan: plan.update(digest="0" * 64),
    "another moeconv": lambda plan: plan.update(moeconv_version="0.3.0", digest="0" * 64),
    "a key more": lambda plan: plan["request"].update(shell="rm"),
    "a version": lambda plan: plan.update(version=2),
    "numbers as text": lambda plan: plan["request"].update(jobs="many"),
    "no request": lambda plan: plan.pop("request"),
    "a huge array": lambda plan: plan["request"]["source"]["arrays"][0].update(
        decoded_bytes=10**400
    ),
    "no chunks": lambda plan: plan["request"]["source"]["arrays"][0].update(chunk=[0]),
    "what is read of it": lambda plan: plan["tensors"].pop(),
    "its costs": lambda plan: plan.update(write_bytes=0),
    "a sentence": lambda plan: plan["warnings"].append("all is well"),
    "something beside": lambda plan: plan.update(note="x"),
    "a version of two lines": lambda plan: plan.update(moeconv_version="1\nerror: x"),
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_plan_is_refused(planned, tmp_path, change, signed):
    content = json.loads((tmp_path / "plan.json").read_text())
    CHANGES[change](content)
    if signed and "request" in content:  # by somebody who knows how
        raw = strict_json.dumps(content["request"])
        content["request_sha256"] = hashlib.sha256(raw).hexdigest()
    if signed and change in ("an accepted key", "a warning"):
        return  # what decides no byte of a tensor is for who has the file to say
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"plan\.json is .*make it again"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"format": "moeconv plan"}'])
def test_what_is_no_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ConfigError, match="is no plan that moeconv wrote"):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_plan(tmp_path / "nothing.json")


def test_a_source_that_changed_or_went_is_refused(run, planned, tmp_path):
    synthetic.write(tmp_path / "other", "envy", split={"D": 2}, seed=1)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(NotACheckpointError):
        api.convert(planned, tmp_path / "out")
    api.convert(planned, tmp_path / "from there", checkpoint=tmp_path / "moved")
    assert (tmp_path / "from there").is_dir()
    (tmp_path / "other").rename(tmp_path / "run")
    with pytest.raises(TensorError, match="is not as it was when the plan was made"):
        api.convert(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(run, tmp_path):
    mine = tmp_path / "tokenizer"
    shutil.copytree(DIRECTORY, mine)
    planned = api.plan(run.run, config=run.run / "config.yml", tokenizer=mine)
    settings = json.loads((mine / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 7
    (mine / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match="is not as it was when the plan was made"):
        api.convert(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_is_carried_out_in_any_folder(run, tmp_path, monkeypatch):
    shutil.copytree(DIRECTORY, tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    api.plan("run", config="run/config.yml", tokenizer="tokenizer").save("plan.json")
    api.convert("run", "here", config="run/config.yml", tokenizer="tokenizer")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    api.convert(api.load_plan("../plan.json"), "out")
    assert contents(tmp_path / "elsewhere" / "out") == contents(tmp_path / "here")


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_the_machine_s_limits_are_given_anew(planned, tmp_path, more):
    plan = tmp_path / "plan.json"
    ran = moeconv("convert", "--plan", plan, tmp_path / "out", "--max-memory", "1KiB", *more)
    assert ran.code == 9
    assert "--max-memory 1.02 kB is below" in ran.err


@pytest.mark.parametrize("jobs", [1.5, "3", 0])
def test_jobs_are_a_whole_number(run, jobs):
    with pytest.raises(UsageError, match="--jobs takes a whole number from 1"):
        api.plan(run.run, config=run.run / "config.yml", jobs=jobs)
