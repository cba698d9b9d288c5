"""Prepared rows through MaxText's real input pipeline: targets, borders, counts, order, resume."""

import contextlib
import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moeconv_train.data import batches, packed
from moeconv_train.data.packing import LAYOUTS, pack
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

PAD = 2  # of the tiny tokenizer

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


def write(folder, stories, layout, *, files=1, length=LENGTH):
    """Shards of these stories; gives the number of rows."""
    for old in folder.glob("train-*"):
        old.unlink()
    rows = pack(stories, length, layout).rows
    bounds = [len(rows) * i // files for i in range(files + 1)]
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        write_shard(folder / f"train-{i:05d}.array_record", rows[begin:end])
    return len(rows)


def numbered(lengths, first=0):
    ends = first + np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.int32) for end, n in zip(ends, lengths, strict=True)]


@contextlib.contextmanager
def iterators(config, layout):
    """MaxText's train and eval iterators, as its trainer makes them."""
    import jax
    from maxtext.input_pipeline import input_pipeline_interface
    from maxtext.utils import maxtext_utils

    mesh = maxtext_utils.get_mesh_from_config(config, jax.devices())
    with packed.reading(layout):
        made = input_pipeline_interface.create_data_iterator(config, mesh)
    yield made


def read_all(iterator):
    return [{name: np.asarray(value) for name, value in batch.items()} for batch in iterator]


def rows_of(config, layout):
    with iterators(config, layout) as (train, _):
        return read_all(train)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_packed_stories_are_targets_once_and_never_meet(config, folder, lengths):
    # From 0: MaxText would take that id for padding.
    stories = numbered(lengths)
    rows = write(folder, stories, "packed")
    delivered = rows_of(config(folder, num_epoch=1), "packed")
    assert len(delivered) == batches(rows, GLOBAL_BATCH)
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


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30))
@settings(max_examples=10, deadline=None)
def test_one_story_a_row_is_a_target_once_in_stock_maxtext(config, folder, lengths):
    stories = numbered(lengths, first=PAD + 1)
    rows = write(folder, stories, "stories")
    delivered = rows_of(config(folder, num_epoch=1), "stories")
    assert len(delivered) == batches(rows, GLOBAL_BATCH)
    targets = [
        token for b in delivered for token in b["targets"][b["targets_segmentation"] != 0].tolist()
    ]
    assert sorted(targets) == [token for story in stories for token in story[1:].tolist()]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30))
@settings(max_examples=10, deadline=None)
def test_contiguous_rows_lose_no_target_at_their_borders_in_stock_maxtext(config, folder, lengths):
    first = PAD + 1
    rows = write(folder, numbered(lengths, first=first), "contiguous")
    delivered = rows_of(config(folder, num_epoch=1), "contiguous")
    assert len(delivered) == batches(rows, GLOBAL_BATCH)
    targets = [
        token for b in delivered for token in b["targets"][b["targets_segmentation"] != 0].tolist()
    ]
    assert sorted(targets) == list(range(first + 1, first + sum(lengths)))


def test_stock_maxtext_masks_the_pad_id_wherever_it_stands(config, folder):
    # Why tokens.py gives stock layouts a pad token that no story has.
    write(folder, [np.array([5, 6, PAD, 7, 8], np.int32)], "stories")
    (batch,) = rows_of(config(folder, num_epoch=1), "stories")
    counted = batch["targets"][batch["targets_segmentation"] != 0].tolist()
    assert counted == [6, 7, 8]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("rows", "files", "epochs"), [(3, 1, 1), (10, 3, 1), (10, 3, 2), (12, 2, 2)]
)
def test_steps_are_exactly_what_maxtext_delivers(config, folder, layout, rows, files, epochs):
    stories = numbered([LENGTH] * rows, first=PAD + 1)
    if layout == "contiguous":
        stories = [np.arange(PAD + 1, PAD + 2 + rows * (LENGTH - 1), dtype=np.int32)]
    assert write(folder, stories, layout, files=files) == rows
    delivered = rows_of(config(folder, num_epoch=epochs), layout)
    assert len(delivered) == batches(epochs * rows, GLOBAL_BATCH)
    counted = np.concatenate([b["targets"][b["targets_segmentation"] != 0] for b in delivered])
    _, times = np.unique(counted, return_counts=True)
    assert set(times.tolist()) == {epochs}


def host_batches(config, host, hosts, monkeypatch):
    """What one of several hosts gets: MaxText's own functions with its index and their number."""
    import jax
    from maxtext.input_pipeline import grain_data_processing as pipeline

    with packed.reading("packed"), monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: hosts)
        dataset = pipeline.get_datasets(
            config.grain_train_files,
            config.grain_file_type,
            shuffle=config.enable_data_shuffling,
            shuffle_seed=config.data_shuffle_seed,
            shuffle_buffer_size=config.grain_shuffle_buffer_size,
            num_epoch=config.num_epoch,
            dataloading_host_index=host,
            dataloading_host_count=hosts,
            grain_worker_count=config.grain_worker_count,
            grain_num_threads=1,
            grain_prefetch_buffer_size=1,
            grain_data_source_max_workers=1,
        )
        stage = pipeline._get_pipeline_fn(config)
        return list(stage(dataset, config, ["text"], False, config.grain_worker_count, 1))


