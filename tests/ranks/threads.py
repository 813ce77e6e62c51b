"""Ranks as threads of the test's own process: real gloo groups over loopback, without starting torch once per rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from dist_gpt.comm.group import Group
from dist_gpt.comm.ledger import Ledger
from dist_gpt.comm.mesh import Backends, GlooBackends

TIMEOUT_S = 60.0
T = TypeVar("T")


class RankFailed(AssertionError):
    """A rank's thread raised or did not end; its exception is the cause."""


def in_threads(world: int, body: Callable[[int], T]) -> list[T]:
    """body(rank) in one thread per rank, all at once; what each returned. RankFailed if one raised."""
    torch.set_num_threads(1)
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank)
        except BaseException as error:  # a failed assertion must reach the test
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank{rank}", daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
    for rank, error in sorted(errors.items()):
        raise RankFailed(f"rank {rank}: {error}") from error
    missing = [rank for rank in range(world) if rank not in results]
    if missing:
        raise RankFailed(f"ranks {missing} did not end in {2 * TIMEOUT_S:.0f} s")
    return [results[rank] for rank in range(world)]


def on_gloo(
    world: int, body: Callable[[int, Backends], T], single_copy: bool = True, timeout_s: float = TIMEOUT_S
) -> list[T]:
    """body(rank, backends) on `world` gloo ranks that share a store in memory."""
    store = dist.HashStore()

    def run(rank: int) -> T:
        return body(rank, GlooBackends(store, "127.0.0.1", timeout_s, single_copy=single_copy))

    return in_threads(world, run)


def on_groups(size: int, body: Callable[[Group], T], single_copy: bool = True, timeout_s: float = TIMEOUT_S) -> list[T]:
    """body(group) on each rank of one gloo group along tp."""
    ranks = tuple(range(size))

    def run(rank: int, backends: Backends) -> T:
        group = Group("tp", ranks, rank, backends.create("tp", ranks, rank), Ledger({"tp": size}))
        try:
            return body(group)
        finally:
            group.close()

    return on_gloo(size, run, single_copy, timeout_s)
