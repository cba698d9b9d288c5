"""Prepared rows through MaxText's real input pipeline: targets, borders, counts, order, resume."""

import contextlib
import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moeconv_train.data import packed
from moeconv_train.data.packing import pack
from moeconv_train.data.records import write_shard

from moeconv.errors import UsageError

pytest.importorskip("maxtext")

# MaxText's own clean-up stumbles over a finished iterator (multihost_dataloading.py, `__del__`).
pytestmark = [
    pytest.mark.maxtext,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LENGTH = 16

GLOBAL_BATCH = 4

# One row a device, of which conftest makes four.
FIXED = {
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "enable_checkpointing": False,
    "run_name": "data",
    "jax_cache_dir": "",
    "log_config": False,
    "dataset_type": "grain",
    "grain_file_type": "arrayrecord",
    "grain_worker_count": 0,
    "grain_worker_count_eval": 0,
    "grain_num_threads": 1,
    "eval_interval": 1,
    "eval_per_device_batch_size": 1,
    "tokenizer_type": "huggingface",
    "tokenize_train_data": False,
    "tokenize_eval_data": False,
    "packing": False,
    "max_target_length": LENGTH,
    "per_device_batch_size": 1,
    "vocab_size": 1024,
    "data_shuffle_seed": 0,
    "ici_data_parallelism": GLOBAL_BATCH,
    "ici_fsdp_parallelism": 1,
}


@pytest.fixture(scope="module")
def config(tokenizer, tmp_path_factory):
    """A resolved MaxText config for files `<folder>/train-*` with one row a device."""
    from maxtext.configs import pyconfig

    base = str(Path(pyconfig.__file__).with_name("base.yml"))
    made = {}

    def paths(folder):
        return {
            "base_output_directory": str(tmp_path_factory.getbasetemp()),
            "grain_train_files": str(folder / "train-*.array_record"),
            "grain_eval_files": str(folder / "train-*.array_record"),
            "tokenizer_path": str(tokenizer),
        }

    def make(folder, **keys):
        key = repr((str(folder), sorted(keys.items())))
        if key not in made:
            logging.disable(logging.ERROR)
            made[key] = pyconfig.initialize(["", base], **FIXED | paths(folder) | keys)
            logging.disable(logging.NOTSET)
        return made[key]

    return make


def write(folder, stories, *, files=1):
    """Shards of these stories; gives the number of rows."""
    for old in folder.glob("train-*"):
        old.unlink()
    rows = pack(stories, LENGTH)
    bounds = [len(rows) * i // files for i in range(files + 1)]
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        write_shard(folder / f"train-{i:05d}.array_record", rows[begin:end])
    return len(rows)


def batches(rows):
    return -(-rows // GLOBAL_BATCH)


def numbered(lengths):
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.int32) for end, n in zip(ends, lengths, strict=True)]


@contextlib.contextmanager
def iterators(config):
    """MaxText's train and eval iterators, as its trainer makes them."""
    import jax
    from maxtext.input_pipeline import input_pipeline_interface
    from maxtext.utils import maxtext_utils

    mesh = maxtext_utils.get_mesh_from_config(config, jax.devices())
    with packed.reading():
        made = input_pipeline_interface.create_data_iterator(config, mesh)
    yield made


def read_all(iterator):
    return [{name: np.asarray(value) for name, value in batch.items()} for batch in iterator]


def rows_of(config):
    with iterators(config) as (train, _):
        return read_all(train)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30))
@settings(max_examples=6, deadline=None)
def test_packed_stories_are_targets_once_and_never_meet(config, folder, lengths):
    # From 0: MaxText would take that id for padding.
    stories = numbered(lengths)
    rows = write(folder, stories)
    delivered = rows_of(config(folder, num_epoch=1))
    assert len(delivered) == batches(rows)
    story_of = np.repeat(np.arange(len(lengths)), lengths)
    targets = []
    for batch in delivered:
        assert sorted(batch) == [
            "inputs",
            "inputs_position",
            "inputs_segmentation",
            "targets",
            "targets_position",
            "targets_segmentation",
        ]
        assert {(v.shape, v.dtype.name) for v in batch.values()} == {
            ((GLOBAL_BATCH, LENGTH), "int32")
        }
        counted = batch["targets_segmentation"] != 0
        np.testing.assert_array_equal(batch["inputs_segmentation"] != 0, counted)
        np.testing.assert_array_equal(batch["inputs"][counted] + 1, batch["targets"][counted])
        targets += batch["targets"][counted].tolist()
        for row in range(GLOBAL_BATCH):
            segments = batch["inputs_segmentation"][row]
            for segment in range(1, segments.max() + 1):
                at = segments == segment
                assert len(set(story_of[batch["inputs"][row][at]])) == 1
                np.testing.assert_array_equal(batch["inputs_position"][row][at], range(at.sum()))
    assert sorted(targets) == [token for story in stories for token in story[1:].tolist()]


