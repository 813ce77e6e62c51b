"""The ledger: counts and times every collective, and compares what was issued with what the running step declared.

Always on: counts, payload, and four time stamps of the host a call (issue, issued, wait, waited), summed up to how
long each axis blocked this rank. In the profiling window every call and step is kept on a `Tape` as well.

Calls on a group are numbered from 1, equally on all its members; `position()` tells any thread, at any time, where this
rank is: the step, the entry of the step list, and the collective.
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
DATA = "data"
"""What the rank does while it reads data."""


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


@dataclass(slots=True)
class Numbered(Record):
    """A collective that knows which one of its group it is, from 1."""

    seq: int = 0


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
        self.groups: list[tuple[str, tuple[int, ...], str]] = []  # (axis, ranks, direction) of each channel
        self.found: list[Difference] = []
        self.spent = Spent()
        self.records = 0  # of training steps
        self.tape: Tape | None = None
        self.number: int | None = None  # of the training step under way
        self._calls: dict[str, dict[tuple[str, str, int, int], int]] = defaultdict(lambda: defaultdict(int))
        self._sequence: dict[int, int] = defaultdict(int)  # calls issued, by channel
        self._last: Numbered | None = None  # issued last, or waited in last
        self._latest: int | None = None  # training step begun last
        self._entry: tuple[str, object] | None = None  # phase and name of the step-list entry that runs, or failed
        self._phase = CONTROL
        self._issued: dict[Key, int] | None = None

    def channel(self, axis: str, ranks: tuple[int, ...], direction: str = "") -> int:
        """The number under which a group's calls stand in the profile."""
        pair = {"ranks": list(ranks), "direction": direction} if direction else {}
        self.channels.append({"axis": axis, **pair})
        self.groups.append((axis, ranks, direction))
        return len(self.channels) - 1

    # --- a call: issued, waited for ----------------------------------------------------------------------------

    def issue(self, axis: str, op: str, payload: int, channel: int) -> Numbered:
        """One collective of `payload` bytes is about to be issued."""
        self._calls[self._phase][axis, op, payload, channel] += 1
        if self._issued is not None:
            key = (axis, op, payload)
            self._issued[key] = self._issued.get(key, 0) + 1
        if self.number is not None:
            self.records += 1
        seq = self._sequence[channel] = self._sequence[channel] + 1
        self._last = record = Numbered(axis, op, payload, channel, perf_counter_ns())
        record.seq = seq
        return record

    def issued(self, record: Record, work: Any, emulated: bool) -> None:
        """The backend has taken it."""
        record.issued = perf_counter_ns()
        self.spent.blocked_ns[record.axis] += record.issued - record.issue
        if self.tape is not None:
            self.tape.issued(record, work, emulated)

    def waits(self, record: Numbered) -> None:
        """This rank begins to wait for it."""
        self._last = record
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
        self._latest = number

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
        around, self._entry = self._entry, (phase, name)
        mark = self.tape.start(index, name) if self.tape is not None else None
        try:
            yield
            self._entry = around  # not after an error: `position` then says where it was
        finally:
            self._phase, self._issued = outer
            if self.tape is not None and mark is not None:
                self.tape.end(mark)
        if issued != declared:
            self._differs(phase, name, declared, issued)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, data are read."""
        mark = self.tape.start(-1, DATA) if self.tape is not None else None
        around, self._entry = self._entry, (self._phase, DATA)
        started = perf_counter_ns()
        yield
        self._entry = around
        self.spent.data_ns += perf_counter_ns() - started
        if self.tape is not None and mark is not None:
            self.tape.end(mark)

    @contextmanager
    def aside(self, name: str = "") -> Iterator[None]:
        """Everything issued inside is control traffic, also within a step (the certificate reading gradients).

        `name` is what `position` calls it.
        """
        outer, around = (self._phase, self._issued), self._entry
        self._phase, self._issued = CONTROL, None
        if name:
            self._entry = (CONTROL, name)
        try:
            yield
            self._entry = around  # not after an error: `position` then says where it was
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
        for (axis, op, payload, _), calls in self._calls[phase].items():
            counts.add(axis, op, calls, payload, self.sizes[axis])
        return counts

    def by_channel(self) -> list[dict[str, Any]]:
        """Calls and payload so far: one row {channel, phase, op, calls, payload_bytes} for each that has any."""
        rows: dict[tuple[int, str, str], dict[str, Any]] = {}
        for phase, found in self._calls.items():
            for (_, op, payload, channel), calls in found.items():
                empty = {"channel": channel, "phase": phase, "op": op, "calls": 0, "payload_bytes": 0}
                row = rows.setdefault((channel, phase, op), empty)
                row["calls"] += calls
                row["payload_bytes"] += calls * payload
        return [rows[key] for key in sorted(rows)]

    # --- where this rank is --------------------------------------------------------------------------------------

    def position(self) -> dict[str, Any]:
        """Where this rank is now, as plain data. Any thread may ask; never blocks, never raises.

        `seq` is the number of its collective on its group, from 1; `counts` how many it issued on each channel.
        """
        try:
            last, entry, sequence = self._last, self._entry, self._sequence
            counts = [sequence.get(channel, 0) for channel in range(len(self.groups))]
            phase, action = entry if entry is not None else (self._phase, "")
            place = {"step": self._latest, "phase": phase, "action": str(action), "counts": counts}
            call = {"axis": "", "op": "", "seq": 0, "channel": -1, "state": "computing"}
            if last is not None:
                call = {"axis": last.axis, "op": last.op, "seq": last.seq, "channel": last.channel}
                call["state"] = _doing(last)
            return {**place, **call, "calls": sum(counts)}
        except Exception as error:  # a name that cannot be written must not end a heartbeat
            return {"step": None, "phase": "", "action": f"not known: {type(error).__name__}", "axis": "", "op": "",
                    "seq": 0, "channel": -1, "state": "computing", "counts": [], "calls": 0}  # fmt: skip

    @property
    def in_collective(self) -> bool:
        """Whether this rank is in a collective, or an error has just thrown it out of one."""
        return self._last is not None and _doing(self._last) != "computing"


def _doing(record: Record) -> str:
    """What the host does with a collective: `issuing` it, `waiting` for it, or `computing` meanwhile or after."""
    if not record.issued:
        return "issuing"
    return "waiting" if record.wait and not record.waited else "computing"