@pytest.mark.parametrize(("rows", "epochs"), [(10, 1), (13, 2), (5, 1)])
def test_hosts_share_the_rows_and_the_fewest_batches_count(
    config, folder, monkeypatch, rows, epochs
):
    write(folder, numbered([LENGTH + 1] * rows), "packed")
    parts = [
        host_batches(config(folder, num_epoch=epochs), host, 2, monkeypatch) for host in range(2)
    ]
    assert min(map(len, parts)) == batches(epochs * rows, GLOBAL_BATCH, processes=2)
    seen = [row[0] for part in parts for b in part for row in b["inputs"] if row.any()]
    assert sorted(seen) == sorted(list(range(0, rows * (LENGTH + 1), LENGTH + 1)) * epochs)


@pytest.mark.proof("data workers")
@pytest.mark.parametrize(
    ("rows", "epochs", "workers", "hosts"),
    [(10, 1, 2, 1), (11, 2, 2, 1), (13, 1, 3, 1), (13, 2, 2, 2)],
)
def test_workers_change_the_number_of_batches_as_counted(
    config, folder, monkeypatch, rows, epochs, workers, hosts
):
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["pytest"])
    write(folder, numbered([LENGTH + 1] * rows), "packed")
    given_ = config(folder, num_epoch=epochs, grain_worker_count=workers)
    parts = [host_batches(given_, host, hosts, monkeypatch) for host in range(hosts)]
    expected = batches(epochs * rows, GLOBAL_BATCH, processes=hosts, workers=workers)
    assert min(map(len, parts)) == expected
    seen = [row[0] for part in parts for b in part for row in b["inputs"] if row[1]]
    assert sorted(seen) == sorted(list(range(0, rows * (LENGTH + 1), LENGTH + 1)) * epochs)


def firsts(delivered):
    return [row[0] for batch in delivered for row in batch["inputs"].tolist()]


def test_order_is_fixed_by_the_seed_and_new_in_each_epoch(config, folder):
    write(folder, numbered([LENGTH + 1] * 24), "packed", files=3)
    once = firsts(rows_of(config(folder, num_epoch=2), "packed"))
    assert once == firsts(rows_of(config(folder, num_epoch=2), "packed"))
    assert sorted(once[:24]) == sorted(once[24:]) and once[:24] != once[24:]
    assert once[:24] != sorted(once[:24])
    other = firsts(rows_of(config(folder, num_epoch=2, data_shuffle_seed=1), "packed"))
    assert sorted(other) == sorted(once) and other != once


@pytest.mark.parametrize("layout", ["packed", "stories"])
def test_order_does_not_depend_on_the_file_system(config, folder, monkeypatch, layout):
    from maxtext.input_pipeline import grain_data_processing

    write(folder, numbered([LENGTH] * 24, first=PAD + 1), layout, files=3)
    straight = firsts(rows_of(config(folder, num_epoch=1), layout))
    found = grain_data_processing.glob.glob
    monkeypatch.setattr(
        grain_data_processing.glob, "glob", lambda *a, **k: sorted(found(*a, **k), reverse=True)
    )
    assert firsts(rows_of(config(folder, num_epoch=1), layout)) == straight


def test_evaluation_reads_every_row_in_order_each_time(config, folder):
    write(folder, numbered([LENGTH + 1] * 10), "packed", files=2)
    with iterators(config(folder, num_epoch=1), "packed") as (_, evaluation):
        first = firsts(read_all(evaluation))
        evaluation.reset()
        assert firsts(read_all(evaluation)) == first
    real = list(range(0, 10 * (LENGTH + 1), LENGTH + 1))
    assert first == [*real, 0, 0]  # the last batch is filled up


def test_a_restored_iterator_goes_on_where_the_state_was_taken(config, folder):
    write(folder, numbered([LENGTH + 1] * 22), "packed", files=2)
    settings_ = config(folder, num_epoch=2)
    whole = firsts(rows_of(settings_, "packed"))
    with iterators(settings_, "packed") as (train, _):
        read = [next(train) for _ in range(7)]  # into the second epoch
        state = train.local_iterator.get_state()
    with iterators(settings_, "packed") as (again, _):
        again.local_iterator.set_state(state)
        rest = []
        with contextlib.suppress(StopIteration):
            while True:
                rest.append(next(again))
    assert firsts([{k: np.asarray(v) for k, v in b.items()} for b in [*read, *rest]]) == whole


def test_stock_maxtext_refuses_packed_rows(config, folder):
    write(folder, numbered([LENGTH] * 4), "packed")
    with pytest.raises(ValueError, match="Column 'text' not found"):
        rows_of(config(folder, num_epoch=1), "stories")


def test_settings_that_packed_rows_contradict_are_refused(config, folder):
    write(folder, numbered([LENGTH] * 4), "packed")
    with pytest.raises(UsageError, match="packing: must be false"):
        rows_of(config(folder, num_epoch=1, packing=True), "packed")
    with pytest.raises(UsageError, match="tokenize_train_data"):
        rows_of(config(folder, num_epoch=1, tokenize_train_data=True), "packed")
