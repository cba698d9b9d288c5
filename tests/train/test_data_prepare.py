"""`moeconv data prepare` on local files: formats, splits, counts, crashes, and wrong input."""

import gzip
import json
import os
import signal
import time
from pathlib import Path

import cli_runner
import numpy as np
import pytest
from moeconv_train.data import DataSet, PrepareOptions, batches, prepare_dataset, read_stories
from moeconv_train.data.packing import unpack
from moeconv_train.data.records import parse, read_shard
from moeconv_train.tokenizer import save_tokenizer, train_tokenizer

from moeconv.errors import ConfigError, OutputError, UsageError

pytest.importorskip("array_record")

STORIES = read_stories()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(STORIES), directory)
    return directory


@pytest.fixture
def options(tokenizer):
    def make(**keys):
        return PrepareOptions(tokenizer=str(tokenizer), **{"sequence_length": 256, **keys})

    return make


def jsonl(path, stories, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({field: story}) + "\n" for story in stories)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def texts_of(dataset, split="train"):
    """The stories of a packed split, decoded again."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(dataset.directory / "tokenizer" / "tokenizer.json"))
    found = []
    for shard in dataset.shards(split):
        for row in read_shard(shard):
            for piece in np.split(row["tokens"], np.cumsum(row["lengths"])[:-1]):
                assert (piece[0], piece[-1]) == (0, 1)  # BOS and EOS of the tiny tokenizer
                found.append(tokenizer.decode(piece[1:-1], skip_special_tokens=False))
    return found


def files_of(directory):
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def test_every_story_arrives_whole_and_is_counted(tmp_path, options):
    source = jsonl(tmp_path / "stories.jsonl", [*STORIES, "", "  \n", STORIES[0]])
    notes = []
    dataset = prepare_dataset(
        str(source),
        tmp_path / "out",
        options(shard_characters=20_000, validation_fraction=0.1),
        note=notes.append,
    )
    train, validation = texts_of(dataset), texts_of(dataset, "validation")
    assert sorted(train + validation) == sorted([*STORIES, STORIES[0]])
    assert 20 < len(validation) < 60
    counts = {split: dataset.counts(split) for split in ("train", "validation")}
    assert (counts["train"].stories, counts["validation"].stories) == (len(train), len(validation))
    assert counts["train"].empty + counts["validation"].empty == 2
    for split, count in counts.items():
        rows = [row for shard in dataset.shards(split) for row in read_shard(shard)]
        assert count.rows == len(rows)
        assert count.tokens == sum(len(row["tokens"]) for row in rows)
        assert count.targets == count.tokens - count.stories
        weights = sum((unpack(row, 256)["targets_segmentation"] != 0).sum() for row in rows)
        assert count.targets == weights
    assert dataset.fill() == counts["train"].targets / (counts["train"].rows * 256)
    assert 0.75 < dataset.fill() <= 1  # each small shard ends with a row that is not full
    assert dataset.steps_for_epochs(2, 8) == -(-2 * counts["train"].rows // 8)
    assert any("holding out 10.00%" in note for note in notes)
    assert not (tmp_path / "out" / ".prepare").exists()
    assert str(tmp_path) not in (tmp_path / "out" / "data.json").read_text()


def test_the_same_bytes_whatever_the_workers(tmp_path, options):
    source = str(jsonl(tmp_path / "stories.jsonl", STORIES))
    here = prepare_dataset(source, tmp_path / "a", options(shard_characters=20_000))
    there = prepare_dataset(source, tmp_path / "b", options(shard_characters=20_000, workers=2))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert here.digest == there.digest
    other = prepare_dataset(source, tmp_path / "c", options(shard_characters=30_000))
    assert other.digest != here.digest


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet"])
def test_formats_give_the_same_stories(tmp_path, options, suffix):
    stories = [*STORIES[:30], "naïve — 日本語 🙂\r\n\ttab"]
    path = tmp_path / "source" / f"train{suffix}"
    path.parent.mkdir()
    if suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.table({"id": range(31), "text": stories}), path, row_group_size=7)
    elif suffix == ".txt":
        path.write_bytes("<|endoftext|>".join(stories).encode())
    elif suffix == ".jsonl.zst":
        pa = pytest.importorskip("pyarrow")
        plain = jsonl(tmp_path / "plain.jsonl", stories).read_bytes()
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(plain)
    else:
        jsonl(path, stories)
    dataset = prepare_dataset(
        str(path.parent), tmp_path / "out", options(validation_fraction=0.0, workers=0)
    )
    assert sorted(texts_of(dataset)) == sorted(stories)
    assert "grain_eval_files" not in dataset.overrides()


def test_a_text_file_is_split_where_the_user_says(tmp_path, tokenizer):
    (tmp_path / "tale.txt").write_text("one\n\ntwo\n\nthree")
    out = tmp_path / "out"
    ran = cli_runner.moeconv(
        *("data", "prepare", tmp_path / "tale.txt", "--out", out, "--tokenizer", tokenizer),
        *("--separator", r"\n\n", "--validation-fraction", 0, "--workers", 0, "--seq-length", 64),
    )
    assert ran.code == 0, ran.err
    assert sorted(texts_of(DataSet.read(out))) == ["one", "three", "two"]


def test_names_tell_the_splits_and_patterns_overrule_them(tmp_path, options):
    jsonl(tmp_path / "s" / "data" / "train-0.jsonl", STORIES[:40])
    jsonl(tmp_path / "s" / "data" / "train-1.jsonl", STORIES[40:80])
    jsonl(tmp_path / "s" / "data" / "validation-0.jsonl", STORIES[80:90])
    jsonl(tmp_path / "s" / "data" / "test-0.jsonl", STORIES[90:95])
    told = prepare_dataset(str(tmp_path / "s"), tmp_path / "a", options())
    assert sorted(texts_of(told)) == sorted(STORIES[:80])
    assert sorted(texts_of(told, "validation")) == sorted(STORIES[80:90])
    splits = {"train": "data/train-1*", "validation": "data/test-*"}
    said = prepare_dataset(str(tmp_path / "s"), tmp_path / "b", options(splits=splits))
    assert sorted(texts_of(said)) == sorted(STORIES[40:80])
    assert sorted(texts_of(said, "validation")) == sorted(STORIES[90:95])


def test_stories_longer_than_a_row_are_counted(tmp_path, options):
    source = str(jsonl(tmp_path / "stories.jsonl", STORIES[:40]))
    keys = {"sequence_length": 32, "validation_fraction": 0.0}
    split = prepare_dataset(source, tmp_path / "a", options(**keys)).counts()
    short = prepare_dataset(source, tmp_path / "b", options(**keys, too_long="truncate")).counts()
    assert split.stories == short.stories == split.cut == short.cut == 40
    assert (split.tokens, split.dropped) == (short.tokens, 0)
    assert split.targets == split.tokens - 40
    assert short.targets == split.targets - short.dropped == 40 * 32
    contiguous = prepare_dataset(source, tmp_path / "c", options(**keys, layout="contiguous"))
    assert contiguous.counts().targets == contiguous.counts().tokens - 1


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
    jsonl(tmp_path / "s" / "train-0.jsonl", STORIES * 10)
    jsonl(tmp_path / "s" / "train-1.jsonl", STORIES * 10)
    args = ["data", "prepare", tmp_path / "s", "--tokenizer", tokenizer, "--seq-length", 256]
    args += ["--shard-characters", 100_000, "--workers", 2, "--json"]
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
    assert report["splits"]["train"]["stories"] + report["splits"]["validation"]["stories"] == 8000
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


def test_a_model_that_the_rows_do_not_fit_is_refused(tmp_path, options):
    dataset = prepare_dataset(
        str(jsonl(tmp_path / "a.jsonl", STORIES[:40])), tmp_path / "out", options()
    )
    dataset.check(max_target_length=256, vocab_size=1024)
    with pytest.raises(ConfigError, match="rows of 256 tokens and max_target_length is 512"):
        dataset.check(max_target_length=512, vocab_size=1024)
    with pytest.raises(ConfigError, match="has 1024 ids and vocab_size is 1000; train with"):
        dataset.check(max_target_length=256, vocab_size=1000)


@pytest.mark.maxtext
def test_overrides_are_keys_of_maxtext_and_read_the_data(tmp_path, options):
    pytest.importorskip("maxtext")
    from maxtext.configs import pyconfig
    from maxtext.input_pipeline import grain_data_processing as pipeline

    source = str(jsonl(tmp_path / "a.jsonl", STORIES))
    dataset = prepare_dataset(source, tmp_path / "out", options())
    base = str(Path(pyconfig.__file__).with_name("base.yml"))
    argv = [f"{key}={value}" for key, value in dataset.overrides(epochs=2).items()]
    config = pyconfig.initialize(
        ["", base, *argv, "run_name=r", "vocab_size=1024", "hardware=cpu", "jax_cache_dir="],
        skip_jax_distributed_system=True,
        enable_checkpointing=False,
        base_output_directory=str(tmp_path),
        log_config=False,
        per_device_batch_size=2,
    )
    rows = 2 * dataset.counts().rows
    with dataset.reading():
        data = pipeline.get_datasets(
            *(config.grain_train_files, config.grain_file_type, True, config.data_shuffle_seed),
            *(1, config.num_epoch, 0, 1, config.grain_worker_count, 1, 1, 1),
        )
        stage = pipeline._get_pipeline_fn(config)
        delivered = list(stage(data, config, config.train_data_columns, False, 0, 1))
    size = config.global_batch_size_to_load
    assert len(delivered) == dataset.steps_for_epochs(2, size) == batches(rows, size)
    weights = sum(int((batch["targets_segmentation"] != 0).sum()) for batch in delivered)
    assert weights == 2 * dataset.counts().targets


WRONG = [
    (["absent.jsonl"], 2, "absent.jsonl: no such file or folder; give one"),
    (["absent"], 10, "absent: no such file or folder, and with HF_HUB_OFFLINE set"),
    (["{dir}/empty"], 2, "has no parquet, jsonl or text file to train on"),
    (["{dir}/notes.md"], 2, "is no parquet, jsonl or text file by its name"),
    (["{dir}/a.jsonl", "--column", "story"], 2, "line 1 is no object with a field 'story'; name"),
    (["{dir}/number.jsonl"], 2, "line 1: 'text' is not text"),
    (["{dir}/broken.jsonl.gz"], 2, "cannot be read as json"),
    (["{dir}/latin.txt"], 2, "cannot be read as text"),
    (["{dir}/broken.parquet"], 2, "cannot be read as parquet"),
    (["{dir}/blank.jsonl"], 2, "holds no story to train on"),
    (["{dir}", "--split", "train=x*"], 2, "--split train=x* matches no parquet, jsonl or text"),
    (["{dir}", "--split", "training=a*"], 2, "--split: 'training' is neither train nor validation"),
    (["{dir}", "--split", "a*"], 2, "--split a*: give train=GLOB and"),
    (["{dir}/a.jsonl", "--seq-length", "1"], 2, "--seq-length: a row needs at least 2 tokens"),
    (["{dir}/a.jsonl", "--validation-fraction", "1"], 2, "--validation-fraction: must be from 0"),
    (["{dir}/a.jsonl", "--tokenizer", "{dir}/empty"], 8, "has no tokenizer.json"),
]


@pytest.mark.parametrize(("args", "code", "message"), WRONG)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    tmp_path, tokenizer, args, code, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    jsonl(source / "a.jsonl", STORIES[:5])
    (source / "notes.md").write_text("x")
    (source / "number.jsonl").write_text('{"text": 5}\n')
    (source / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:40])
    (source / "latin.txt").write_bytes(b"caf\xe9")
    (source / "broken.parquet").write_bytes(b"PAR1 and no more")
    (source / "blank.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    if "parquet" in args[0]:
        pytest.importorskip("pyarrow")
    words = [word.replace("{dir}", str(source)) for word in args]
    if "--tokenizer" not in words:
        words += ["--tokenizer", str(tokenizer)]
    ran = cli_runner.moeconv("data", "prepare", *words, "--out", tmp_path / "out", "--workers", 0)
    assert ran.code == code, ran.err
    assert message in ran.error
    with pytest.raises(ConfigError):
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


def test_a_record_is_a_tf_example(tmp_path, options):
    from array_record.python.array_record_module import ArrayRecordReader

    source = str(jsonl(tmp_path / "a.jsonl", STORIES[:40]))
    dataset = prepare_dataset(source, tmp_path / "out", options(layout="stories"))
    reader = ArrayRecordReader(str(next(dataset.shards("train"))))
    assert "group_size:1," in reader.writer_options_string()
    assert [sorted(parse(record)) for record in reader.read_all()] == [["text"]] * (
        reader.num_records()
    )


def test_a_file_that_is_not_there_is_the_command_lines_mistake(tmp_path):
    for name in ("stories.jsonl", str(tmp_path / "stories")):
        with pytest.raises(UsageError, match="no such file or folder; give one"):
            prepare_dataset(name, tmp_path / "out", PrepareOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--workers", -1), ("--shard-characters", -3), ("--shard-characters", 0)]
)
def test_the_option_that_is_wrong_is_named(tmp_path, option, value):
    ran = cli_runner.moeconv("data", "prepare", "x.txt", "--out", tmp_path / "out", option, value)
    assert ran.code == UsageError.exit_code
    assert ran.error.startswith(f"{option}: must be ")
    assert ran.error.count("--") == 1
