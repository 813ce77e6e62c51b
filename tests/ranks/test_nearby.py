"""Members of a group that read each other's memory: values, lifetimes of what is read, refusals, errors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_gpt.comm import connect
from dist_gpt.comm.group import Group, Pending
from dist_gpt.comm.mesh import NEAR_AXES, Backends, build_mesh
from dist_gpt.comm.nearby import READ_BYTES, Member, MemberError, Nearby
from dist_gpt.layout import Layout
from tests.ranks.threads import in_threads, on_gloo, on_groups

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
    assert found[who][1] == "another rank may not"


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


def test_another_network_is_another_place(tmp_path: Any) -> None:
    """As on the virtual cluster, whose nodes are networks of one machine."""
    code = "from dist_gpt.comm.connect import _place; print(_place())"
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(here) == connect._place() != 0
    unshare = ["unshare", "--net", *(["--map-root-user"] if os.geteuid() else [])]
    there = subprocess.run([*unshare, sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(there) not in (0, int(here))


# --- when something goes wrong ------------------------------------------------------------------------------------


def test_a_member_that_goes_is_named_and_the_error_said_again() -> None:
    def body(group: Group) -> Any:
        if group.index == 1:
            near(group).close()
            return []
        said = []
        for _ in range(2):
            with pytest.raises(MemberError) as error:
                group.all_reduce(torch.ones(4)).wait()
            said.append(str(error.value))
        return said

    gone = "rank 1 is gone: its connection was closed by peer"
    assert on_groups(2, body)[0] == [gone, gone]


def test_an_error_of_one_ends_the_others_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those that it did not strike: they must not wait until their time is over."""
    read = Member.read

    def fails(member: Member, address: int, into: Tensor) -> None:
        if into.numel() == 3 and member.rank == 2 and member.index == 2 and into[0] == 100:
            raise MemberError("No such process")
        read(member, address, into)

    monkeypatch.setattr(Member, "read", fails)

    def body(group: Group) -> Any:
        out = torch.full((9,), 100.0 if group.index == 0 else 0.0)
        started = time.monotonic()
        with pytest.raises(MemberError) as error:
            for _ in range(3):
                group.all_gather(out, torch.ones(3)).wait()
        assert time.monotonic() - started < 5
        return str(error.value)

    found = on_groups(3, body)
    assert "No such process" in found[0]
    assert "gone" in found[1] and "gone" in found[2]


def test_a_member_that_does_not_come_is_named_in_time() -> None:
    def body(group: Group) -> Any:
        if group.index == 0:
            time.sleep(1.5)
            return ""
        with pytest.raises(MemberError) as error:
            group.all_reduce(torch.ones(4)).wait()
        return str(error.value)

    found = on_groups(2, body, timeout_s=0.5)
    assert found[1] == "timed out: rank 0 did not come to the all_reduce within 0.5 s"


def test_memory_of_a_process_that_has_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left, right = socket.socketpair()
    with left, right, pytest.raises(MemberError, match=rf"memory of rank 7 \(pid {process.pid}\)"):
        Member(1, 7, process.pid, left, 1.0).read(4096, torch.empty(2))


def test_an_address_that_is_none() -> None:
    left, right = socket.socketpair()
    with left, right, pytest.raises(MemberError, match="Bad address"):
        Member(1, 7, os.getpid(), left, 1.0).read(16, torch.empty(2))


def test_closing_leaves_no_descriptor() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def body(group: Group) -> Any:
        near(group)
        return True

    on_groups(3, body)
    before = descriptors()
    for _ in range(3):
        on_groups(3, body)
    assert descriptors() <= before + 2, "of the backends some close a moment later"


def test_in_threads_is_as_in_processes() -> None:
    """One process number for all: what is handed over is a descriptor of its own all the same."""
    found = in_threads(2, lambda rank: connect._place())
    assert found[0] == found[1] != 0
