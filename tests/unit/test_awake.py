"""Test the clock that leaves out suspensions, with clocks that the test sets."""

from __future__ import annotations

import time

import pytest

from dist_gpt.awake import EXCUSED_S, JUMP_S, AwakeClock, is_silent


class Hands:
    """Fake of a monotonic clock and of one that also counts sleep."""

    def __init__(self) -> None:
        self.monotonic = self.with_sleep = 1000.0
        self.clock = AwakeClock(lambda: self.monotonic, lambda: self.with_sleep)

    def go(self, seconds: float, asleep: float = 0.0) -> float:
        self.monotonic += seconds
        self.with_sleep += seconds + asleep
        return self.clock.now()


def test_it_runs_like_the_monotonic_clock() -> None:
    hands = Hands()
    assert [hands.go(0.5) for _ in range(4)] == pytest.approx([1000.5, 1001, 1001.5, 1002]) and hands.clock.last is None
    real = AwakeClock()
    before = real.now()
    time.sleep(0.05)
    assert real.now() - before >= 0.05


@pytest.mark.parametrize("suspended", [2.0, 36.0, 400.0, 100_000.0])
def test_a_suspension_is_left_out(suspended: float) -> None:
    hands = Hands()
    hands.go(0.2)
    assert hands.go(suspended) == pytest.approx(1000.2 + JUMP_S)
    last = hands.clock.last
    assert last is not None and (last.at, last.seconds) == pytest.approx((1000.2 + JUMP_S, suspended))
    assert last.excused_until == pytest.approx(last.at + min(suspended, EXCUSED_S))
    hands.go(0.2)
    assert hands.clock.last is last
    hands.go(suspended + 1)
    assert hands.clock.last is not last and hands.clock.last is not None
    assert hands.clock.last.seconds == pytest.approx(suspended + 1)


def test_a_machine_that_sleeps_is_noticed_though_the_monotonic_clock_stands() -> None:
    hands = Hands()
    assert hands.go(0.2, asleep=3600.0) == pytest.approx(1000.2)
    assert hands.clock.last is not None and hands.clock.last.seconds == pytest.approx(3600.2)


def test_it_moves_on_where_every_reading_is_late() -> None:
    """Otherwise a stopped rank would never be found on a busy machine."""
    hands = Hands()
    for _ in range(100):
        hands.go(5.0)
    assert hands.clock.now() == pytest.approx(1000 + 100 * JUMP_S)
    assert hands.clock.last is not None and is_silent(hands.clock.now(), 1000.0, hands.clock.last.excused_until, 30.0)
