"""Ranks of a node that compute on CPUs keep to processors of their own.

Otherwise the threads of two ranks change places, and a rank whose processor is taken by another one's waiter comes late
to the next collective, where all wait for it: 2 ranks on 2 processors trained 3 to 7 % faster when each kept to one.
With more ranks than processors the system spreads them better than a fixed place would: stages of a pipeline are not
busy at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_before: list[list[int]] = []
"""What this process was allowed before it kept to a part of it."""


def share(allowed: Sequence[int], index: int, ranks: int, threads: int) -> list[int]:
    """Processors of rank `index` of `ranks` on a node, each with `threads` threads: as many for each, side by side.
    Empty where there are too few, or nobody to share them with."""
    each = len(allowed) // ranks
    if ranks == 1 or each < threads:
        return []
    return list(allowed[index * each : (index + 1) * each])


def allowed() -> list[int]:
    """Processors that this thread may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def shared() -> int:
    """Processors that the ranks of this node share, as far as this rank knows."""
    return len(_before[-1] if _before else allowed())


@contextmanager
def kept(index: int, ranks: int, threads: int) -> Iterator[list[int]]:
    """Meanwhile this thread, and those that it starts, keep to their `share`, which is given. Nothing is done, and none
    given, where somebody has bound it already (Slurm, mpirun, a container), or the system knows no binding."""
    before = allowed()
    free = hasattr(os, "sched_setaffinity") and len(before) == os.cpu_count()
    own = share(before, index, ranks, threads) if free else []
    if own:
        os.sched_setaffinity(0, own)
        _before.append(before)
    try:
        yield own
    finally:
        if own:
            _before.pop()
            os.sched_setaffinity(0, before)
