"""Collectives put together from sends and receives: their values, their order, their rounding, their errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_gpt.comm.group import Group, Pending
from dist_gpt.comm.p2p_collectives import CHUNK, Exchange, Waiter, add_up
from dist_gpt.events import DIRECT_BYTES, scatter_room
from tests.ranks.test_group import SIZES
from tests.ranks.threads import on_groups


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("one_node", [True, False])
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("rows", [7, DIRECT_BYTES // 8])
def test_gathers_and_scatters_under_way(rows: int, watched: bool, one_node: bool, size: int) -> None:
    """Of different lengths, some in place, waited for backwards; some of them by the thread that watches."""

    def body(group: Group) -> Any:
        group.gathers_directly = one_node or size == 2
        ended: list[int] = []
        found: list[tuple[Tensor, Pending]] = []
        for i in range(4):
            n = rows + i
            full = torch.arange(float(n * size)) + i + 1000 * group.index
            part = full[group.index * n :][:n]
            if i % 2:
                found.append((part, group.reduce_scatter(part, full)))
            else:
                found.append((full, group.all_gather(full, part)))
            work = found[-1][1]._work
            if watched and hasattr(work, "get_future"):
                work.get_future().add_done_callback(lambda *_, i=i: ended.append(i))
        for _, pending in reversed(found):
            pending.wait()
        assert not watched or sorted(ended) == [0, 1, 2, 3]
        for i, (tensor, _) in enumerate(found):
            n, column = rows + i, torch.arange(float((rows + i) * size))
            owners = torch.arange(size).repeat_interleave(n)
            whole = column + i + 1000 * owners
            total = size * (column + i) + 1000 * (size * (size - 1) // 2)
            expected = total[group.index * n :][:n] if i % 2 else whole
            assert torch.equal(tensor, expected), i
        assert group.scratch_bytes == 0
        sizes = [(rows + i) * size * 4 for i in (1, 3)]
        return group.peak_scratch_bytes == sum(scatter_room(payload, size) for payload in sizes)

    assert all(on_groups(size, body, single_copy=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parts_are_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(CHUNK + 5, generator=generator).to(dtype) for _ in range(8)]
    exact = torch.stack(parts).double().sum(dim=0)
    add_up(parts, parts[0])
    rounded = exact.to(dtype)
    if dtype == torch.float32:
        assert (parts[0] - rounded).abs().max() < 1e-5
    else:
        assert (parts[0] == rounded).double().mean() > 0.999, "of sums that end between two values some may differ"


def test_what_went_wrong_in_an_exchange_is_said_again() -> None:
    calls: list[int] = []

    def wait() -> None:
        calls.append(1)
        raise RuntimeError("closed by peer")

    exchange = Exchange([SimpleNamespace(wait=wait)], Waiter())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed by peer"):
            exchange.wait()
    assert len(calls) == 1
