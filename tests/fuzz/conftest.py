"""One world for all fuzz tests."""

from collections.abc import Iterator

import harness
import pytest


@pytest.fixture(scope="session")
def world() -> Iterator[harness.World]:
    """See `harness.World`."""
    with harness.world() as made:
        yield made
