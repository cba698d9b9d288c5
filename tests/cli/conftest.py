"""Checkpoints that are written once a session, and copied to be damaged."""

import shutil
from pathlib import Path

import pytest
import synthetic


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A function that writes a checkpoint once, and gives a copy to be damaged."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def make(folder: Path, block: str = "mixtral", **how):
        key = repr((block, sorted(how.items())))
        if key not in known:
            known[key] = synthetic.write(root / str(len(known)), block, **how)
        first = known[key]
        run = folder / "run"
        shutil.copytree(first.run, run)
        step = run / first.step_dir.relative_to(first.run)
        return synthetic.Synthetic(run, step, first.config, first.arrays, first.axes)

    return make


@pytest.fixture
def checkpoint(made, tmp_path):
    """mixtral, scanned, tied, OCDBT + zarr3; one chunk an array."""
    return made(tmp_path)


@pytest.fixture
def plain(made, tmp_path):
    """The same as zarr2 without OCDBT: a folder an array."""
    return made(tmp_path, ocdbt=False, zarr3=False)
