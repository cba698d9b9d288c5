"""Preparing data again: what is there, crashes, other processes, folders of others."""

import json
import os
import pathlib
import signal
import subprocess
import time

import cli_runner
import pytest
from data_lab import STORIES, files_of, jsonl, texts_of
from moeconv_train.data import DataSet, PrepareOptions, prepare_dataset

from moeconv.errors import ConfigError, OutputError, UsageError

pytest.importorskip("array_record")


def test_asking_again_opens_what_is_there(tmp_path, options):
    source = jsonl(tmp_path / "stories.jsonl", STORIES[:40])
    out = tmp_path / "out"
    first = prepare_dataset(str(source), out, options())
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert prepare_dataset(str(source), out, options()) == first
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    for keys, what in (
        ({"sequence_length": 128}, "sequence_length"),
        ({"separator": "---"}, "source"),
        ({"seed": 1}, "seed"),
        ({"validation_fraction": 0.5}, "validation_fraction"),
        ({"tokenizer": "llama3"}, "tokenizer"),
    ):
        other = PrepareOptions(**{**options().model_dump(), **keys})
        with pytest.raises(OutputError, match=f"another {what}; .* remove it"):
            prepare_dataset(str(source), out, other)
    jsonl(source, STORIES[:41])
    with pytest.raises(OutputError, match="another source;"):
        prepare_dataset(str(source), out, options())


def test_a_source_that_is_gone_since_is_not_missed(tmp_path, options):
    source = jsonl(tmp_path / "stories.jsonl", STORIES[:40])
    first = prepare_dataset(str(source), tmp_path / "out", options())
    source.unlink()
    assert prepare_dataset(str(source), tmp_path / "out", options()) == first
    for other in (str(tmp_path / "tales.jsonl"), "someone/stories"):
        with pytest.raises(OutputError, match="another source;"):
            prepare_dataset(other, tmp_path / "out", options())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_preparation_that_is_ended_leaves_no_dataset(tmp_path, tokenizer, options, how):
    source = jsonl(tmp_path / "s.jsonl", STORIES * 10)
    out = tmp_path / "out"
    words = ["data", "prepare", source, "--tokenizer", tokenizer, "--out", out]
    process = subprocess.Popen(
        cli_runner.command(*words, "--seq-length", 256),
        stderr=subprocess.PIPE,
        text=True,
        env=cli_runner.environment(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*/new/tokenizer/tokenizer.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, how)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert not out.exists()
    if how == signal.SIGINT:
        assert process.returncode == 130 and err.endswith("interrupted: nothing was written\n")
        assert "Traceback" not in err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["s.jsonl"]
        return
    assert process.returncode == -how
    dataset = prepare_dataset(str(source), out, options(validation_fraction=0.0))
    assert dataset.counts().stories == 10 * len(STORIES)


def test_what_is_prepared_may_lie_where_nothing_can_be_written(tmp_path, options):
    """Nothing is put into the directory, not even for a moment: its time does not change."""
    source, out = jsonl(tmp_path / "stories.jsonl", STORIES[:20]), tmp_path / "rows"
    first = prepare_dataset(str(source), out, options())
    os.utime(out, (0, 0))
    assert prepare_dataset(str(source), out, options()).digest == first.digest
    assert out.stat().st_mtime_ns == 0


def test_after_a_mistake_all_is_as_before(tmp_path, options):
    source = jsonl(tmp_path / "b.jsonl", STORIES[:40])
    whole = source.read_bytes()
    source.write_bytes(whole + b"not json\n")
    out = tmp_path / "deep" / "out"
    small = options(validation_fraction=0.0, shard_characters=5000)
    with pytest.raises(UsageError, match=r"b.jsonl: line 41 is not JSON"):
        prepare_dataset(str(source), out, small)
    assert not list((tmp_path / "deep").iterdir())
    source.write_bytes(whole)
    dataset = prepare_dataset(str(source), out, small)
    assert sorted(texts_of(dataset)) == sorted(STORIES[:40])
    assert set(out.glob("*.array_record")) == {*dataset.shards("train")}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_source_that_changes_while_it_is_read_is_told(tmp_path, options):
    source = jsonl(tmp_path / "a.jsonl", STORIES[:40])

    def write(_):
        jsonl(source, STORIES[:41])

    with pytest.raises(UsageError, match=r"a.jsonl: changed while it was read; run again"):
        prepare_dataset(str(source), tmp_path / "out", options(), progress=write)
    assert not (tmp_path / "out").exists()


def test_of_two_at_once_one_is_refused(tmp_path, options):
    source, out = jsonl(tmp_path / "a.jsonl", STORIES[:40]), tmp_path / "out"

    def other(_):
        if not out.exists():
            prepare_dataset(str(source), out, options())

    with pytest.raises(OutputError, match="not empty"):
        prepare_dataset(str(source), out, options(), progress=other)
    assert DataSet.read(out).counts().stories
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_out_may_be_a_link_to_a_folder(tmp_path, options):
    source = jsonl(tmp_path / "a.jsonl", STORIES[:40])
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "empty")
    dataset = prepare_dataset(str(source), tmp_path / "out", options())
    assert DataSet.read(tmp_path / "disk" / "empty").digest == dataset.digest


