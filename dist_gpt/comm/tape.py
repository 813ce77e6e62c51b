"""The tape of the profiling window: every collective and every entry of the step list of one rank, with times.

Times are nanoseconds of this rank's CLOCK_MONOTONIC (`time.perf_counter_ns`). Who measures them is a `Timer`: on a CPU
the host, which blocks where the rank blocks (`HostTimer`); on a GPU the device, since the host runs ahead of it
(`comm.device_time.CudaTimer`). A timer never waits for anything while a step runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from time import perf_counter_ns, thread_time_ns
from typing import Any, Protocol

from dist_gpt.events import BOUND, CALL, DIRECT, EMULATED, ESTIMATED, OPS, SPAN

MAX_ROWS = 200_000
"""Calls, and spans, of one step that are kept; what is more is counted as dropped."""
STOOD_STILL_NS, PER_MESSAGE_NS = 5_000, 10_000
"""A shorter wait did not block: for a collective of the backend's, and for each message of a `comm.exchange`."""
_OP = {op: number for number, op in enumerate(OPS)}


@dataclass(slots=True)
class Record:
    """One issued collective. Stamps in ns, 0 where it has not happened."""

    axis: str
    op: str
    payload: int
    channel: int
    issue: int
    issued: int = 0
    done: int = 0
    wait: int = 0
    waited: int = 0
    cpu: int = 0  # of this thread, while it waited
    late: bytes = b""  # what RunDelay said when it began to wait
    index: int = -1
    flags: int = 0
    messages: int = 0  # of an exchange
    marks: Any = None  # the timer's own

    def complete(self, _: Any = None) -> None:
        """The backend is finished, now; called on the backend's thread."""
        self.done = self.done or perf_counter_ns()


@dataclass(slots=True)
class Mark:
    """A span under way, and the one around it."""

    index: int
    outer: int
    began: Any
    note: AbstractContextManager[Any] | None = None


@dataclass(slots=True)
class Span:
    """An entry of the step list, done. `began` and `ended` are the timer's."""

    index: int
    began: Any
    ended: Any


class Timer(Protocol):
    """Who measures. `issued`, `waits` and `waited` may note something on a record; `mark` is a moment."""

    def mark(self) -> Any: ...

    def cpu_ns(self) -> int | None:
        """What this thread has computed so far; None where it is not what computes."""

    def issued(self, record: Record, work: Any) -> None: ...

    def waits(self, record: Record) -> None: ...

    def woken(self, record: Record) -> None:
        """The backend lets this rank go on; the local part of an emulated operation comes still."""

    def waited(self, record: Record) -> None: ...

    def settle(self, records: list[Record]) -> None:
        """A step is over: fill in the stamps of its records."""

    def times(self, span: Span) -> tuple[int, int, int]:
        """(start, wall, CPU of this thread) of a span, in ns."""


WATCH_EVERY = 5
AT_ONCE_NS = 50_000
"""A wait that begins so soon behind the call has nothing computed under it."""


class HostTimer:
    """Stamps of the host, and of the kernel.

    gloo says when a collective ends by calling Python on a thread of its own, which takes the interpreter from the
    rank's computing: 8 % of the demo's step, if every call is watched. A rank that stands still until the end knows it
    too, from when it went on and how long the kernel had let it wait for a processor by then (`RunDelay`). So all calls
    of the first step are watched, and afterwards those that had something computed under them, in every fifth step; in
    the others such a call that is over before it is waited for has only a bound. Calls that a thread of ours carries
    out (`comm.nearby`, sends) are told by it, always.
    """

    def __init__(self) -> None:
        self.delay = RunDelay()
        self._step = 0
        self._place = (-2, 0)  # entry of the step list, calls in it so far
        self._overlapped: set[tuple[int, int]] = set()  # calls with something computed under them, by place

    def mark(self) -> tuple[int, int]:
        return perf_counter_ns(), thread_time_ns()

    def cpu_ns(self) -> int | None:
        return thread_time_ns()

    def issued(self, record: Record, work: Any) -> None:
        index, count = self._place
        self._place = record.index, count + 1 if record.index == index else 0
        when_done = getattr(work, "when_done", None)  # carried out, or watched, by a thread of ours
        if when_done is not None:
            when_done(record.complete)
            return
        record.marks = self._place
        if self.delay.known and not self._watches():
            return
        with suppress(AttributeError, RuntimeError):  # gloo's receive has no future
            work.get_future().add_done_callback(record.complete)

    def _watches(self) -> bool:
        """Whether gloo shall tell of the call that is being issued."""
        return self._step == 0 or (self._step % WATCH_EVERY == 0 and self._place in self._overlapped)

    def waits(self, record: Record) -> None:
        record.cpu = thread_time_ns()
        record.late = self.delay.raw()

    def woken(self, record: Record) -> None:
        now = perf_counter_ns()
        if record.done:
            return
        late = RunDelay.parse(self.delay.raw()) - RunDelay.parse(record.late)
        record.done = max(record.wait, now - late)
        stood_still = self.delay.known and now - record.wait >= (PER_MESSAGE_NS * record.messages or STOOD_STILL_NS)
        record.flags |= ESTIMATED if stood_still else BOUND  # else it may have been over before

    def waited(self, record: Record) -> None:
        record.cpu = thread_time_ns() - record.cpu

    def settle(self, records: list[Record]) -> None:
        for record in records:
            if not self._step and record.marks and record.wait - record.issued > AT_ONCE_NS:
                self._overlapped.add(record.marks)
        self._step += 1
        self._place = (-2, 0)

    def times(self, span: Span) -> tuple[int, int, int]:
        (start, cpu), (end, cpu_end) = span.began, span.ended
        return start, end - start, cpu_end - cpu


