"""The ledger: counts every collective where it is issued and compares it with what the running step declared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dist_gpt.events import CONTROL, Counts

MAX_DIFFERENCES = 20
Key = tuple[str, str, int]
"""(axis, op, payload bytes of one call)."""


class Ledger:
    """Counts by phase; outside of a step everything is control traffic, listed and not compared."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.differences: list[str] = []
        self._calls: dict[str, dict[Key, int]] = defaultdict(lambda: defaultdict(int))
        self._phase = CONTROL
        self._issued: dict[Key, int] | None = None

    def record(self, axis: str, op: str, payload: int) -> None:
        """One issued collective of `payload` bytes."""
        key = (axis, op, payload)
        self._calls[self._phase][key] += 1
        if self._issued is not None:
            self._issued[key] = self._issued.get(key, 0) + 1

    @contextmanager
    def step(self, phase: str, name: object, declared: Mapping[Key, int]) -> Iterator[None]:
        """Everything issued inside belongs to step `name`; what differs from `declared` is kept, with the name."""
        issued: dict[Key, int] = {}
        outer = self._phase, self._issued
        self._phase, self._issued = phase, issued
        try:
            yield
        finally:
            self._phase, self._issued = outer
        if issued != declared and len(self.differences) < MAX_DIFFERENCES:
            self._differs(phase, name, declared, issued)

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
            if n:
                many = f"{n} more" if n > 0 else f"{-n} fewer"
                self.differences.append(f"{phase}, {name}: {many} {axis} {op} of {payload} bytes than declared")

    @property
    def exact(self) -> bool:
        """Whether everything issued was declared and everything declared was issued."""
        return not self.differences

    def counts(self, phase: str) -> Counts:
        """Calls and bytes of `phase` so far."""
        counts = Counts()
        for (axis, op, payload), calls in self._calls[phase].items():
            counts.add(axis, op, calls, payload, self.sizes[axis])
        return counts
