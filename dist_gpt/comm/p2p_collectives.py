"""Collectives that gloo lacks, or does with extra copies, built from its sends and receives.

A pair's messages arrive in the order they were sent, and all members of a group issue their collectives in one order,
so messages need no tags. All transfers start with the call; gloo's one network thread carries them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import torch
from torch import Tensor

JOIN_S = 1.0
CHUNK = 1 << 18


class WaitedWork:
    """Work that the waiter's thread waits for or does, since gloo reports a send complete only to a thread that waits.

    `messages` is the number of its messages that go directly from member to member.
    """

    def __init__(self, work: Callable[[], object], messages: int = 0) -> None:
        self.messages = messages
        self._work: Callable[[], object] | None = work
        self.error: Exception | None = None
        self.ended = Event()
        self._noting = Lock()
        self._note: Callable[[], object] | None = None

    def run(self) -> None:
        """Do the work, keep its error, and mark it as ended; called on the waiter's thread."""
        try:
            if self._work is not None:
                self._work()
        except Exception as error:  # `wait` raises it
            self.error = error
        self._work = None
        with self._noting:
            if self._note is not None:
                self._note()  # before `wait` returns
            self.ended.set()

    def when_done(self, note: Callable[[], object]) -> None:
        """Call `note` once, when the work ends, or now if it has ended."""
        with self._noting:
            self._note = note
            if self.ended.is_set():
                note()

    def wait(self) -> None:
        """Wait until the work has ended; raise its error, if any."""
        self.ended.wait()
        if self.error is not None:
            raise self.error

    def is_completed(self) -> bool:
        """Return whether the work has ended."""
        return self.ended.is_set()


class Waiter:
    """Daemon thread of one group that waits for works, or does them, in their order; it starts with the first."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[WaitedWork | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._closed = False

    def watch(self, work: Callable[[], object], messages: int = 0) -> WaitedWork:
        """Queue `work` for the thread; raise RuntimeError if the group is closed."""
        if self._closed:
            raise RuntimeError("this group is closed")
        if self._thread is None:
            self._thread = Thread(target=self._run, name="waiter", daemon=True)
            self._thread.start()
        waited = WaitedWork(work, messages)
        self._queue.put(waited)
        return waited

    def close(self) -> None:
        """End the thread, so that nothing uses the backend as it shuts down; abandon a stuck thread after JOIN_S."""
        self._closed = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(JOIN_S)

    def _run(self) -> None:
        while (waited := self._queue.get()) is not None:
            waited.run()


class _Works:
    """Works waited for in order. An error is raised again in later waits: a second wait for a receive never ends."""

    def __init__(self, works: list[Any]) -> None:
        self.works = works
        self.error: Exception | None = None

    def wait(self) -> None:
        if self.error is not None:
            raise self.error
        try:
            for work in self.works:
                work.wait()
        except Exception as error:
            self.error = error
            raise
        self.works = []


class Exchange:
    """Sends and receives that form one collective; like a work of the backend, it has a future.

    Asking for the future makes the group's waiter wait, since a work of gloo's can be waited for only once.
    """

    def __init__(self, works: list[Any], waiter: Waiter) -> None:
        self.messages = len(works)
        self._works: _Works | WaitedWork = _Works(works)
        self._waiter = waiter

    def wait(self) -> None:
        """Wait until everything is sent and received."""
        self._works.wait()

    def is_completed(self) -> bool:
        """Return whether everything is sent and received; always False unless the future was asked for."""
        return isinstance(self._works, WaitedWork) and self._works.is_completed()

    def get_future(self) -> Exchange:
        """Leave the wait to the group's waiter; return this object as the future."""
        self._works = self._waiter.watch(self._works.wait)
        return self

    def add_done_callback(self, note: Callable[[], object]) -> None:
        """Call `note` when everything is sent and received, as a future does; no effect before `get_future`."""
        if isinstance(self._works, WaitedWork):
            self._works.when_done(note)


def add_up(parts: Sequence[Tensor], out: Tensor) -> None:
    """Write the sum of `parts`, all (n,), to `out`, which may be the first of them. 16-bit sums are rounded once."""
    if len(parts) > 2 and out.element_size() == 2:
        for start in range(0, len(out), CHUNK):
            at = slice(start, start + CHUNK)
            total = parts[0][at].float()
            for part in parts[1:]:
                total += part[at]
            out[at] = total
        return
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)


def start_exchange(
    backend: Any, others: Sequence[int], receive: Iterable[Tensor], send: Iterable[Tensor], waiter: Waiter
) -> Exchange:
    """Receive each tensor of `receive` from, and send each of `send` to, the members `others`; all are contiguous."""
    works = [backend.recv([tensor], i, 0) for i, tensor in zip(others, receive, strict=True)]
    works += [backend.send([tensor], i, 0) for i, tensor in zip(others, send, strict=True)]
    return Exchange(works, waiter)