class RunDelay:
    """How long this thread was ready to run and had no processor, in ns, since it began: the second number of
    /proc/thread-self/schedstat. 0 where the system does not say (`known`)."""

    def __init__(self) -> None:
        self._file = -1
        with suppress(OSError):
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        # a kernel that keeps no such accounts prints zeros
        self.known = self._file >= 0 and not self._read().startswith(b"0 ")

    def raw(self) -> bytes:
        return self._read() if self.known else b""

    def _read(self) -> bytes:
        return os.pread(self._file, 64, 0)

    @staticmethod
    def parse(raw: bytes) -> int:
        return int(raw.split()[1]) if raw else 0

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file, self.known = -1, False

    def __del__(self) -> None:
        self.close()


@dataclass
class Tape:
    """Keeps one step at a time; `rows` hands it over. `base_ns` is where the file's times begin."""

    timer: Timer
    base_ns: int
    annotate: Callable[[str], AbstractContextManager[Any]] | None = None
    limit: int = MAX_ROWS
    dropped: int = 0
    index: int = -1
    records: list[Record] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    between_ns: int = 0  # computed between entries of this step
    _left: int | None = None  # computed in all when the last entry was left; None: in one, or not known

    def begin(self) -> None:
        """A step begins."""
        self.between_ns, self._left = 0, self.timer.cpu_ns()

    def finish(self) -> int | None:
        """The step is over: ns that this thread computed between its entries, and not in a wait for a collective."""
        known = self._left is not None
        self._enter()
        return self.between_ns if known else None

    def _enter(self) -> None:
        """What is between two entries is over."""
        if self._left is not None:
            self.between_ns += (self.timer.cpu_ns() or 0) - self._left
            self._left = None

    def start(self, index: int, name: object) -> Mark:
        """Entry `index` of the step list begins."""
        self._enter()
        note = self.annotate(str(name)) if self.annotate is not None else None
        if note is not None:
            note.__enter__()
        mark = Mark(index, self.index, self.timer.mark(), note)
        self.index = index
        return mark

    def end(self, mark: Mark) -> None:
        ended = self.timer.mark()
        if mark.outer < 0:
            self._left = self.timer.cpu_ns()
        self.index = mark.outer
        if len(self.spans) < self.limit:
            self.spans.append(Span(mark.index, mark.began, ended))
        else:
            self.dropped += 1
        if mark.note is not None:
            mark.note.__exit__(None, None, None)

    def issued(self, record: Record, work: Any, emulated: bool) -> None:
        record.index = self.index
        record.messages = getattr(work, "messages", 0)
        record.flags = (EMULATED if emulated else 0) | (DIRECT if record.messages else 0)
        if len(self.records) < self.limit:
            self.records.append(record)
            self.timer.issued(record, work)
        else:
            self.dropped += 1

    def waits(self, record: Record) -> None:
        self._enter()  # a wait behind the last entry has its own account
        self.timer.waits(record)

    def woken(self, record: Record) -> None:
        self.timer.woken(record)

    def waited(self, record: Record) -> None:
        self.timer.waited(record)
        if self.index < 0:
            self._left = self.timer.cpu_ns()

    def rows(self, step: int) -> list[list[int]]:
        """The rows of training step `step` as `events` describes them; the tape is empty afterwards."""
        records, spans = self.records, self.spans
        self.records, self.spans = [], []
        self.timer.settle(records)
        rows = [self._call(step, record) for record in records]
        for span in spans:
            start, wall, cpu = self.timer.times(span)
            rows.append([SPAN, step, span.index, start - self.base_ns, wall, cpu])
        return rows

    def _call(self, step: int, r: Record) -> list[int]:
        def after(stamp: int) -> int:
            return max(0, stamp - r.issue) if stamp else -1

        waits = (after(r.wait), after(r.waited)) if r.waited else (-1, -1)
        return [
            CALL, step, r.index, r.channel, _OP[r.op], r.payload, r.issue - self.base_ns, after(r.issued),
            after(r.done), *waits, r.cpu, r.flags,
        ]  # fmt: skip
