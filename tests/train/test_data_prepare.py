"""`moeconv data prepare` on local files: formats, splits, counts, records."""

from pathlib import Path

import cli_runner
import pytest
from data_lab import STORIES, files_of, jsonl, texts_of
from moeconv_train.data import DataSet, packed, prepare_dataset
from moeconv_train.data.packing import unpack
from moeconv_train.data.records import parse, read_shard

from moeconv.errors import ConfigError, UsageError

pytest.importorskip("array_record")


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stories.jsonl"]
    assert str(tmp_path) not in (tmp_path / "out" / "data.json").read_text()


def test_the_same_bytes_for_the_same_input(tmp_path, options):
    source = str(jsonl(tmp_path / "stories.jsonl", STORIES))
    here = prepare_dataset(source, tmp_path / "a", options(shard_characters=20_000))
    there = prepare_dataset(source, tmp_path / "b", options(shard_characters=20_000))
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
    dataset = prepare_dataset(str(path.parent), tmp_path / "out", options(validation_fraction=0.0))
    assert sorted(texts_of(dataset)) == sorted(stories)
    assert "grain_eval_files" not in dataset.overrides()


def test_a_text_file_is_split_where_the_user_says(tmp_path, tokenizer):
    (tmp_path / "tale.txt").write_text("one\n\ntwo\n\nthree")
    out = tmp_path / "out"
    ran = cli_runner.moeconv(
        *("data", "prepare", tmp_path / "tale.txt", "--out", out, "--tokenizer", tokenizer),
        *("--separator", r"\n\n", "--validation-fraction", 0, "--seq-length", 64),
    )
    assert ran.code == 0, ran.err
    assert sorted(texts_of(DataSet.read(out))) == ["one", "three", "two"]


def test_tinystories_own_text_is_read_story_by_story(tmp_path, options):
    text = "".join(f"{story}\n<|endoftext|>\n" for story in STORIES[:20])
    (tmp_path / "TinyStories-train.txt").write_text(text)
    source = str(tmp_path / "TinyStories-train.txt")
    dataset = prepare_dataset(source, tmp_path / "out", options(validation_fraction=0.0))
    assert sorted(texts_of(dataset)) == sorted(STORIES[:20])
    assert dataset.counts().empty == 1  # after the last mark


def test_a_folder_of_several_formats_is_not_read_in_part(tmp_path, options):
    jsonl(tmp_path / "s" / "a.jsonl", STORIES[:20])
    (tmp_path / "s" / "c.txt").write_text("<|endoftext|>".join(STORIES[20:30]))
    with pytest.raises(
        UsageError, match=r"several formats for train \(c.txt, a.jsonl\); keep those that"
    ):
        prepare_dataset(str(tmp_path / "s"), tmp_path / "out", options())


def test_names_tell_the_splits(tmp_path, options):
    jsonl(tmp_path / "s" / "data" / "train-0.jsonl", STORIES[:40])
    jsonl(tmp_path / "s" / "data" / "train-1.jsonl", STORIES[40:80])
    jsonl(tmp_path / "s" / "data" / "validation-0.jsonl", STORIES[80:90])
    jsonl(tmp_path / "s" / "data" / "test-0.jsonl", STORIES[90:95])
    notes = []
    told = prepare_dataset(str(tmp_path / "s"), tmp_path / "a", options(), note=notes.append)
    assert sorted(texts_of(told)) == sorted(STORIES[:80])
    assert sorted(texts_of(told, "validation")) == sorted(STORIES[80:90])
    assert notes[-1] == "not read: data/test-0.jsonl"
    assert all("tokenizer" in note for note in notes[:-1])


def test_stories_longer_than_a_row_are_counted(tmp_path, options):
    source = str(jsonl(tmp_path / "stories.jsonl", STORIES[:40]))
    keys = {"sequence_length": 32, "validation_fraction": 0.0}
    counts = prepare_dataset(source, tmp_path / "a", options(**keys)).counts()
    assert counts.stories == counts.cut == 40
    assert counts.targets == counts.tokens - 40


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
    argv = [f"{key}={value}" for key, value in dataset.overrides().items()]
    config = pyconfig.initialize(
        [
            "",
            base,
            *argv,
            "run_name=r",
            "vocab_size=1024",
            "hardware=cpu",
            "jax_cache_dir=",
        ],
        num_epoch=2,
        skip_jax_distributed_system=True,
        enable_checkpointing=False,
        base_output_directory=str(tmp_path),
        log_config=False,
        per_device_batch_size=2,
    )
    with packed.reading():
        data = pipeline.get_datasets(
            *(config.grain_train_files, config.grain_file_type, True, config.data_shuffle_seed),
            *(1, config.num_epoch, 0, 1, config.grain_worker_count, 1, 1, 1),
        )
        stage = pipeline._get_pipeline_fn(config)
        delivered = list(stage(data, config, config.train_data_columns, False, 0, 1))
    size = config.global_batch_size_to_load
    assert len(delivered) == dataset.steps_for_epochs(2, size)
    weights = sum(int((batch["targets_segmentation"] != 0).sum()) for batch in delivered)
    assert weights == 2 * dataset.counts().targets


def test_a_record_is_a_tf_example(tmp_path, options):
    from array_record.python.array_record_module import ArrayRecordReader

    source = str(jsonl(tmp_path / "a.jsonl", STORIES[:40]))
    dataset = prepare_dataset(source, tmp_path / "out", options())
    reader = ArrayRecordReader(str(next(dataset.shards("train"))))
    assert "group_size:1," in reader.writer_options_string()
    assert [sorted(parse(record)) for record in reader.read_all()] == [["lengths", "tokens"]] * (
        reader.num_records()
    )
