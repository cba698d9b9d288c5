"""Any answer of a Hub: a push that is done, or a documented exit code and nothing half pushed."""

import mutations
import pytest
from harness import SCALE, Answer, World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 * SCALE)]

ROUTES = ("whoami", "create", "info", "tree", "validate", "preupload", "lfs_batch", "put", "commit")
STATUSES = (None, None, None, 200, 201, 204, 206, 301, 302, 400, 401, 403, 404, 409, 412, 413, 416,
            418, 429, 500, 503, 599)  # fmt: skip
HEADERS = (
    ("Retry-After", "3600"),
    ("Retry-After", "1" + "0" * 20),
    ("Retry-After", "-5"),
    ("Retry-After", "nan"),
    ("Retry-After", "\xb2"),
    ("Retry-After", "Fri, 31 Dec 9999 23:59:59 GMT"),
    ("X-Error-Message", "\x1b[31mred\x1b[0m [bold]x[/] \x9b"),
    ("X-Error-Message", "a" * 5000),
    ("X-Error-Code", "RepoNotFound"),
    ("X-Error-Code", "GatedRepo"),
    ("X-Error-Code", "\x1b[2J"),
    ("Location", "file:///etc/passwd"),
    ("Location", "http://127.0.0.1:9/x"),
    ("Location", "//"),
    ("Link", '<http://127.0.0.1:9/x>; rel="next"'),
    ("Link", '<>; rel="next"'),
    ("Content-Encoding", "gzip"),
    ("Content-Type", "text/html"),
    ("ETag", ""),
)


def answers(route: str, raw: bytes) -> st.SearchStrategy[Answer]:
    """Changes of what is said at a route."""
    changes = mutations.content_changes(raw, mutations.JSON) if raw else st.just(())
    return st.builds(
        Answer,
        st.just(route),
        st.one_of(changes, changes, changes, st.just(())),
        st.sampled_from(STATUSES),
        st.one_of(st.just(()), st.just(()), st.tuples(st.sampled_from(HEADERS))),
        st.integers(0, 2),
    )


@pytest.mark.parametrize("route", ROUTES)
def test_any_answer(world: World, route: str) -> None:
    raw = world.recorded()[route]

    @settings(
        max_examples=8 * SCALE,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(["push plan", "push"]), answers(route, raw))
    def holds(command: str, answer: Answer) -> None:
        world.answers_hold(command, answer)

    holds()
