"""Members of a group that read each other's memory: values, lifetimes of what is read, refusals, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_gpt.comm import connect
from dist_gpt.comm.cma import ALONE, READ_BYTES, Member, MemberError, Nearby, _copy, _small
from dist_gpt.comm.group import Group, Pending
from dist_gpt.comm.mesh import NEAR_AXES, Backends, build_mesh
from dist_gpt.layout import Layout
from tests.ranks.threads import on_gloo, on_groups

PIECE = READ_BYTES // 4
"""float32 values that are read at a time."""


def near(group: Group) -> Nearby:
    assert group.near is not None
    return group.near


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, PIECE - 1, 2 * PIECE + 3])
def test_several_under_way(rows: int, size: int) -> None:
    """Of different lengths, some in place, waited for backwards. Nobody waits in between: who comes first goes on."""

    def body(group: Group) -> Any:
        near(group)
        found: list[tuple[Tensor, Tensor, Pending]] = []
        for i in range(6):
            n = rows + i
            column = torch.arange(float(n * size)) % 1009 + i
            full = column + 1000 * group.index
            part = full[group.index * n :][:n]
            total = size * column + 1000 * (size * (size - 1) // 2)
            whole = column + 1000 * torch.arange(size).repeat_interleave(n)
            if i % 3 == 0:
                found.append((full, total, group.all_reduce(full)))
            elif i % 3 == 1:
                out = part if i % 2 else torch.empty(n)
                found.append((out, total[group.index * n :][:n], group.reduce_scatter(out, full)))
            else:
                out, shard = (full, part) if i % 2 else (torch.empty_like(full), part.clone())
                found.append((out, whole, group.all_gather(out, shard)))
        for tensor, expected, pending in reversed(found):
            pending.wait()
            assert torch.equal(tensor, expected)
        return True

    assert all(on_groups(size, body))


@pytest.mark.parametrize("numel", [1, 2, 5])
def test_fewer_values_than_members(numel: int) -> None:
    def body(group: Group) -> Any:
        x = torch.arange(float(numel), dtype=torch.float64) + group.index
        largest = x.clone()
        group.all_reduce(x).wait()
        group.all_reduce(largest, "max").wait()
        return x.tolist(), largest.tolist()

    assert on_groups(4, body) == [([4.0 * i + 6 for i in range(numel)], [i + 3.0 for i in range(numel)])] * 4


def test_a_maximum_keeps_what_is_not_a_number() -> None:
    def body(group: Group) -> Any:
        x = torch.tensor([float("nan") if group.index == 1 else 1.0, 2.0])
        group.all_reduce(x, "max").wait()
        return x.isnan().tolist()

    assert on_groups(3, body) == [[True, False]] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_2_bytes_are_rounded_once(dtype: torch.dtype) -> None:
    numel = READ_BYTES + 6  # two pieces, the second one short
    parts = [torch.randn(numel, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4)]
    exact = torch.stack(parts).double().sum(dim=0).to(dtype)

    def body(group: Group) -> Any:
        x, full = parts[group.index].clone(), parts[group.index][: numel - 2].clone()
        out = torch.empty((numel - 2) // 4, dtype=dtype)
        group.all_reduce(x).wait()
        group.reduce_scatter(out, full).wait()
        return x, out

    found = on_groups(4, body)
    for x, _ in found:  # of sums that end between two values some may differ
        assert (x == exact).double().mean() > 0.999 and torch.equal(x, found[0][0])
    assert (torch.cat([out for _, out in found]) == exact[: numel - 2]).double().mean() > 0.999


@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter", "all_gather"])
def test_who_is_done_may_overwrite_at_once(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One member reads late; what it reads must still be what the others had."""
    read = Member.read

    def late(member: Member, address: int, into: Tensor) -> None:
        if member.rank == 0:  # seen from the others
            time.sleep(0.05)
        read(member, address, into)

    def body(group: Group) -> Any:
        for i in range(3):
            full, out = torch.full((8,), 1.0 + i), torch.empty(4)
            whole = torch.empty(8)
            if op == "all_reduce":
                group.all_reduce(full).wait()
                assert full.tolist() == [2.0 * (1 + i)] * 8
            elif op == "reduce_scatter":
                group.reduce_scatter(out, full).wait()
                assert out.tolist() == [2.0 * (1 + i)] * 4
            else:
                group.all_gather(whole, full[:4]).wait()
                assert whole.tolist() == [1.0 + i] * 8
            full.fill_(-1e9)
            whole.fill_(-1e9)
        return True

    monkeypatch.setattr(Member, "read", late)
    assert all(on_groups(2, body))


