"""Requests to stop a run, from a signal or from the launcher. All ranks act on one at the same step boundary.

A request is only recorded here. Ranks add it to the all-reduce that every step makes anyway (`Optimizer.wants_stop`),
so all of them learn of it after the same step, without an additional collective. Torch-free.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stop:
    """Stop request of a run, which then saves and exits. Any thread may set and read it, any number of times."""

    def __init__(self) -> None:
        self._why: str | None = None

    @property
    def requested(self) -> str | None:
        """Reason of the first request, in words; None if there is none."""
        return self._why

    def request(self, why: str) -> None:
        """Request a stop; the reason of the first request is kept."""
        if self._why is None:
            self._why = why

    @contextmanager
    def listen(self) -> Iterator[Stop]:
        """Let SIGUSR1 and SIGTERM only request a stop while the context is open. Do nothing outside the main thread.

        After a request the signals are ignored once the context closes: the process is exiting, and a second signal
        must not change its exit code.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self._why is not None else handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self.request(f"{signal.Signals(number).name} received")
