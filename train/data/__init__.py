"""Data for MaxText's grain pipeline: stories tokenised, packed, counted and checked beforehand."""

from moeconv_train.data.manifest import DataSet
from moeconv_train.data.options import PrepareOptions
from moeconv_train.data.preparation import DEFAULT_SOURCE, Progress, prepare_dataset

__all__ = ["DEFAULT_SOURCE", "DataSet", "PrepareOptions", "Progress", "prepare_dataset"]
