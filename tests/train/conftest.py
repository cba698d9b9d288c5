"""Data that are prepared once a session."""

import shutil

import pytest
from moeconv_train import feed
from moeconv_train.data import PrepareOptions
from moeconv_train.settings import EMBEDDED, DataSettings
from moeconv_train.tokenizer import TOKENIZER


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The embedded corpus as the tiny recipe wants it."""
    data = DataSettings(source=EMBEDDED, tokenizer=EMBEDDED)
    found = feed.Feed("prepared", data, tmp_path_factory.mktemp("data"))
    return feed.prepare(found, 128, progress=lambda _: None, note=lambda _: None).directory


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return shutil.copytree(TOKENIZER, tmp_path_factory.mktemp("tokenizer"), dirs_exist_ok=True)


@pytest.fixture
def options(tokenizer):
    def make(**keys):
        return PrepareOptions(tokenizer=str(tokenizer), **{"sequence_length": 256, **keys})

    return make
