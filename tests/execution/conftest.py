"""Checkpoints for the engine that are written once a session, and a process that dies."""

import pytest
import synthetic
from engine_lab import Crashes, contents, to


@pytest.fixture
def small_units(monkeypatch):
    """A unit is one chunk, and a block a few rows, so that a small array takes every path."""
    monkeypatch.setattr("moeconv.planning.units.UNIT_BYTES", 1)
    monkeypatch.setattr("moeconv.planning.slabs.BLOCK_BYTES", 256)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """100 kB, 13 arrays."""
    checkpoint = synthetic.write(tmp_path_factory.mktemp("tiny") / "run", "envy")
    checkpoint.config_file()
    return checkpoint


@pytest.fixture(scope="session")
def big(tmp_path_factory):
    """60 MB in 82 arrays, so in as many units."""
    sizes = {"L": 8, "V": 4096, "D": 256, "M": 512, "h": 64}
    run = tmp_path_factory.mktemp("big") / "run"
    checkpoint = synthetic.write(run, scanned=False, sizes=sizes)
    checkpoint.config_file()
    return checkpoint


@pytest.fixture(scope="session")
def expected(big, tmp_path_factory):
    """What an uninterrupted conversion of `big` writes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    to(big, out)
    return contents(out)


@pytest.fixture(scope="session")
def crashes():
    server = Crashes()
    yield server
    server.close()
