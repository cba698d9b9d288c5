"""Any content of any file: a result, or a documented exit code and a sentence."""

import mutations
import pytest
from harness import SCALE, World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from surfaces import KNOWN, SURFACES, Surface

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 * SCALE)]


@pytest.mark.parametrize("surface", SURFACES, ids=str)
def test_any_content(world: World, surface: Surface) -> None:
    file = world.find(surface.file)
    changed = mutations.changes(world.folder / file, surface.form)

    @settings(
        max_examples=surface.examples * SCALE,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(surface.commands), changed)
    def holds(command: str, changes: tuple[mutations.Change, ...]) -> None:
        world.holds(command, file, changes, surface.form, full=surface.full)

    holds()


@pytest.mark.parametrize("file", KNOWN)
def test_what_was_found(world: World, file: str) -> None:
    form = next(one.form for one in SURFACES if one.file == file)
    for command, changes, code in KNOWN[file]:
        ended = world.holds(command, world.find(file), changes, form)
        assert ended.code == code, ended.out + ended.err
