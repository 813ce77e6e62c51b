"""Bugs on purpose: each is the kind of mistake that hides when parallelisms compose, and must turn a cell red."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def planted(name: str | None) -> Iterator[list[int]]:
    yield []
