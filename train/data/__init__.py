"""Data for MaxText's grain pipeline: stories tokenised, packed, counted and checked beforehand."""

from moeconv_train.data.corpus import Dataset, prepare, read_stories, tokenise
from moeconv_train.data.manifest import DataSet, batches
from moeconv_train.data.preparation import (
    DEFAULT_SOURCE,
    PrepareOptions,
    Progress,
    prepare_dataset,
)

__all__ = [
    "DEFAULT_SOURCE",
    "DataSet",
    "Dataset",
    "PrepareOptions",
    "Progress",
    "batches",
    "prepare",
    "prepare_dataset",
    "read_stories",
    "tokenise",
]
