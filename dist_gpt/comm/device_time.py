"""Device times for the profiling window on a GPU. NEVER RUN on a GPU by the authors; see "What was run where" (README).

The host runs ahead of the device, so its stamps do not show which rank waited. Every moment here is an event on a
stream, read after the step (which ends with a read of the loss anyway) against an anchor of that step:

    arrival   on the compute stream at the issue: the collective's own stream waits for exactly this point
    end       on a side stream that waits for the collective (`Work.wait` orders a stream, it does not block)
    wait      on the compute stream, before and after `Work.wait`: the compute stream is idle in between
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import torch

from dist_gpt.comm.trace_buffer import Record, Span


@dataclass
class _Marks:
    """Events of one collective; `wait` and `waited` are around its wait."""

    arrival: Any
    end: Any
    wait: Any = None
    waited: Any = None


class CudaTimer:
    """Timer that stamps with events of `device`: torch.cuda by default, a substitute in tests."""

    def __init__(self, device: Any = None) -> None:
        self.device = device if device is not None else torch.cuda
        self._free: list[Any] = []
        self._used: list[Any] = []
        self._sides: dict[int, Any] = {}  # one per channel: a group's collectives end in their order
        self._anchor, self._anchor_ns = self._new_anchor()
        self._next: tuple[Any, int] | None = None

    def _new_anchor(self) -> tuple[Any, int]:
        """Record an event; return it and its host time in ns, accurate to half the time that recording takes."""
        event, before = self.device.Event(enable_timing=True), perf_counter_ns()
        event.record()
        event.synchronize()
        return event, (before + perf_counter_ns()) // 2

    def mark(self) -> Any:
        """Record an event on the current stream and return it."""
        if self._next is not None:  # the last step has been read
            (self._anchor, self._anchor_ns), self._next = self._next, None
        event = self._free.pop() if self._free else self.device.Event(enable_timing=True)
        event.record()
        self._used.append(event)
        return event

    def cpu_ns(self) -> None:
        """Return None: the host runs ahead, so its CPU time says nothing about the device."""

    def issued(self, record: Record, work: Any) -> None:
        """Record the arrival and the end of a collective that was just issued."""
        arrival = self.mark()
        if record.channel not in self._sides:
            self._sides[record.channel] = self.device.Stream()
        with self.device.stream(self._sides[record.channel]):
            work.wait()
            record.marks = _Marks(arrival, self.mark())

    def waits(self, record: Record) -> None:
        """Record an event before the compute stream waits for the collective."""
        if record.marks is not None:
            record.marks.wait = self.mark()

    def woken(self, record: Record) -> None:
        """Do nothing: the end of the collective is an event already."""

    def waited(self, record: Record) -> None:
        """Record an event once the result can be used."""
        if record.marks is not None:
            record.marks.waited = self.mark()

    def settle(self, records: list[Record]) -> None:
        """Replace the host's stamps with the device's; all events may be reused once the spans have been read."""
        self.device.synchronize()
        for record in records:
            marks, record.marks = record.marks, None
            if marks is None:
                continue
            record.issue = self._ns(marks.arrival)
            record.issued = record.issue  # the host's time in the call does not stop the device
            record.done = self._ns(marks.end)
            record.wait = record.waited = 0
            if marks.waited is not None:
                record.wait, record.waited = self._ns(marks.wait), self._ns(marks.waited)
            record.cpu = 0
        self._free += self._used
        self._used = []
        self._next = self._new_anchor()  # elapsed times are float32 milliseconds: they must stay short

    def times(self, span: Span) -> tuple[int, int, int]:
        """Return (start, wall, CPU) of a span in ns; CPU equals wall."""
        start, end = self._ns(span.began), self._ns(span.ended)
        return start, end - start, end - start  # a device is never descheduled

    def _ns(self, event: Any) -> int:
        return self._anchor_ns + int(self._anchor.elapsed_time(event) * 1e6)
