"""Members that read each other's memory, when something goes wrong: who is named, how soon, and what is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_gpt.comm.cma import Member, MemberError
from dist_gpt.comm.group import Group
from tests.patience import PATIENCE_S
from tests.ranks.test_nearby import near
from tests.ranks.threads import on_groups


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

    gone = "rank 1 has exited or failed: it closed its connection"
    assert on_groups(2, body)[0] == [gone, gone]


def test_an_error_of_one_ends_the_others_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those that it did not strike: they must not wait until their time is over."""
    read = Member.read

    def fails(member: Member, address: int, into: Tensor) -> None:
        if into.numel() == 3 and member.rank == 2 and member.index == 2 and into[0] == 100:
            raise MemberError("No such process")
        read(member, address, into)

    monkeypatch.setattr(Member, "read", fails)
    all_know = threading.Barrier(3)

    def body(group: Group) -> Any:
        out = torch.full((9,), 100.0 if group.index == 0 else 0.0)
        with pytest.raises(MemberError) as error:
            for _ in range(3):
                group.all_gather(out, torch.ones(3)).wait()
        all_know.wait(PATIENCE_S)  # nobody leaves, and so closes its group, before
        return str(error.value)

    found = on_groups(3, body)
    assert "No such process" in found[0]
    assert "closed its connection" in found[1] and "closed its connection" in found[2]


def test_a_member_that_does_not_come_is_named_in_time() -> None:
    def body(group: Group) -> Any:
        if group.index == 0:
            time.sleep(1.5)
            return ""
        with pytest.raises(MemberError) as error:
            group.all_reduce(torch.ones(4)).wait()
        return str(error.value)

    found = on_groups(2, body, timeout_s=0.5)
    late = "timed out: rank 0 did not start or did not finish the all_reduce (sum) of 16 bytes of float32"
    assert found[1] == late


def test_memory_of_a_process_that_has_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left, right = socket.socketpair()
    with left, right, pytest.raises(MemberError, match=rf"memory of rank 7 \(pid {process.pid}\)"):
        Member(1, 7, process.pid, left).read(4096, torch.empty(2))


def test_an_address_that_is_none() -> None:
    left, right = socket.socketpair()
    with left, right, pytest.raises(MemberError, match="Bad address"):
        Member(1, 7, os.getpid(), left).read(16, torch.empty(2))


def test_closing_leaves_no_descriptor() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def body(group: Group) -> Any:
        near(group)
        group.barrier()  # a rank that closes would cut off others that are still connecting
        return True

    on_groups(3, body)
    before = descriptors()
    for _ in range(3):
        on_groups(3, body)
    assert descriptors() <= before + 2, "of the backends some close a moment later"


def test_a_deadline_is_the_collectives_own() -> None:
    """Not that of each word: who comes one after the other, each in time for the one before, is late all the same."""

    def body(group: Group) -> Any:
        time.sleep(1.5 * group.index)
        with pytest.raises(MemberError) as error:
            group.all_reduce(torch.ones(6)).wait()
        return str(error.value)

    assert "timed out: rank 2 did not start" in on_groups(3, body, timeout_s=2.0)[0]


@pytest.mark.parametrize("other", ["kind", "length", "dtype", "op"])
def test_members_in_different_collectives_say_so(other: str) -> None:
    def body(group: Group) -> Any:
        x = torch.ones(8, dtype=torch.int32 if other == "dtype" and group.index else torch.float32)
        x = x[:4] if other == "length" and group.index else x
        with pytest.raises(MemberError) as error:
            if other == "kind" and group.index:
                group.all_gather(x, torch.ones(4)).wait()
            else:
                group.all_reduce(x, "max" if other == "op" and group.index else "sum").wait()
        return str(error.value)

    said = [line for line in on_groups(2, body) if "this rank in the" in line]
    words = {"kind": "all_gather of 32", "length": "of 16 bytes", "dtype": "int32", "op": "all_reduce (max)"}
    assert said and all(words[other] in line and "all_reduce (sum) of 32 bytes of float32" in line for line in said)


def test_what_no_address_and_length_describe_is_refused() -> None:
    def body(group: Group) -> Any:
        whole = torch.ones(16)
        for call in (
            lambda: group.all_reduce(whole[::2]),
            lambda: group.all_gather(whole, torch.ones(16)[::2]),
            lambda: group.all_gather(whole, torch.ones(4)),
            lambda: group.reduce_scatter(torch.ones(8, dtype=torch.float64), whole),
        ):
            with pytest.raises(ValueError, match="contiguous|parts of"):
                call()
        return True

    assert all(on_groups(2, body))


def test_a_closed_group_says_so() -> None:
    def body(group: Group) -> Any:
        group.all_reduce(torch.ones(4)).wait()
        group.close()
        with pytest.raises((RuntimeError, AttributeError)):
            group.all_reduce(torch.ones(4))
        with pytest.raises(RuntimeError, match="closed"):
            group._reading(print)()
        return True

    assert all(on_groups(2, body))


# --- in processes of their own ------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
import torch
from torch import distributed as dist
from dist_gpt.comm.group import Group
from dist_gpt.comm.ledger import Ledger
from dist_gpt.comm.mesh import GlooBackends

folder, what, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(4 if what == "threads" else 1)
backends = GlooBackends(dist.FileStore(folder + "/store", 2), "127.0.0.1", 20.0)
group = Group("tp", (0, 1), rank, backends.create("tp", (0, 1), rank), Ledger({"tp": 2}))
assert group.near is not None, group.refusal
x = torch.full((1 << 20,), 1.0 + rank)
torch.add(x, x)  # gathers the main thread's own team
before = len(os.listdir("/proc/self/task"))
group.all_reduce(x).wait()
assert x.unique().tolist() == [3.0]
group.all_reduce(x.bfloat16()).wait()
print(len(os.listdir("/proc/self/task")) - before, flush=True)
if what == "killed" and rank == 1:
    if os.fork() == 0:
        time.sleep(30)  # a child that outlives it
    print("forked", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if what == "killed":
    started = time.monotonic()
    try:
        group.all_reduce(x).wait()
    except RuntimeError as error:
        print(error, "within a moment" if time.monotonic() - started < 10 else "late", flush=True)
else:
    group.close()
"""


def two_processes(folder: Any, what: str) -> list[str]:
    """What each of them printed."""
    command = [sys.executable, "-c", SCRIPT, str(folder), what]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, start_new_session=True)
        for rank in range(2)
    ]
    try:
        return [rank.communicate(timeout=PATIENCE_S)[0] for rank in ranks[:1]] + [ranks[1].stdout.readline()]  # type: ignore[union-attr]
    finally:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
            assert rank.stdout is not None
            rank.stdout.close()


def test_a_waiter_gathers_no_threads_of_its_own(tmp_path: Any) -> None:
    """With four threads for computing there is one more for the group."""
    assert two_processes(tmp_path, "threads") == ["1\n", "1\n"]


def test_a_killed_process_is_noticed_at_once_though_it_leaves_a_child(tmp_path: Any) -> None:
    said = two_processes(tmp_path, "killed")[0].splitlines()
    assert said[0] == "1"
    assert said[1].startswith("rank 1 has exited") and said[1].endswith("within a moment")
