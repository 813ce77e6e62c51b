"""The wish that a run stops: from a signal or from the launcher. All ranks act on it at the same step boundary.

A wish is only noted here. Ranks put it into the sum that every step makes anyway (`Optimizer.wants_stop`), so all of
them learn of it after the same step, without a collective of its own. Torch-free.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PREEMPTED = 75
"""Exit code of a run that was asked to stop, saved and left."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stop:
    """Whether somebody wants this run to save and leave. May be asked from any thread, and as often as one likes."""

    def __init__(self) -> None:
        self._why: str | None = None

    @property
    def requested(self) -> str | None:
        """Why, in words; None as long as nobody asked."""
        return self._why

    def request(self, why: str) -> None:
        """Ask; the first reason is kept."""
        if self._why is None:
            self._why = why

    @contextmanager
    def listen(self) -> Iterator[Stop]:
        """Inside, SIGUSR1 and SIGTERM ask, and do nothing else. In another thread than the main one nothing happens.

        Afterwards a process that was asked ignores them: it is leaving, and a second signal must not change its code.
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
