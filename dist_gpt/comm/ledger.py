"""The ledger: counts every collective where it is issued and compares it with what the running step declared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from dist_gpt.events import CONTROL, Counts

MAX_DIFFERENCES = 20


class Declared(Protocol):
    """The part of `plan.steps.Call` that the ledger reads."""

    @property
    def axis(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def calls(self) -> int: ...
    @property
    def payload(self) -> int: ...


class Ledger:
    """Counts by phase; outside of a step everything is control traffic, listed and not compared."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.phases: dict[str, Counts] = {}
        self.expected: dict[str, Counts] = {}
        self.differences: list[str] = []
        self._phase = CONTROL
        self._issued: dict[tuple[str, str, int], int] | None = None

    def record(self, axis: str, op: str, payload: int, size: int) -> None:
        """One issued collective of `payload` bytes in a group of `size` ranks."""
        self.phases.setdefault(self._phase, Counts()).add(axis, op, 1, payload, size)
        if self._issued is not None:
            key = (axis, op, payload)
            self._issued[key] = self._issued.get(key, 0) + 1

    @contextmanager
    def step(self, phase: str, name: object, declared: Sequence[Declared]) -> Iterator[None]:
        """Everything issued inside belongs to step `name`; what differs from `declared` is kept, with the name."""
        outer, self._phase, self._issued = self._phase, phase, {}
        try:
            yield
            self._close(phase, name, declared, self._issued)
        finally:
            self._phase, self._issued = outer, None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Everything issued inside is control traffic, also within a step (the certificate reading gradients)."""
        outer = self._phase, self._issued
        self._phase, self._issued = CONTROL, None
        try:
            yield
        finally:
            self._phase, self._issued = outer

    def _close(
        self, phase: str, name: object, declared: Sequence[Declared], issued: dict[tuple[str, str, int], int]
    ) -> None:
        expected = self.expected.setdefault(phase, Counts())
        left = dict(issued)
        for call in declared:
            expected.add(call.axis, call.op, call.calls, call.payload, self.sizes[call.axis])
            key = (call.axis, call.op, call.payload)
            left[key] = left.get(key, 0) - call.calls
        wrong = {key: n for key, n in left.items() if n}
        if wrong and len(self.differences) < MAX_DIFFERENCES:
            for (axis, op, payload), n in wrong.items():
                many = f"{n} more" if n > 0 else f"{-n} fewer"
                self.differences.append(f"{phase}, {name}: {many} {axis} {op} of {payload} bytes than declared")

    @property
    def exact(self) -> bool:
        """Whether everything issued was declared and everything declared was issued."""
        return not self.differences

    def counts(self, phase: str) -> Counts:
        return self.phases.get(phase, Counts())