def test_a_dataset_that_lost_a_shard_is_not_taken_for_whole(tmp_path, options):
    source = jsonl(tmp_path / "a.jsonl", STORIES)
    dataset = prepare_dataset(str(source), tmp_path / "out", options())
    shard = next(dataset.shards("train"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"has not the \d+ bytes that data.json says"):
        DataSet.read(tmp_path / "out")
    told = tmp_path / "out" / "data.json"
    manifest = json.loads(told.read_text())
    for change, message in (
        ({"format": "other"}, r"data.json: format: .*remove the folder"),
        ({"request": {**manifest["request"], "layout": "stories"}}, r"layout: .*'packed'; remove"),
        ({"shards": [{**manifest["shards"][0], "name": "../a.jsonl"}]}, r"leads out of"),
        ({"shards": []}, r"train-0000-00000.array_record: data.json does not name it; remove it"),
    ):
        told.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ConfigError, match=message):
            DataSet.read(tmp_path / "out")


def test_a_folder_with_other_things_in_it_is_not_touched(tmp_path, options):
    source = jsonl(tmp_path / "a.jsonl", STORIES[:5])
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-mine.array_record").write_text("precious")
    with pytest.raises(OutputError, match=r"is not empty \(it holds train-mine"):
        prepare_dataset(str(source), out, options())
    assert files_of(out) == {"train-mine.array_record": b"precious"}


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, options):
    source = jsonl(tmp_path / "a.jsonl", STORIES[:5])
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file"):
        prepare_dataset(str(source), tmp_path / "file" / "out", options())


def test_a_full_disk_is_one_sentence(tmp_path, options, monkeypatch):
    from moeconv_train.data import records

    with pytest.raises(OSError, match=r"/dev/full"):
        records.write_shard(pathlib.Path("/dev/full"), [{"tokens": [1, 2, 3]}])
    source = jsonl(tmp_path / "a.jsonl", STORIES[:5])
    whole = records.write_shard
    monkeypatch.setattr(
        records, "write_shard", lambda _, rows: whole(pathlib.Path("/dev/full"), rows)
    )
    with pytest.raises(
        OutputError, match=r"^/dev/full: cannot be written or read \(.*No space left"
    ):
        prepare_dataset(str(source), tmp_path / "out", options())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_stories_that_an_earlier_version_truncated_are_read(tmp_path, options):
    source, out = jsonl(tmp_path / "a.jsonl", STORIES[:40]), tmp_path / "out"
    prepare_dataset(str(source), out, options())
    told = json.loads((out / "data.json").read_text())
    told["request"]["too_long"] = "truncate"
    (out / "data.json").write_text(json.dumps(told))
    assert DataSet.read(out).counts().stories
    with pytest.raises(OutputError, match="prepared with another too_long;"):
        prepare_dataset(str(source), out, options())
