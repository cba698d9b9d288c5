"""The byte budget: who gets in, who waits, and that nobody waits for ever."""

import threading

from moeconv.execution.memory import Budget


def taker(budget, wanted):
    """A thread that takes one item; what it got."""
    got = []
    thread = threading.Thread(target=lambda: got.append(budget.take(wanted, abs)), daemon=True)
    thread.start()
    return thread, got


def test_the_first_with_room_is_taken():
    budget, wanted = Budget(100), [70, 60, 30, 20]
    assert budget.take(wanted, abs) == 70
    assert budget.take(wanted, abs) == 30
    assert wanted == [60, 20]
    thread, got = taker(budget, wanted)
    thread.join(0.05)
    assert thread.is_alive()
    budget.release(70)
    thread.join(10)
    assert got == [60]


def test_what_exceeds_everything_waits_to_be_alone():
    budget, wanted = Budget(100), [500, 90]
    assert budget.take(wanted, abs) == 500
    thread, got = taker(budget, wanted)
    thread.join(0.05)
    assert thread.is_alive()
    budget.release(500)
    thread.join(10)
    assert got == [90]
    wanted.append(300)
    thread, got = taker(budget, wanted)
    budget.release(90)
    thread.join(10)
    assert got == [300]


def test_nobody_waits_when_all_is_taken_or_closed():
    budget = Budget(100)
    assert budget.take([], abs) is None
    wanted = [80]
    assert budget.take(wanted, abs) == 80
    wanted.append(50)
    thread, got = taker(budget, wanted)
    budget.close()
    thread.join(10)
    assert got == [None]
    assert wanted == [50]
