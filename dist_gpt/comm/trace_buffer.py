"""Tape of the profiling window: every collective and every entry of the step list of one rank, with times.

Times are nanoseconds of this rank's CLOCK_MONOTONIC (`time.perf_counter_ns`). A `Timer` measures them: on a CPU
by the host, which blocks where the rank blocks (`HostTimer`); on a GPU by the device, since the host runs ahead of it
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
"""Most calls, and most spans, that are kept of one step; the rest is counted as dropped."""
STOOD_STILL_NS, PER_MESSAGE_NS = 5_000, 10_000
"""A wait of fewer ns did not block: for a collective of the backend, and for each message of a `comm.exchange`."""
_OP = {op: number for number, op in enumerate(OPS)}


@dataclass(slots=True)
class Record:
    """Issued collective. Time stamps are in ns, 0 for what has not happened."""

    axis: str
    op: str
    payload: int
    channel: int
    issue: int
    issued: int = 0
    done: int = 0
    wait: int = 0
    waited: int = 0
    cpu: int = 0  # CPU time of this thread while it waited
    late: bytes = b""  # what RunDelay read when the wait began
    index: int = -1
    flags: int = 0
    messages: int = 0  # number of messages of an exchange
    marks: Any = None  # the timer's own

    def complete(self, _: Any = None) -> None:
        """Note that the collective has just ended; called on the thread that saw it end."""
        self.done = self.done or perf_counter_ns()


@dataclass(slots=True)
class Mark:
    """Open span, with the index of the one around it."""

    index: int
    outer: int
    began: Any
    note: AbstractContextManager[Any] | None = None


@dataclass(slots=True)
class Span:
    """Finished entry of the step list. `began` and `ended` are marks of the timer."""

    index: int
    began: Any
    ended: Any


class Timer(Protocol):
    """Source of times. `issued`, `waits`, `woken` and `waited` may note something on a record."""

    def mark(self) -> Any:
        """Return a mark of this moment, for a span."""

    def cpu_ns(self) -> int | None:
        """Return the CPU time of this thread so far, in ns; None where another device computes."""

    def issued(self, record: Record, work: Any) -> None:
        """Note that the collective was issued as `work`."""

    def waits(self, record: Record) -> None:
        """Note that this rank begins to wait for the collective."""

    def woken(self, record: Record) -> None:
        """Note that the backend lets this rank continue; the local part of an emulated operation is still to come."""

    def waited(self, record: Record) -> None:
        """Note that the result can be used."""

    def settle(self, records: list[Record]) -> None:
        """Fill in the stamps of the records of a finished step."""

    def times(self, span: Span) -> tuple[int, int, int]:
        """Return (start, wall, CPU of this thread) of a span, in ns."""


WATCH_EVERY = 5
AT_ONCE_NS = 50_000
"""A wait that begins within this many ns after the call does not overlap with computation."""


class HostTimer:
    """Timer on the host, which also reads the kernel's statistics.

    gloo reports the end of a collective by calling Python on a thread of its own, which takes the interpreter from the
    rank's computation: 8 % of the demo's step, if every call is watched. A rank that blocks until the end knows it too,
    from when it continued and how long the kernel had made it wait for a core by then (`RunDelay`). So all calls of the
    first step are watched, and in every WATCH_EVERY-th step after it those that overlap with computation; in the other
    steps, such a call that ends before it is waited for has only a bound. Calls that the group's waiter carries out
    (`comm.nearby`, sends) are always reported by it.
    """

    def __init__(self) -> None:
        self.delay = RunDelay()
        self._step = 0
        self._place = (-2, 0)  # entry of the step list, calls in it so far
        self._overlapped: set[tuple[int, int]] = set()  # places of calls that overlap with computation

    def mark(self) -> tuple[int, int]:
        """Return the time and the CPU time of this thread, in ns."""
        return perf_counter_ns(), thread_time_ns()

    def cpu_ns(self) -> int | None:
        """Return the CPU time of this thread, in ns."""
        return thread_time_ns()

    def issued(self, record: Record, work: Any) -> None:
        """Have the end of the collective reported to its record, where that is watched."""
        index, count = self._place
        self._place = record.index, count + 1 if record.index == index else 0
        when_done = getattr(work, "when_done", None)  # carried out, or watched, by the group's waiter
        if when_done is not None:
            when_done(record.complete)
            return
        record.marks = self._place
        if self.delay.known and not self._watches():
            return
        with suppress(AttributeError, RuntimeError):  # gloo's receive has no future
            work.get_future().add_done_callback(record.complete)

    def _watches(self) -> bool:
        """Return whether gloo is to report the end of the call that is being issued."""
        return self._step == 0 or (self._step % WATCH_EVERY == 0 and self._place in self._overlapped)

    def waits(self, record: Record) -> None:
        """Note the thread's CPU time and run delay before the wait."""
        record.cpu = thread_time_ns()
        record.late = self.delay.raw()

    def woken(self, record: Record) -> None:
        """Derive the end of the collective from this moment, unless it was reported."""
        now = perf_counter_ns()
        if record.done:
            return
        late = RunDelay.parse(self.delay.raw()) - RunDelay.parse(record.late)
        record.done = max(record.wait, now - late)
        stood_still = self.delay.known and now - record.wait >= (PER_MESSAGE_NS * record.messages or STOOD_STILL_NS)
        record.flags |= ESTIMATED if stood_still else BOUND  # else it may have ended before

    def waited(self, record: Record) -> None:
        """Note the CPU time that the wait took."""
        record.cpu = thread_time_ns() - record.cpu

    def settle(self, records: list[Record]) -> None:
        """Find, after the first step, the calls to watch in later ones; all stamps are there already."""
        for record in records:
            if not self._step and record.marks and record.wait - record.issued > AT_ONCE_NS:
                self._overlapped.add(record.marks)
        self._step += 1
        self._place = (-2, 0)

    def times(self, span: Span) -> tuple[int, int, int]:
        """Return (start, wall, CPU of this thread) of a span, in ns."""
        (start, cpu), (end, cpu_end) = span.began, span.ended
        return start, end - start, cpu_end - cpu


