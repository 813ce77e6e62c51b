"""Test that gloo through host memory gives bitwise what gloo gives, and counts the same. CPU tensors are staged here as
GPU tensors would be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu_check.cases import tiny
from dist_gpt.comm.group import Group
from dist_gpt.comm.ledger import Ledger
from dist_gpt.comm.mesh import Backends, GlooBackends
from dist_gpt.comm.staged import StagedBackends, StagedGroup, StagedWork
from dist_gpt.verify import TOLERANCE, certify_rank, merge_verdicts, write_reference
from tests.ranks.threads import RankFailed, in_threads

TIMEOUT_S = 60.0


def on_ranks(size: int, body: Callable[[Group], Any], staged: bool) -> list[Any]:
    """Call body(group) on each rank of one group, staged or not; return (result, the ledger's counts) of each."""
    store, ranks = dist.HashStore(), tuple(range(size))

    def run(rank: int) -> Any:
        backends: Backends = GlooBackends(store, "127.0.0.1", TIMEOUT_S, single_copy=False)
        if staged:
            backends = StagedBackends(store, "127.0.0.1", TIMEOUT_S, stages_all=True)
        ledger = Ledger({"tp": size})
        group = Group("tp", ranks, rank, backends.create("tp", ranks, rank), ledger)
        try:
            return body(group), ledger.by_channel()
        finally:
            group.close()

    return in_threads(size, run)


def values(group: Group, count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(group.index)
    return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)


def all_reduce(group: Group, dtype: torch.dtype) -> Tensor:
    x = values(group, 24, dtype)
    group.all_reduce(x).wait()
    return x


def largest(group: Group, dtype: torch.dtype) -> Tensor:
    x = values(group, 24, dtype)
    group.all_reduce(x, "max").wait()
    return x


def all_gather(group: Group, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(24, dtype=dtype)
    part = out.view(group.size, -1)[group.index]
    part.copy_(values(group, len(part), dtype))
    group.all_gather(out, part).wait()
    return out


def reduce_scatter(group: Group, dtype: torch.dtype) -> Tensor:
    full = values(group, 24, dtype)
    out = full.view(group.size, -1)[group.index]
    group.reduce_scatter(out, full).wait()
    return out.clone()


def large_reduce_scatter(group: Group, dtype: torch.dtype) -> Tensor:
    full = values(group, 300_000, dtype)
    out = torch.empty(300_000 // group.size, dtype=dtype)
    group.reduce_scatter(out, full).wait()
    return out


def broadcast(group: Group, dtype: torch.dtype) -> Tensor:
    x = values(group, 24, dtype)
    group.broadcast(x, group.size - 1).wait()
    return x


OPERATIONS = (all_reduce, largest, all_gather, reduce_scatter, large_reduce_scatter, broadcast)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_collective_gives_the_same_bits_and_the_same_counts(operation: Any, size: int) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        plain = on_ranks(size, lambda group, dtype=dtype: operation(group, dtype), staged=False)
        staged = on_ranks(size, lambda group, dtype=dtype: operation(group, dtype), staged=True)
        for (want, counts), (got, counted) in zip(plain, staged, strict=True):
            assert torch.equal(got, want)
            assert counted == counts and counts[0]["calls"] == 1


def test_an_all_gather_over_several_nodes_goes_through_gloos_own() -> None:
    def body(group: Group) -> Tensor:
        group.gathers_directly = False
        return all_gather(group, torch.float32)

    for (got, _), (want, _) in zip(on_ranks(3, body, True), on_ranks(3, body, False), strict=True):
        assert torch.equal(got, want)


def test_messages_arrive_in_order_and_may_be_received_late() -> None:
    def body(group: Group) -> list[Tensor]:
        got = [torch.zeros(5) for _ in range(3)]
        receiving = [group.recv(x) for x in got]
        sent = [torch.full((5,), 10.0 * group.index + i) for i in range(3)]
        sending = [group.send(x) for x in sent]
        for x in sent:
            x.fill_(-1.0)  # what is sent was copied when it was issued
        for pending in [*sending, *receiving]:
            pending.wait()
            pending.wait()
        return got

    for rank, (got, counts) in enumerate(on_ranks(2, body, staged=True)):
        assert [x[0].item() for x in got] == [10.0 * (1 - rank) + i for i in range(3)]
        assert {row["op"]: row["calls"] for row in counts} == {"send": 3, "recv": 3}


def test_a_result_is_not_there_before_it_is_waited_for() -> None:
    def body(group: Group) -> tuple[float, float]:
        x = torch.ones(4)
        pending = group.all_reduce(x)
        before = x[0].item()
        pending.wait()
        return before, x[0].item()

    assert [result for result, _ in on_ranks(2, body, staged=True)] == [(1.0, 2.0)] * 2


def test_what_is_not_contiguous_is_refused() -> None:
    with pytest.raises(RankFailed, match="only contiguous tensors are sent"):
        on_ranks(2, lambda group: group.all_reduce(torch.ones(4, 4).t()[:, :2]).wait(), staged=True)


def test_members_never_read_each_others_memory() -> None:
    def body(group: Group) -> bool:
        return group.near is None and isinstance(group.backend, StagedGroup)

    assert all(result for result, _ in on_ranks(2, body, staged=True))


LAYOUTS = {
    "dp2 zero3": ("gpt2", {"dp": 2}, {"sharding": "zero3", "bucket_mb": 0.02}),
    "dp2 zero1": ("llama", {"dp": 2}, {"sharding": "zero1"}),
    "tp2 sp": ("llama", {"tp": 2, "sequence_parallel": True}, {}),
    "pp2": ("gpt2", {"pp": 2}, {}),
    "dp2 x tp2": ("gpt2", {"dp": 2, "tp": 2}, {"sharding": "zero2", "bucket_mb": 0.02}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_as_one_process_does(name: str, tmp_path: Path) -> None:
    family, parallel, optim = LAYOUTS[name]
    config = tiny(family, "fp64", None, "none", parallel, optim)
    write_reference(config, tmp_path / "reference")
    store = dist.HashStore()

    def body(rank: int) -> Any:
        backends = StagedBackends(store, "127.0.0.1", TIMEOUT_S, stages_all=True)
        return certify_rank(config, rank, backends, tmp_path / "reference")

    found = merge_verdicts(config, in_threads(config.world_size, body))
    assert found["verdict"] == "pass", found
    assert max(found["worst"].values()) <= TOLERANCE and found["accounting"] == "exact"


def test_a_planted_lost_result_fails_the_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("gpt2", "fp64", {"num_layers": 1}, "none", {"dp": 2})
    write_reference(config, tmp_path / "reference")
    store, wait = dist.HashStore(), StagedWork.wait

    def loses_its_results(work: StagedWork) -> None:
        work._results = []
        wait(work)

    monkeypatch.setattr(StagedWork, "wait", loses_its_results)

    def body(rank: int) -> Any:
        backends = StagedBackends(store, "127.0.0.1", TIMEOUT_S, stages_all=True)
        return certify_rank(config, rank, backends, tmp_path / "reference")

    found = merge_verdicts(config, in_threads(2, body))
    assert found["verdict"] == "fail"
