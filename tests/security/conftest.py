"""A folder of somebody, outside everything that a command was given."""

from pathlib import Path

import planted
import pytest


@pytest.fixture
def outside(tmp_path: Path) -> planted.Outside:
    return planted.Outside(tmp_path / "somebody")
