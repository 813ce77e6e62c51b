"""Measure time without the periods in which this process was suspended. Standard library only.

    clock = AwakeClock()
    clock.now()          # call it several times a second, from any thread
    clock.last           # the last Suspension; None if there was none

A process is suspended by SIGSTOP (Ctrl-Z, Slurm's `scontrol suspend`, a container that is frozen) or with its machine
(a closed laptop, a paused virtual machine). Other processes may then seem silent or late although they are not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

JUMP_S = 1.0
"""A longer gap between two readings counts as a suspension. The clock still advances by this much, so that it does not
stop on a machine where every reading is late."""
EXCUSED_S = 30.0
"""Longest time after a suspension for which other processes may stay silent, because they may be continued later."""


def time_with_sleep() -> float:
    """Return the seconds of a clock that, where the system has one, also counts the time the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(frozen=True)
class Suspension:
    """Period in which this process did not run."""

    at: float
    """Time at which the process ran again, on the AwakeClock."""
    seconds: float

    @property
    def excused_until(self) -> float:
        """Time until which the silence of other processes is excused: they may be continued later."""
        return self.at + min(self.seconds, EXCUSED_S)


def is_silent(now: float, heard: float, excused_until: float, allowed_s: float) -> bool:
    """Return whether a process last heard at `heard`, on an AwakeClock, has been silent for more than `allowed_s`.

    Silence is excused for at most 2 x EXCUSED_S beyond `allowed_s`: a machine that is often late by a second or more
    would otherwise renew the excuse for ever.
    """
    return now - max(heard, excused_until) > allowed_s or now - heard > allowed_s + 2 * EXCUSED_S


class AwakeClock:
    """Clock that leaves out suspensions, in seconds. It reads `read`, and `with_sleep`, which also counts sleep."""

    def __init__(
        self, read: Callable[[], float] = time.monotonic, with_sleep: Callable[[], float] = time_with_sleep
    ) -> None:
        self._read, self._with_sleep = read, with_sleep
        self._lock = threading.Lock()
        self._before, self._before_with_sleep = read(), with_sleep()
        self._lost = 0.0
        self.last: Suspension | None = None

    def now(self) -> float:
        """Return the time; record a suspension in `last` if the previous call was more than JUMP_S ago."""
        with self._lock:
            read, with_sleep = self._read(), self._with_sleep()
            gap, longest = read - self._before, max(read - self._before, with_sleep - self._before_with_sleep)
            self._before, self._before_with_sleep = read, with_sleep
            self._lost += max(0.0, gap - JUMP_S)
            if longest > JUMP_S:
                self.last = Suspension(read - self._lost, longest)
            return read - self._lost
