"""The public functions do what the commands do, and what they return prints itself."""

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import pytest
import synthetic
from cli_runner import moeconv as command

import moeconv
from moeconv.errors import MemoryLimitError, OutputError, UsageError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return synthetic.write(tmp_path_factory.mktemp("api") / "run")


@pytest.fixture(scope="module")
def config(made):
    return made.config_file(made.run.parent)


@pytest.fixture
def out(made, config, tmp_path):
    return moeconv.convert(made.run, tmp_path / "out", config=config).out


def printed(value) -> list[str]:
    return str(value).splitlines()


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_a_checkpoint_prints_as_inspect_does(made, config):
    checkpoint = moeconv.open_checkpoint(str(made.run), config=str(config))
    assert printed(checkpoint) == lines(command("inspect", made.run, "--config", config).out)
    ran = command("inspect", made.run, "--config", config, "--json")
    assert checkpoint.as_dict() == json.loads(ran.out)


def test_fields_in_every_form(made, config):
    fields = {"rope_max_timescale": 10_000, "tokenizer_type": "sentencepiece", "bos_token_id": None}
    pairs = ["rope_max_timescale=10000", "tokenizer_type=sentencepiece", "bos_token_id=null"]
    for given in (fields, pairs, " ".join(pairs)):
        checkpoint = moeconv.open_checkpoint(made.run, config=config, set=given)
        assert checkpoint.as_dict()["missing"] == []
        assert checkpoint.resolution.known["rope_theta"] == 10_000


def test_a_plan_prints_as_a_dry_run_does(made, config, tmp_path):
    plan = moeconv.plan(made.run, config=config, dtype="bfloat16", jobs=2, max_memory=2**30)
    args = ["convert", made.run, tmp_path / "out", "--config", config, "--dry-run"]
    args += ["--dtype", "bfloat16", "--jobs", 2, "--max-memory", "1GiB"]
    assert printed(plan) == lines(command(*args).out)
    assert plan.as_dict() == json.loads(command(*args, "--json").out)
    assert not (tmp_path / "out").exists()


def test_a_plan_and_its_checkpoint_convert_alike(made, config, tmp_path):
    plan = moeconv.plan(made.run, config=config, max_shard_size="40kB")
    first = moeconv.convert(plan, tmp_path / "first")
    second = moeconv.convert(
        made.run, tmp_path / "second", config=config, max_shard_size=40_000, jobs=1
    )
    assert first.manifest == second.manifest
    assert first.out == tmp_path / "first" and len(first.manifest.files) > 4
    ran = command("convert", made.run, tmp_path / "third", "--config", config, "--json")
    third = json.loads(ran.out)
    assert third.pop("out") == str(tmp_path / "third")
    whole = moeconv.convert(plan.source.path, tmp_path / "fourth", config=config)
    assert whole.as_dict() == {"out": str(tmp_path / "fourth"), **third}
    assert printed(whole)[0].startswith(f"{tmp_path}/fourth: MixtralForCausalLM, 78 tensors, ")


def test_a_plan_has_decided_already(made, config, tmp_path):
    plan = moeconv.plan(made.run, config=config)
    with pytest.raises(UsageError, match="dtype, untie: decided by the plan"):
        moeconv.convert(plan, tmp_path / "out", dtype="bfloat16", untie=True)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_replaced_only_if_asked(made, config, out):
    with pytest.raises(OutputError, match="--overwrite"):
        moeconv.convert(made.run, out, config=config)
    plan = moeconv.plan(made.run, config=config, dtype="bfloat16")
    assert moeconv.convert(plan, out, overwrite=True).manifest.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [({"jobs": 0}, UsageError, "--jobs"), ({"max_memory": "1 parsec"}, UsageError, "not a size"),
     ({"max_memory": 1000}, MemoryLimitError, "--max-memory 1 kB"),
     ({"max_shard_size": 0}, UsageError, "above zero"), ({"target": "gpt9"}, UsageError, "gpt9")],
)  # fmt: skip
def test_arguments_that_cannot_be(made, config, tmp_path, arguments, error, words):
    with pytest.raises(error, match=words):
        moeconv.convert(made.run, tmp_path / "out", config=config, **arguments)
    assert not (tmp_path / "out").exists()


def test_progress_adds_up(made, config, tmp_path):
    seen = []

    @contextmanager
    def progress(read_bytes, write_bytes):
        told = {"total": (read_bytes, write_bytes), "read": 0, "written": 0}

        def advance(read, written):
            told["read"] += read
            told["written"] += written

        yield advance
        seen.append(told)

    made_ = moeconv.convert(made.run, tmp_path / "out", config=config, jobs=1, progress=progress)
    moeconv.verify(made_.out, levels=["weights"], jobs=1, progress=progress)
    for told in seen:
        assert told["total"] == (told["read"], told["written"]) and told["read"] > 0
    assert [told["written"] > 0 for told in seen] == [True, False]


def test_warnings_go_to_the_logger(made, config, tmp_path, caplog):
    caplog.set_level(logging.INFO, "moeconv")
    moeconv.convert(made.run, tmp_path / "out", config=config)
    said = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert any(text.startswith("no tokenizer was given") for text in said)
    notes = []
    moeconv.convert(made.run, tmp_path / "again", config=config, note=notes.append)
    assert notes == [f"warning: {text}" for text in said]


def test_a_verdict_prints_as_verify_does(out, tmp_path):
    found = moeconv.verify(str(out), levels=["weights"], report=str(tmp_path / "report"))
    assert (found.verdict, found.failed) == ("pass", False)
    assert [path.parent for path in found.files] == [tmp_path / "report"] * len(found.files)
    assert found.report.levels == found.written.levels == {"weights": "pass"}
    ran = command("verify", out, "--level", "weights", "--report", tmp_path / "report")
    assert printed(found) == lines(ran.out)
    ran = command("verify", out, "--level", "weights", "--report", tmp_path / "other", "--json")
    assert found.as_dict() == json.loads(ran.out)


def test_a_failure_is_a_result(out):
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    found = moeconv.verify(out, levels=["weights"])
    assert (found.verdict, found.failed) == ("fail", True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"levels": ["logit"]}, "--level logit is none of structure, weights, logits, layers, all"),
     ({"dtype": "int8"}, "--dtype int8 is none of float32"), ({"tokens": 7}, "--tokens"),
     ({"jobs": 0}, "--jobs"), ({"against": "x"}, "--against x"), ({"max_memory": "0"}, "above")],
)  # fmt: skip
def test_a_verdict_that_cannot_be_asked_for(tmp_path, arguments, words):
    with pytest.raises(UsageError, match=words):
        moeconv.verify(tmp_path / "out", **arguments)


def test_what_others_wrote_acts_on_no_terminal(tmp_path):
    made = synthetic.write(Path(tmp_path / "run\x1b[2J"))
    text = str(moeconv.open_checkpoint(made.run))
    assert "\x1b" not in text and r"run\x1b[2J" in text
