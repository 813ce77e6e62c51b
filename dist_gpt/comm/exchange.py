"""What gloo lacks, or does at the cost of copies, put together from its sends and receives.

A pair's messages come in the order they were sent, and all members of a group issue their collectives in one order, so
no message needs a name. Everything is under way from the call on; gloo's one thread for the network moves it.
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
    """What a thread of its own waits for or does: gloo says that a send is complete only to who waits. `messages` of
    it go straight from member to member."""

    def __init__(self, work: Callable[[], object], messages: int = 0) -> None:
        self.messages = messages
        self._work: Callable[[], object] | None = work
        self.error: Exception | None = None
        self.ended = Event()
        self._noting = Lock()
        self._note: Callable[[], object] | None = None

    def run(self) -> None:
        try:
            if self._work is not None:
                self._work()
        except Exception as error:  # handed to whoever waits for it
            self.error = error
        self._work = None
        with self._noting:
            if self._note is not None:
                self._note()  # before whoever waits goes on
            self.ended.set()

    def when_done(self, note: Callable[[], object]) -> None:
        """Call `note` once, at the end, or now where that has come."""
        with self._noting:
            self._note = note
            if self.ended.is_set():
                note()

    def wait(self) -> None:
        self.ended.wait()
        if self.error is not None:
            raise self.error

    def is_completed(self) -> bool:
        return self.ended.is_set()


class Waiter:
    """Waits for works of one group, or does them, in their order, on a daemon thread that starts with the first."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[WaitedWork | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._closed = False

    def watch(self, work: Callable[[], object], messages: int = 0) -> WaitedWork:
        if self._closed:
            raise RuntimeError("this group is closed")
        if self._thread is None:
            self._thread = Thread(target=self._run, name="waiter", daemon=True)
            self._thread.start()
        waited = WaitedWork(work, messages)
        self._queue.put(waited)
        return waited

    def close(self) -> None:
        """End the thread, so that nothing touches the backend when it goes; one that is stuck is left after JOIN_S."""
        self._closed = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(JOIN_S)

    def _run(self) -> None:
        while (waited := self._queue.get()) is not None:
            waited.run()


class _Works:
    """Waited for one after the other. What went wrong once is raised again: a second wait for a receive never ends."""

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
    """Sends and receives that are one collective. Like a work of the backend, it has a future; who asks for that has
    the group's waiter wait, since a work of gloo's can be waited for once."""

    def __init__(self, works: list[Any], waiter: Waiter) -> None:
        self.messages = len(works)
        self._works: _Works | WaitedWork = _Works(works)
        self._waiter = waiter

    def wait(self) -> None:
        self._works.wait()

    def is_completed(self) -> bool:
        """Not known before somebody has waited, unless the future was asked for."""
        return isinstance(self._works, WaitedWork) and self._works.is_completed()

    def get_future(self) -> Exchange:
        self._works = self._waiter.watch(self._works.wait)
        return self

    def add_done_callback(self, note: Callable[[], object]) -> None:
        """Of the future: call `note` when all is sent and here."""
        if isinstance(self._works, WaitedWork):
            self._works.when_done(note)


def add_up(parts: Sequence[Tensor], out: Tensor) -> None:
    """`out` = the sum of `parts`, all (n,); the first may be `out` itself. In 2 bytes it is rounded once."""
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
    """Get a tensor of `receive` from each of the members `others` of a group, and send each one of `send`, both in
    their order. Tensors are contiguous."""
    works = [backend.recv([tensor], i, 0) for i, tensor in zip(others, receive, strict=True)]
    works += [backend.send([tensor], i, 0) for i, tensor in zip(others, send, strict=True)]
    return Exchange(works, waiter)
