"""CPU pinning: give each rank of a node that computes on CPUs its own cores.

Otherwise threads migrate between cores, and a rank whose core is taken by another rank's waiting thread is late at the
next collective, where all ranks wait for it: 2 ranks on 2 cores trained 3 to 7 % faster with pinning. With more ranks
than cores the system's scheduler does better than pinning, since the stages of a pipeline are not busy at the same
time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_before: list[list[int]] = []
"""Cores that this process was allowed before each pinning that is in force."""


def share(allowed: Sequence[int], index: int, ranks: int, threads: int) -> list[int]:
    """Return the cores of rank `index` of `ranks` on a node: an equal, contiguous part of `allowed`.

    Empty if there is only one rank, or if there are too few cores for `threads` threads per rank.
    """
    each = len(allowed) // ranks
    if ranks == 1 or each < threads:
        return []
    return list(allowed[index * each : (index + 1) * each])


def allowed() -> list[int]:
    """Return the cores that this thread may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def shared() -> int:
    """Return the number of cores that the ranks of this node share, as far as this rank knows."""
    return len(_before[-1] if _before else allowed())


@contextmanager
def kept(index: int, ranks: int, threads: int) -> Iterator[list[int]]:
    """Pin this thread, and threads that it starts, to its `share` of the cores while the context is open; yield them.

    Do nothing and yield an empty list if the process is pinned already (by Slurm, mpirun or a container), if `share`
    is empty, or if the system does not support pinning.
    """
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
