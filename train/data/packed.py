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
from collections.abc import Iterator, Sequence
from typing import Any

from moeconv_train import seams
from moeconv_train.data.packing import unpack
from moeconv_train.data.records import parse

from moeconv.errors import UnsupportedError, UsageError

# What MaxText must be set to for the rows to be those that were counted. Grain's workers would each
# make batches of their own.
_MUST = {
    "packing": False,
    "grain_use_elastic_iterator": False,
    "tokenize_train_data": False,
    "tokenize_eval_data": False,
    "grain_worker_count": 0,
    "grain_worker_count_eval": 0,
}


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Within the block MaxText reads packed rows, from files in the order of their names.

    MaxText leaves the order of a glob to the file system (`find_data_files`), so that a copy of the
    data may be read in another order, and a resumed run with it.

    Raises:
        UnsupportedError: MaxText's code is not what this was written for, or was never asked.
    """
    from maxtext.input_pipeline import grain_data_processing as pipeline

    seams.check("input_pipeline")
    stock_find = pipeline.find_data_files
    asked = False

    def find_data_files(*args: Any, **kwargs: Any) -> list[str]:
        return sorted(stock_find(*args, **kwargs))

    def stage(*args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked = True
        return packed_stage(*args, **kwargs)

    with seams.replaced(
        pipeline, find_data_files=find_data_files, pretrain_preprocessing_pipeline=stage
    ):
        yield
    if not asked:
        raise UnsupportedError(
            "MaxText read no prepared rows (grain_data_processing.py): it may read other data than "
            f"it was told to; install maxtext=={seams.RELEASE}"
        )


def packed_stage(
    dataset: Any,
    config: Any,
    data_columns: Sequence[str],
    tokenize: bool,  # set by `_MUST`
    grain_worker_count: int,
    grain_per_worker_buffer_size: int,
) -> Any:
    """In place of `pretrain_preprocessing_pipeline`: packed records to batches.

    A last batch that is not full is filled up with rows of padding, which count for nothing.
    """
    import grain.python as grain
    from maxtext.input_pipeline import data_processing_utils

    for key, wanted in _MUST.items():
        if getattr(config, key) != wanted:
            said = str(wanted).lower()
            raise UsageError(f"{key}={getattr(config, key)}: prepared rows need {key}={said}")
    dataset = dataset.map(lambda record: unpack(parse(record), config.max_target_length))
    size = data_processing_utils.get_local_batch_size(config)
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=size, pad_value=0)
    return data_processing_utils.apply_multiprocessing_and_prefetch(
        dataset.batch(size, batch_fn=fill), config, grain_worker_count, grain_per_worker_buffer_size
    )
