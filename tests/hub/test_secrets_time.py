"""Looking for secrets takes a time that grows with the text's length, whatever the text repeats."""

import signal
import time

import pytest

from moeconv.hub.kinds import unlike
from moeconv.hub.public import shorten
from moeconv.hub.secrets import _RULES, _found, _places, find_secret, redact

SIZE = 100_000
FILLERS = (b"", b"a", b"A-", b" ", b"=", b"--a=", b": 'a", b" login a", b".eyJ", b":1:a:")


@pytest.fixture(autouse=True)
def limit():
    """A pattern that backtracks without end fails, it does not hang."""

    def stop(*_):
        raise TimeoutError("more than 60 s of CPU time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 60)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def seconds(look, part: bytes, size: int) -> float:
    text = (part * (size // len(part) + 1))[:size] + b"!"
    start = time.process_time()
    look(text)
    return time.process_time() - start


def demand_linear(look, part: bytes) -> None:
    """Twice the text takes about twice the time; what is fast anyway is not measured."""
    whole = seconds(look, part, SIZE)
    assert whole < 0.3 or whole < 3.2 * min(seconds(look, part, SIZE // 2) for _ in range(2)), part


@pytest.mark.parametrize("filler", FILLERS)
def test_no_repeat_of_a_rule_s_parts_takes_long(filler):
    for rule in _RULES:

        def look(text, rule=rule):
            _found(rule, text, list(_places(text, rule.anchors)))

        demand_linear(look, (rule.anchors[0] if rule.anchors else b"a:1") + filler)


REPEATS = {
    "wandb with options": (find_secret, b"wandb" + b"--a="),
    "sk-": (find_secret, b"sk-"),
    "options": (lambda text: find_secret(b"wandb" + text), b"--keykey="),
    "words": (lambda text: find_secret(b"wandb" + text), b"--a="),
    "ranks": (lambda text: unlike("tokenizer.model", text), b"a 11"),
    "ranks in lines": (lambda text: unlike("tokenizer.model", text), b"a 11\n"),
    "addresses": (lambda text: redact(text.decode()), b"http://"),
    "paths": (lambda text: shorten(text.decode(), []), b"a+"),
    "users": (lambda text: shorten(text.decode(), []), b"a://"),
}


@pytest.mark.parametrize("case", REPEATS)
def test_no_repeat_of_a_downloaded_file_takes_long(case):
    demand_linear(*REPEATS[case])