class RunDelay:
    """Time that this thread has been ready to run without a core, in ns, since it began.

    It is the second number of /proc/thread-self/schedstat; 0 where the system does not report it (`known`).
    """

    def __init__(self) -> None:
        self._file = -1
        with suppress(OSError):
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        # a kernel without these statistics prints zeros
        self.known = self._file >= 0 and not self._read().startswith(b"0 ")

    def raw(self) -> bytes:
        """Return the kernel's line, for `parse`; empty where it is not known."""
        return self._read() if self.known else b""

    def _read(self) -> bytes:
        return os.pread(self._file, 64, 0)

    @staticmethod
    def parse(raw: bytes) -> int:
        """Return the delay in the line `raw`, in ns; 0 if it is empty."""
        return int(raw.split()[1]) if raw else 0

    def close(self) -> None:
        """Close the file; the delay is not known afterwards."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self.known = -1, False

    def __del__(self) -> None:
        self.close()


@dataclass
class Tape:
    """Records and spans of one step at a time; `rows` hands them over. The file's times begin at `base_ns`."""

    timer: Timer
    base_ns: int
    annotate: Callable[[str], AbstractContextManager[Any]] | None = None
    limit: int = MAX_ROWS
    dropped: int = 0
    index: int = -1
    records: list[Record] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    between_ns: int = 0  # CPU time between entries of this step
    _left: int | None = None  # CPU time at the end of the last entry; None: inside an entry or wait, or not known

    def begin(self) -> None:
        """Begin a step."""
        self.between_ns, self._left = 0, self.timer.cpu_ns()

    def finish(self) -> int | None:
        """End the step; return CPU ns between its entries and outside waits for collectives; None if not known."""
        known = self._left is not None
        self._enter()
        return self.between_ns if known else None

    def _enter(self) -> None:
        """End the interval between two entries and add up its CPU time."""
        if self._left is not None:
            self.between_ns += (self.timer.cpu_ns() or 0) - self._left
            self._left = None

    def start(self, index: int, name: object) -> Mark:
        """Begin entry `index` of the step list, called `name`."""
        self._enter()
        note = self.annotate(str(name)) if self.annotate is not None else None
        if note is not None:
            note.__enter__()
        mark = Mark(index, self.index, self.timer.mark(), note)
        self.index = index
        return mark

    def end(self, mark: Mark) -> None:
        """End the entry that `mark` began."""
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
        """Keep the record of a collective that was issued as `work`."""
        record.index = self.index
        record.messages = getattr(work, "messages", 0)
        record.flags = (EMULATED if emulated else 0) | (DIRECT if record.messages else 0)
        if len(self.records) < self.limit:
            self.records.append(record)
            self.timer.issued(record, work)
        else:
            self.dropped += 1

    def waits(self, record: Record) -> None:
        """Note that this rank begins to wait for the collective."""
        self._enter()  # waits after the last entry are not counted as between entries
        self.timer.waits(record)

    def woken(self, record: Record) -> None:
        """Note that the backend is done with the collective."""
        self.timer.woken(record)

    def waited(self, record: Record) -> None:
        """Note that the result can be used."""
        self.timer.waited(record)
        if self.index < 0:
            self._left = self.timer.cpu_ns()

    def rows(self, step: int) -> list[list[int]]:
        """Return the rows of training step `step`, in the columns of `dist_gpt.events`, and empty the tape."""
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
