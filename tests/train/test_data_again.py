"""Preparing data again: what is there, crashes, other processes, folders of others."""

import json
import os
import signal
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
        ({"layout": "stories"}, "layout"),
        ({"seed": 1}, "seed"),
        ({"validation_fraction": 0.5}, "validation_fraction"),
        ({"tokenizer": "llama3"}, "tokenizer"),
    ):
        other = PrepareOptions(**{**options().__dict__, **keys})
        with pytest.raises(OutputError, match=f"another {what}; .*--overwrite"):
            prepare_dataset(str(source), out, other)
    jsonl(source, STORIES[:41])
    with pytest.raises(OutputError, match="another content of the source"):
        prepare_dataset(str(source), out, options())
    again = prepare_dataset(str(source), out, options(overwrite=True))
    assert again.counts().stories + again.counts("validation").stories == 41


def wait_for(path, pattern, count, process):
    deadline = time.monotonic() + 120
    while len(list(path.glob(pattern))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(tmp_path, tokenizer, how):
    jsonl(tmp_path / "s" / "train-0.jsonl", STORIES * 5)
    jsonl(tmp_path / "s" / "train-1.jsonl", STORIES * 5)
    args = ["data", "prepare", tmp_path / "s", "--tokenizer", tokenizer, "--seq-length", 256]
    args += ["--shard-characters", 50_000, "--workers", 2, "--json"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    journal = out / ".prepare"
    process = cli_runner.spawn(*args, "--out", out)
    wait_for(journal, "000?-*.json", 5, process)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-how if how == signal.SIGKILL else 130)
    assert how == signal.SIGKILL or "interrupted: the same command goes on" in err
    # The workers of a killed parent end by themselves; until then they may finish a chunk.
    time.sleep(1.5)
    done = {path.stem for path in journal.glob("000?-*.json")}
    assert len(done) >= 5
    with pytest.raises(ConfigError, match="no prepared dataset"):
        DataSet.read(out)
    kept = {f: f.stat().st_mtime_ns for f in out.glob("*.array_record") if f.stem[-10:] in done}
    # What a crash may leave besides: a half-written file, a damaged shard with its receipt.
    (out / ".train-0000-00009.array_record.1.partial").write_bytes(b"half")
    damaged = min(kept)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    ran = cli_runner.run(*args, "--out", out)
    assert ran.code == 0, ran.err
    assert "going on with an interrupted preparation" in ran.err
    assert cli_runner.run(*args, "--out", whole).code == 0
    assert files_of(out) == files_of(whole)
    for file, written in kept.items():
        redone = file.stem[-10:] == damaged.stem[-10:]  # the whole chunk is
        assert (file.stat().st_mtime_ns == written) == (not redone)
    report = json.loads(ran.out)
    assert report["splits"]["train"]["stories"] + report["splits"]["validation"]["stories"] == 4000
    assert report["digest"] == DataSet.read(whole).digest
    assert report["overrides"]["grain_train_files"] == str(out / "train-*.array_record")


def test_what_is_prepared_may_lie_where_nothing_can_be_written(tmp_path, options):
    """Nothing is put into the directory, not even for a moment: its time does not change."""
    source, out = jsonl(tmp_path / "stories.jsonl", STORIES[:20]), tmp_path / "rows"
    first = prepare_dataset(str(source), out, options())
    os.utime(out, (0, 0))
    assert prepare_dataset(str(source), out, options()).digest == first.digest
    assert out.stat().st_mtime_ns == 0


def test_part_of_something_else_is_not_gone_on_with(tmp_path, options):
    source = jsonl(tmp_path / "a.jsonl", STORIES[:40])
    out = tmp_path / "out"
    crashed = jsonl(tmp_path / "b.jsonl", [*STORIES[:40], "x"])
    with crashed.open("a") as file:
        file.write("not json\n")
    with pytest.raises(UsageError, match=r"b.jsonl: line 42 is not JSON"):
        prepare_dataset(str(crashed), out, options(shard_characters=5000))
    assert list(out.glob("*.array_record"))
    with pytest.raises(OutputError, match="part of a preparation of something else"):
        prepare_dataset(str(source), out, options(shard_characters=5000))
    dataset = prepare_dataset(str(source), out, options(shard_characters=5000, overwrite=True))
    assert sorted(texts_of(dataset) + texts_of(dataset, "validation")) == sorted(STORIES[:40])
    assert set(out.glob("*.array_record")) == {
        *dataset.shards("train"),
        *dataset.shards("validation"),
    }


def test_two_at_once_are_kept_apart(tmp_path, options):
    import fcntl

    source = jsonl(tmp_path / "a.jsonl", STORIES[:40])
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    with (tmp_path / "out" / ".prepare" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is preparing data there"):
            prepare_dataset(str(source), tmp_path / "out", options())


def test_a_dataset_that_lost_a_shard_is_not_taken_for_whole(tmp_path, options):
    source = jsonl(tmp_path / "a.jsonl", STORIES)
    dataset = prepare_dataset(str(source), tmp_path / "out", options())
    shard = next(dataset.shards("train"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="absent or not of the"):
        DataSet.read(tmp_path / "out")
    (tmp_path / "out" / "data.json").write_text('{"format": "other"}')
    with pytest.raises(ConfigError, match=r"data.json: format: .*--overwrite"):
        DataSet.read(tmp_path / "out")


def test_a_folder_with_other_things_in_it_is_not_touched(tmp_path, options):
    source = jsonl(tmp_path / "a.jsonl", STORIES[:5])
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-mine.array_record").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"is not empty \(it holds train-mine"):
            prepare_dataset(str(source), out, options(overwrite=overwrite))
    assert files_of(out) == {"train-mine.array_record": b"precious"}


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, options):
    source = jsonl(tmp_path / "a.jsonl", STORIES[:5])
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file"):
        prepare_dataset(str(source), tmp_path / "file" / "out", options())


def test_a_dead_worker_is_one_sentence(tmp_path, options, monkeypatch):
    from moeconv_train.data import work

    class Gone(work.ProcessPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):
            return super().submit(os._exit, 9)

    monkeypatch.setattr(work, "ProcessPoolExecutor", Gone)
    source = jsonl(tmp_path / "a.jsonl", STORIES[:40])
    with pytest.raises(OutputError, match=r"a worker process was killed.*fewer --workers"):
        prepare_dataset(str(source), tmp_path / "out", options(workers=1))
