"""The ledger: counts and times every collective, and compares what was issued with what the running step declared.

Always on: counts, payload, and four time stamps of the host a call (issue, issued, wait, waited), summed up to how
long each axis blocked this rank. In the profiling window every call and step is kept on a `Tape` as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

from dist_gpt.comm.tape import Record, Tape
from dist_gpt.events import CONTROL, Counts

MAX_DIFFERENCES = 20
Key = tuple[str, str, int]
"""(axis, op, payload bytes of one call)."""


@dataclass(frozen=True)
class Difference:
    """`calls` collectives more than declared (fewer: negative), in step-list entry `action` of step `step`."""

    step: int | None
    phase: str
    action: str
    axis: str
    op: str
    payload_bytes: int
    calls: int

    def __str__(self) -> str:
        many = f"{self.calls} more" if self.calls > 0 else f"{-self.calls} fewer"
        when = f"{self.phase} step {self.step}" if self.step is not None else self.phase
        return f"{when}, {self.action}: {many} {self.axis} {self.op} of {self.payload_bytes} bytes than declared"


@dataclass
class Spent:
    """Where the host waited in one training step, in ns: by axis in collectives, and for data."""

    blocked_ns: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    data_ns: int = 0


class Ledger:
    """Counts by phase; outside of a step everything is control traffic, listed and not compared."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.channels: list[dict[str, Any]] = []
        self.found: list[Difference] = []
        self.spent = Spent()
        self.records = 0  # of training steps
        self.tape: Tape | None = None
        self.number: int | None = None  # of the training step under way
        self._calls: dict[str, dict[Key, int]] = defaultdict(lambda: defaultdict(int))
        self._phase = CONTROL
        self._issued: dict[Key, int] | None = None

    def channel(self, axis: str, ranks: tuple[int, ...], direction: str = "") -> int:
        """The number under which a group's calls stand in the profile."""
        pair = {"ranks": list(ranks), "direction": direction} if direction else {}
        self.channels.append({"axis": axis, **pair})
        return len(self.channels) - 1

    # --- a call: issued, waited for ----------------------------------------------------------------------------

    def issue(self, axis: str, op: str, payload: int, channel: int) -> Record:
        """One collective of `payload` bytes is about to be issued."""
        key = (axis, op, payload)
        self._calls[self._phase][key] += 1
        if self._issued is not None:
            self._issued[key] = self._issued.get(key, 0) + 1
        if self.number is not None:
            self.records += 1
        return Record(axis, op, payload, channel, perf_counter_ns())

    def issued(self, record: Record, work: Any, emulated: bool) -> None:
        """The backend has taken it."""
        record.issued = perf_counter_ns()
        self.spent.blocked_ns[record.axis] += record.issued - record.issue
        if self.tape is not None:
            self.tape.issued(record, work, emulated)

    def waits(self, record: Record) -> None:
        """This rank begins to wait for it."""
        if self.tape is not None:
            self.tape.waits(record)
        record.wait = perf_counter_ns()

    def woken(self, record: Record) -> None:
        """The backend is done with it."""
        if self.tape is not None:
            self.tape.woken(record)

    def waited(self, record: Record) -> None:
        """Its result can be used."""
        record.waited = perf_counter_ns()
        self.spent.blocked_ns[record.axis] += record.waited - record.wait
        if self.tape is not None:
            self.tape.waited(record)

    # --- steps -------------------------------------------------------------------------------------------------

    def begin(self, number: int) -> None:
        """Training step `number` begins."""
        self.number, self.spent = number, Spent()

    def end(self) -> Spent:
        """It is over; returns what it spent."""
        self.number = None
        return self.spent

    @contextmanager
    def step(self, phase: str, name: object, declared: Mapping[Key, int], index: int = -1) -> Iterator[None]:
        """Everything issued inside belongs to entry `index` of the step list, `name`; what differs from `declared` is
        kept, with the name."""
        issued: dict[Key, int] = {}
        outer = self._phase, self._issued
        self._phase, self._issued = phase, issued
        mark = self.tape.start(index, name) if self.tape is not None else None
        try:
            yield
        finally:
            self._phase, self._issued = outer
            if self.tape is not None and mark is not None:
                self.tape.end(mark)
        if issued != declared:
            self._differs(phase, name, declared, issued)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, data are read."""
        mark = self.tape.start(-1, "data") if self.tape is not None else None
        started = perf_counter_ns()
        yield
        self.spent.data_ns += perf_counter_ns() - started
        if self.tape is not None and mark is not None:
            self.tape.end(mark)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Everything issued inside is control traffic, also within a step (the certificate reading gradients)."""
        outer = self._phase, self._issued
        self._phase, self._issued = CONTROL, None
        try:
            yield
        finally:
            self._phase, self._issued = outer

    def _differs(self, phase: str, name: object, declared: Mapping[Key, int], issued: Mapping[Key, int]) -> None:
        for axis, op, payload in sorted({*declared, *issued}):
            n = issued.get((axis, op, payload), 0) - declared.get((axis, op, payload), 0)
            if n and len(self.found) < MAX_DIFFERENCES:
                self.found.append(Difference(self.number, phase, str(name), axis, op, payload, n))

    @property
    def differences(self) -> list[str]:
        """What was issued and not declared, or declared and not issued, as sentences; the first MAX_DIFFERENCES."""
        return [str(difference) for difference in self.found]

    @property
    def exact(self) -> bool:
        """Whether everything issued was declared and everything declared was issued."""
        return not self.found

    def counts(self, phase: str) -> Counts:
        """Calls and bytes of `phase` so far."""
        counts = Counts()
        for (axis, op, payload), calls in self._calls[phase].items():
            counts.add(axis, op, calls, payload, self.sizes[axis])
        return counts