# --- who reads, and who may not -----------------------------------------------------------------------------------


def test_which_groups_read() -> None:
    """Those along which much is moved; not the world, nor the edges of a pipeline."""

    def body(rank: int, backends: Backends) -> Any:
        mesh = build_mesh(Layout(dp=2, pp=2), rank, (0, 1), backends)
        reading = [axis for axis, group in mesh.groups.items() if group.near is not None]
        edges = [edge for edge, group in mesh.edges.items() if group.near is not None]
        said = mesh.reads_memory, mesh.refusal
        mesh.world.barrier()  # a rank that closes would cut off others that are still connecting
        mesh.close()
        return reading, edges, said

    assert on_gloo(4, body) == [(["data", "embed"], [], (True, ""))] * 4
    assert set(NEAR_AXES) == {"data", "embed", "tp", "shard", "replica"}
    assert on_gloo(4, body, single_copy=False) == [([], [], (False, ""))] * 4


def total(group: Group) -> Any:
    x = torch.full((5,), 1.0 + group.index)
    group.all_reduce(x).wait()
    return group.near is not None, group.refusal, x[0].item()


@pytest.mark.parametrize("who", [0, 1, 2])
def test_where_one_may_not_read_gloo_carries_everything(who: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Member.read

    def forbidden(member: Member, address: int, into: Tensor) -> None:
        if member.rank == who:
            raise MemberError("Operation not permitted")
        read(member, address, into)

    monkeypatch.setattr(Member, "read", forbidden)
    found = on_groups(3, total)
    assert [(reads, value) for reads, _, value in found] == [(False, 6.0)] * 3
    assert sum("Operation not permitted" in why for _, why, _ in found) == 2
    assert found[who][1] == "reading failed on another rank"


def test_a_process_that_is_another_one_here_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Member.read

    def elsewhere(member: Member, address: int, into: Tensor) -> None:
        read(member, address, into)
        into.add_(1)

    monkeypatch.setattr(Member, "read", elsewhere)
    found = on_groups(2, total)
    assert [(reads, value) for reads, _, value in found] == [(False, 3.0)] * 2
    assert "is not rank" in found[0][1] + found[1][1]


def test_members_on_several_nodes_do_not_try(monkeypatch: pytest.MonkeyPatch) -> None:
    places = iter([1, 2])
    monkeypatch.setattr(connect, "_place", lambda: next(places))
    assert on_groups(2, total) == [(False, "", 3.0)] * 2


def test_a_system_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "process_vm_readv", None)
    assert connect._place() == 0
    assert on_groups(2, total) == [(False, "", 3.0)] * 2


def test_another_network_is_another_place() -> None:
    """As on the virtual cluster, whose nodes are networks of one machine."""
    code = "from dist_gpt.comm.connect import _place; print(_place())"
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(here) == connect._place() != 0
    found = []
    for network in ([], ["--net"]):  # without the rights of root a new user namespace is a part of it each time
        unshare = ["unshare", *network] if not os.geteuid() else ["unshare", "--map-root-user", *network]
        print_place = [*unshare, sys.executable, "-c", code]
        done = subprocess.run(print_place, capture_output=True, text=True, check=False)
        if done.returncode and os.geteuid():
            pytest.skip("this user may make no namespaces here")
        found.append(int(done.stdout))
    assert found[0] != found[1] and 0 not in found
    assert os.geteuid() or found[0] == int(here)


@pytest.mark.parametrize(("threads", "pieces"), [(1, 1), (2, 3)])
def test_a_waiter_never_works_with_torchs_other_threads(threads: int, pieces: int) -> None:
    before = torch.get_num_threads()
    source = torch.arange(2.0 * ALONE + 6)
    to = torch.zeros_like(source)
    torch.set_num_threads(threads)
    try:
        parts = [len(there) for there, _ in _small(to, source)]
        _copy(to, source)
    finally:
        torch.set_num_threads(before)
    assert len(parts) == pieces and sum(parts) == source.numel()
    assert threads == 1 or max(parts) <= ALONE
    assert torch.equal(to, source)
