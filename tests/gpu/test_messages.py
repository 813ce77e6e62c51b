"""Test two ranks, as threads of one process, that exchange tensors of one GPU over gloo through host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dist_gpt.comm.group import Group
from dist_gpt.comm.ledger import Ledger
from dist_gpt.comm.staged import StagedBackends
from tests.ranks.threads import in_threads

DEVICE = torch.device("cuda")
COUNT = 300_000


def on_two(body: Callable[[Group], Any]) -> list[Any]:
    store = dist.HashStore()

    def run(rank: int) -> Any:
        backends = StagedBackends(store, "127.0.0.1", 60.0, stages_all=DEVICE.type == "cpu")
        group = Group("tp", (0, 1), rank, backends.create("tp", (0, 1), rank), Ledger({"tp": 2}))
        try:
            return body(group)
        finally:
            group.close()

    return in_threads(2, run)


def values(group: Group) -> torch.Tensor:
    return torch.arange(COUNT, dtype=torch.float32, device=DEVICE) + group.index


def test_a_message_arrives_whole_though_its_tensor_is_made_and_used_at_once() -> None:
    def body(group: Group) -> bool:
        got = torch.zeros(COUNT, device=DEVICE)
        receiving = group.recv(got)
        sending = group.send(values(group).mul_(2).div_(2))  # issued behind kernels that may not have run
        receiving.wait()
        right = bool((got == torch.arange(COUNT, device=DEVICE) + 1 - group.index).all())
        sending.wait()
        return right and got.device.type == DEVICE.type

    assert on_two(body) == [True, True]


def test_sums_gathers_and_scatters_are_right() -> None:
    base = torch.arange(COUNT, dtype=torch.float32, device=DEVICE)

    def body(group: Group) -> list[bool]:
        reduced = values(group)
        group.all_reduce(reduced).wait()
        gathered = torch.empty(2 * COUNT, device=DEVICE)
        group.all_gather(gathered, values(group)).wait()
        scattered = torch.empty(COUNT // 2, device=DEVICE)
        group.reduce_scatter(scattered, values(group)).wait()
        told = values(group)
        group.broadcast(told, 1).wait()
        part = (2 * base + 1).view(2, -1)[group.index]
        return [
            bool((reduced == 2 * base + 1).all()), bool((gathered == torch.cat((base, base + 1))).all()),
            bool((scattered == part).all()), bool((told == base + 1).all()),
        ]  # fmt: skip

    assert on_two(body) == [[True] * 4] * 2
