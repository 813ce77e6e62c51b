"""Ledger of one rank: counts and times every collective, and compares those issued with those the step declared.

Always on: counts, payload, and four host time stamps per call (issue, issued, wait, waited), which are summed to the
time that each axis blocked this rank. In the profiling window a `Tape` keeps every call and step as well.

Calls on a group are numbered from 1, alike on all its members; any thread may ask `position()` at any time where this
rank is: the step, the entry of the step list, and the collective.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

from dist_gpt.comm.trace_buffer import Record, Tape
from dist_gpt.events import CONTROL, Counts

MAX_DIFFERENCES = 20
Key = tuple[str, str, int]
"""(axis, op, payload bytes of one call)."""
DATA = "data"
"""Name of the entry that runs while the rank reads data."""


@dataclass(frozen=True)
class Difference:
    """`calls` more collectives than declared (negative: fewer), in step-list entry `action` of step `step`."""

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
    """Collective with its number in its group, from 1."""

    seq: int = 0


@dataclass
class Spent:
    """Time that the host was blocked in one training step, in ns: by axis in collectives, and for data."""

    blocked_ns: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    data_ns: int = 0


class Ledger:
    """Counts of collectives by phase; those outside a step are control traffic, listed but not compared."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.channels: list[dict[str, Any]] = []
        self.groups: list[tuple[str, tuple[int, ...], str]] = []  # (axis, ranks, direction) of each channel
        self.found: list[Difference] = []
        self.spent = Spent()
        self.records = 0  # collectives of training steps
        self.tape: Tape | None = None
        self.number: int | None = None  # of the training step under way
        self._calls: dict[str, dict[tuple[str, str, int, int], int]] = defaultdict(lambda: defaultdict(int))
        self._sequence: dict[int, int] = defaultdict(int)  # calls issued, by channel
        self._last: Numbered | None = None  # last issued, or last waited for
        self._latest: int | None = None  # last training step begun
        self._entry: tuple[str, object] | None = None  # phase and name of the step-list entry that runs, or failed
        self._phase = CONTROL
        self._issued: dict[Key, int] | None = None

    def channel(self, axis: str, ranks: tuple[int, ...], direction: str = "") -> int:
        """Register a group and return the number of its calls in the profile."""
        pair = {"ranks": list(ranks), "direction": direction} if direction else {}
        self.channels.append({"axis": axis, **pair})
        self.groups.append((axis, ranks, direction))
        return len(self.channels) - 1

    # --- a call: issued, waited for ----------------------------------------------------------------------------

    def issue(self, axis: str, op: str, payload: int, channel: int) -> Numbered:
        """Count a collective of `payload` bytes that is about to be issued, and return its record."""
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
        """Note that the backend has accepted the collective."""
        record.issued = perf_counter_ns()
        self.spent.blocked_ns[record.axis] += record.issued - record.issue
        if self.tape is not None:
            self.tape.issued(record, work, emulated)

    def waits(self, record: Numbered) -> None:
        """Note that this rank begins to wait for the collective."""
        self._last = record
        if self.tape is not None:
            self.tape.waits(record)
        record.wait = perf_counter_ns()

    def woken(self, record: Record) -> None:
        """Note that the backend is done with the collective."""
        if self.tape is not None:
            self.tape.woken(record)

    def waited(self, record: Record) -> None:
        """Note that the result of the collective can be used."""
        record.waited = perf_counter_ns()
        self.spent.blocked_ns[record.axis] += record.waited - record.wait
        if self.tape is not None:
            self.tape.waited(record)

    # --- steps -------------------------------------------------------------------------------------------------

    def begin(self, number: int) -> None:
        """Begin training step `number`."""
        self.number, self.spent = number, Spent()
        self._latest = number

    def end(self) -> Spent:
        """End the training step and return the time that it was blocked."""
        self.number = None
        return self.spent

    @contextmanager
    def step(self, phase: str, name: object, declared: Mapping[Key, int], index: int = -1) -> Iterator[None]:
        """Attribute everything issued inside to entry `index` of the step list, called `name`.

        Keep differences from `declared` under that name.
        """
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
        """Count the time inside as time spent on reading data."""
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
        """Count everything issued inside as control traffic, also within a step (the certificate reads gradients).

        `position` reports it as `name`.
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
        """Differences between issued and declared collectives as sentences; the first MAX_DIFFERENCES."""
        return [str(difference) for difference in self.found]

    @property
    def exact(self) -> bool:
        """True if everything issued was declared and everything declared was issued."""
        return not self.found

    def counts(self, phase: str) -> Counts:
        """Return the calls and bytes of `phase` so far."""
        counts = Counts()
        for (axis, op, payload, _), calls in self._calls[phase].items():
            counts.add(axis, op, calls, payload, self.sizes[axis])
        return counts

    def by_channel(self) -> list[dict[str, Any]]:
        """Return calls and payload so far: one row {channel, phase, op, calls, payload_bytes} for each that has any."""
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
        """Return where this rank is now, as plain data. Any thread may call it; it never blocks and never raises.

        `seq` is the number of its collective on its group, from 1; `counts` has the calls issued on each channel.
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
        """True if this rank is in a collective, or has just left one through an error."""
        return self._last is not None and _doing(self._last) != "computing"


def _doing(record: Record) -> str:
    """Return the host's state: `issuing` the collective, `waiting` for it, or `computing` (meanwhile or afterwards)."""
    if not record.issued:
        return "issuing"
    return "waiting" if record.wait and not record.waited else "computing"
