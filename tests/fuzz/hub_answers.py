"""Answers of the loopback Hub, changed on their way."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hub_server import Hub
from mutations import JSON, Edit, Spoil, apply


@dataclass(frozen=True)
class Answer:
    """How an answer of the Hub is changed.

    Attributes:
        route: Of which question; see `hub_server.ROUTES`.
        changes: Of its JSON.
        status: Instead of its own.
        headers: Besides its own.
        skip: Answers that go well before.
    """

    route: str
    changes: tuple[Edit | Spoil, ...] = ()
    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    skip: int = 0


class Answers:
    """What stands between the Hub and its answers: keeps them, or changes some.

    Attributes:
        record: The last answer by route.
        change: What is changed.
        said: How often a route answered.
    """

    def __init__(self) -> None:
        self.record: dict[str, bytes] = {}
        self.change: Answer | None = None
        self.said: Counter[str] = Counter()

    def handler(self, hub: Hub) -> type[Any]:
        """The Hub's handler of requests, with this in it."""
        answers = self

        class Handler(hub.server.RequestHandlerClass):  # type: ignore[misc]
            def _answer(
                self, status: int, content: Any, headers: Any = None, *, half: bool = False
            ) -> None:
                route = getattr(getattr(self, "record", None), "route", "")
                changed = answers.pass_on(route, status, content, headers or {})
                super()._answer(*changed, half=half)

        return Handler

    def pass_on(
        self, route: str, status: int, content: Any, headers: dict[str, str]
    ) -> tuple[int, Any, dict[str, str]]:
        """The answer as it is sent."""
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.record[route] = raw
        change = self.change
        self.said[route] += 1
        if change is None or change.route != route or self.said[route] <= change.skip:
            return status, content, headers
        if not isinstance(content, bytes):
            headers = {"Content-Type": "application/json", **headers}
            raw = apply(raw, change.changes, JSON)
        return change.status or status, raw, {**headers, **dict(change.headers)}
