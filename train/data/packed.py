"""The one place where MaxText's grain pipeline is taken by the hand: packed rows, files in order.

MaxText 0.2.5 has no way to read segment ids from the data: its pipeline takes one column of tokens
(grain_data_processing.py, `pretrain_preprocessing_pipeline`: `assert len(data_columns) == 1`) and
either packs by itself, where the number of batches is known only afterwards, or makes each row one
segment. `reading` replaces that stage alone. Everything that decides the order stays MaxText's and
grain's own: data source, shuffle by seed and epoch, repeat, sharding over hosts, batching, workers,
and the iterator's state in the checkpoint.
"""

import contextlib
import functools
import importlib.metadata
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from moeconv_train.data.packing import Layout, unpack
from moeconv_train.data.records import parse

from moeconv.errors import UnsupportedError, UsageError

# What MaxText's code must still say for the replacements to mean what they mean here.
_SAYS = {
    "_get_pipeline_fn": ("return pretrain_preprocessing_pipeline",),
    "pretrain_preprocessing_pipeline": (
        "assert len(data_columns) == 1",
        "data_processing_utils.get_local_batch_size(config)",
        "data_processing_utils.apply_multiprocessing_and_prefetch(",
    ),
    "get_datasets": (
        "files = find_data_files(pattern, hf_access_token=hf_access_token)",
        "grain.ArrayRecordDataSource(files",
    ),
    "_apply_mapdataset_transforms": (
        "dataset = dataset.shuffle(seed=shuffle_seed)\n  dataset = dataset.repeat(num_epoch)",
        "dataset[dataloading_host_index::dataloading_host_count]",
    ),
    "find_data_files": ("data_files = glob.glob(",),
}
_PARAMETERS = [
    "dataset",
    "config",
    "data_columns",
    "tokenize",
    "grain_worker_count",
    "grain_per_worker_buffer_size",
]


@contextlib.contextmanager
def reading(layout: Layout) -> Iterator[None]:
    """Within the block MaxText reads datasets of `layout` as they were prepared.

    For every layout the files are taken in the order of their names: MaxText leaves the order of a
    glob to the file system (`find_data_files`), so that a copy of the data may be read in another
    order, and a resumed run with it.

    Raises:
        UnsupportedError: MaxText's code is not what this was written for, or was never asked.
    """
    from maxtext.input_pipeline import grain_data_processing as pipeline

    _check(pipeline)
    stock_find, stock_stage = pipeline.find_data_files, pipeline.pretrain_preprocessing_pipeline
    asked = {"files": 0, "rows": 0}

    def find_data_files(*args: Any, **kwargs: Any) -> list[str]:
        asked["files"] += 1
        return sorted(stock_find(*args, **kwargs))

    def stage(dataset: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        asked["rows"] += 1
        return packed_stage(dataset, config, *args, **kwargs)

    pipeline.find_data_files = find_data_files
    if layout == "packed":
        pipeline.pretrain_preprocessing_pipeline = stage
    try:
        yield
    finally:
        pipeline.find_data_files = stock_find
        pipeline.pretrain_preprocessing_pipeline = stock_stage
    if not asked["files"] or (layout == "packed" and not asked["rows"]):
        raise _moved("read the data without being asked to")


def packed_stage(
    dataset: Any,
    config: Any,
    data_columns: Sequence[str],
    tokenize: bool,
    grain_worker_count: int,
    grain_per_worker_buffer_size: int,
) -> Any:
    """In place of `pretrain_preprocessing_pipeline`: packed records to batches.

    A last batch that is not full is filled up with rows of padding, which count for nothing.
    """
    import grain.python as grain
    from maxtext.input_pipeline import data_processing_utils

    for key, wanted in (("packing", False), ("grain_use_elastic_iterator", False)):
        if getattr(config, key) is not wanted:
            raise UsageError(f"{key}: must be {str(wanted).lower()} for a packed dataset")
    if tokenize:
        raise UsageError(
            "tokenize_train_data and tokenize_eval_data: must be false for a packed dataset"
        )
    dataset = dataset.map(functools.partial(_row, length=config.max_target_length))
    size = data_processing_utils.get_local_batch_size(config)
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=size, pad_value=0)
    return data_processing_utils.apply_multiprocessing_and_prefetch(
        dataset.batch(size, batch_fn=fill), config, grain_worker_count, grain_per_worker_buffer_size
    )


def _row(record: bytes, length: int) -> dict[str, np.ndarray]:
    return unpack(parse(record), length)


def _check(pipeline: Any) -> None:
    for name, sentences in _SAYS.items():
        function = getattr(pipeline, name, None)
        source = inspect.getsource(function) if inspect.isfunction(function) else ""
        if any(sentence not in source for sentence in sentences):
            raise _moved(f"has another {name}")
    stage = inspect.signature(pipeline.pretrain_preprocessing_pipeline)
    if list(stage.parameters) != _PARAMETERS:
        raise _moved("gives pretrain_preprocessing_pipeline other arguments")


def _moved(how: str) -> UnsupportedError:
    return UnsupportedError(
        f"MaxText {importlib.metadata.version('maxtext')} {how} (grain_data_processing.py): "
        "prepared data cannot be read; install maxtext==0.2.5"
    )
