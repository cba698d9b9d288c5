"""Data for MaxText's grain pipeline: stories tokenised, packed, counted and checked beforehand."""

from moeconv_train.data.manifest import DataSet, PrepareOptions
from moeconv_train.data.preparation import prepare_dataset

__all__ = ["DataSet", "PrepareOptions", "prepare_dataset"]