@pytest.mark.parametrize(
    ("rows", "files", "epochs"), [(3, 1, 1), (10, 3, 1), (10, 3, 2), (12, 2, 2)]
)
def test_steps_are_exactly_what_maxtext_delivers(config, folder, rows, files, epochs):
    assert write(folder, numbered([LENGTH] * rows), files=files) == rows
    delivered = rows_of(config(folder, num_epoch=epochs))
    assert len(delivered) == batches(epochs * rows)
    counted = np.concatenate([b["targets"][b["targets_segmentation"] != 0] for b in delivered])
    _, times = np.unique(counted, return_counts=True)
    assert set(times.tolist()) == {epochs}


def firsts(delivered):
    return [row[0] for batch in delivered for row in batch["inputs"].tolist()]


def test_order_is_fixed_by_the_seed_and_new_in_each_epoch(config, folder):
    write(folder, numbered([LENGTH + 1] * 24), files=3)
    once = firsts(rows_of(config(folder, num_epoch=2)))
    assert once == firsts(rows_of(config(folder, num_epoch=2)))
    assert sorted(once[:24]) == sorted(once[24:]) and once[:24] != once[24:]
    assert once[:24] != sorted(once[:24])
    other = firsts(rows_of(config(folder, num_epoch=2, data_shuffle_seed=1)))
    assert sorted(other) == sorted(once) and other != once


def test_order_does_not_depend_on_the_file_system(config, folder, monkeypatch):
    from maxtext.input_pipeline import grain_data_processing

    write(folder, numbered([LENGTH] * 24), files=3)
    straight = firsts(rows_of(config(folder, num_epoch=1)))
    found = grain_data_processing.glob.glob
    monkeypatch.setattr(
        grain_data_processing.glob, "glob", lambda *a, **k: sorted(found(*a, **k), reverse=True)
    )
    assert firsts(rows_of(config(folder, num_epoch=1))) == straight


def test_evaluation_reads_every_row_in_order_each_time(config, folder):
    write(folder, numbered([LENGTH + 1] * 10), files=2)
    with iterators(config(folder, num_epoch=1)) as (_, evaluation):
        first = firsts(read_all(evaluation))
        evaluation.reset()
        assert firsts(read_all(evaluation)) == first
    real = list(range(0, 10 * (LENGTH + 1), LENGTH + 1))
    assert first == [*real, 0, 0]  # the last batch is filled up


def test_a_restored_iterator_goes_on_where_the_state_was_taken(config, folder):
    write(folder, numbered([LENGTH + 1] * 22), files=2)
    settings_ = config(folder, num_epoch=2)
    whole = firsts(rows_of(settings_))
    with iterators(settings_) as (train, _):
        read = [next(train) for _ in range(7)]  # into the second epoch
        state = train.local_iterator.get_state()
    with iterators(settings_) as (again, _):
        again.local_iterator.set_state(state)
        rest = []
        with contextlib.suppress(StopIteration):
            while True:
                rest.append(next(again))
    assert firsts([{k: np.asarray(v) for k, v in b.items()} for b in [*read, *rest]]) == whole


def test_stock_maxtext_refuses_packed_rows(config, folder):
    import jax
    from maxtext.input_pipeline import input_pipeline_interface
    from maxtext.utils import maxtext_utils

    write(folder, numbered([LENGTH] * 4))
    made = config(folder, num_epoch=1)
    mesh = maxtext_utils.get_mesh_from_config(made, jax.devices())
    with pytest.raises(ValueError, match="Column 'text' not found"):
        read_all(input_pipeline_interface.create_data_iterator(made, mesh)[0])


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("packing", True, "false"),
        ("tokenize_train_data", True, "false"),
        ("grain_worker_count", 2, "0"),
    ],
)
def test_settings_that_packed_rows_contradict_are_refused(config, folder, key, value, must):
    write(folder, numbered([LENGTH] * 4))
    with pytest.raises(UsageError, match=f"{key}={value}: prepared rows need {key}={must}"):
        rows_of(config(folder, num_epoch=1, **{key: value}))
