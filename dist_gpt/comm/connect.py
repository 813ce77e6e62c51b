"""Connect the members of a gloo group that are on one node, and test that they can read each other's memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from dist_gpt.comm.cma import Member, MemberError, Nearby, process_vm_readv
from dist_gpt.events import NEAR_MEMBERS

CONNECT_S = 20.0
PR_SET_PTRACER = 0x59616D61  # linux/prctl.h
_INDEX = struct.Struct("q")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Refused(Exception):
    """A member may not read another member's memory, although all are on one node."""


def connect_members(backend: Any, ranks: Sequence[int], index: int, timeout_s: float) -> Nearby | None:
    """Connect the members of the gloo group `backend`; return None where they are on several nodes.

    All members call it together; `timeout_s` limits each of their collectives by reading. Return None also for a single
    member, for more than NEAR_MEMBERS, and where the system has no such reads. Raise Refused, on all members, where one
    may not read another's memory. An error on one member alone is such a refusal: the others wait for its vote.
    """
    size = len(ranks)
    if not 1 < size <= NEAR_MEMBERS:
        return None
    proof = torch.randint(1 << 62, (1,), generator=_unseeded())  # found only by reading the right process
    with ExitStack() as undo:
        place, door, why = 0, None, "reading failed on another rank"
        try:
            place = _place()
            door = undo.enter_context(_door(_name(os.getpid(), int(proof)), size)) if place else None
        except OSError:
            place = 0
        facts = _gathered(backend, size, [place, os.getpid(), proof.data_ptr(), int(proof)])
        places = {fact[0] for fact in facts}
        if door is None or len(places) > 1 or 0 in places:
            return None
        members: list[Member] = []
        try:
            _let_siblings_read()
            for i, link in sorted(_links(door, facts, index, undo).items()):
                members.append(Member(i, ranks[i], facts[i][1], link))
                _try_to_read(members[-1], *facts[i][2:])
        except Exception as error:
            why = str(error)
            members.clear()
        if not _all_agree(backend, len(members) == size - 1):
            raise Refused(why)
        undo.pop_all()
        door.close()
    return Nearby(index, members, timeout_s)


def _door(name: bytes, size: int) -> socket.socket:
    """Listen on the socket `name` for connections from other members; raise OSError on failure."""
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        door.bind(name)
        door.listen(size)
    except OSError:
        door.close()
        raise
    return door


def _links(door: socket.socket, facts: list[list[int]], index: int, undo: ExitStack) -> dict[int, socket.socket]:
    """Return a socket to every other member, by index: connect to earlier members, and accept later ones.

    A connecting member sends its index, the kernel names its process, and the answer says that this one may be read.
    """
    links, deadline = {}, monotonic() + CONNECT_S
    for i in range(index):
        links[i] = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        links[i].settimeout(CONNECT_S)
        links[i].connect(_name(facts[i][1], facts[i][3]))
        links[i].send(_INDEX.pack(index))
    while len(links) < len(facts) - 1:
        door.settimeout(max(1e-3, deadline - monotonic()))
        link, _ = door.accept()
        pid, uid, _ = _CREDENTIALS.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid != os.geteuid() or not any(fact[1] == pid for fact in facts):
            link.close()
            continue
        undo.enter_context(link).settimeout(CONNECT_S)
        (i,) = _INDEX.unpack(link.recv(_INDEX.size))
        if not index < i < len(facts) or facts[i][1] != pid:
            raise MemberError(f"process {pid} claims to be member {i}")
        link.send(_INDEX.pack(index))
        links[i] = link
    for i in range(index):
        if links[i].recv(_INDEX.size) != _INDEX.pack(i):
            raise MemberError(f"member {i} did not answer")
    return links


def _try_to_read(member: Member, address: int, number: int) -> None:
    """Raise MemberError if the memory of `member` cannot be read, or lacks `number` at `address` (another process)."""
    found = torch.empty(1, dtype=torch.int64)
    member.read(address, found)
    if int(found) != number:
        raise MemberError(f"process {member.pid} is not rank {member.rank} here")


def _name(pid: int, number: int) -> bytes:
    """Return a socket name in Linux's abstract namespace, which needs no file and ends with the process."""
    return f"\0dist_gpt.{pid}.{number}".encode()


def _unseeded() -> torch.Generator:
    """Return a generator that neither depends on the run's seed nor advances seeded generators."""
    generator = torch.Generator()
    generator.seed()
    return generator


def _place() -> int:
    """Return a hash that is equal for processes that can see each other; 0 where memory cannot be read. Raise OSError.

    It covers this boot of the kernel, the user, and the namespaces of process numbers, of users and of the network
    (traffic counts another network as another node).
    """
    if process_vm_readv is None or not hasattr(socket, "SO_PEERCRED"):
        return 0
    where = [Path("/proc/sys/kernel/random/boot_id").read_text(), str(os.geteuid())]
    where += [str(os.stat(f"/proc/self/ns/{name}").st_ino) for name in ("pid", "net", "user")]
    return int.from_bytes(hashlib.sha256(" ".join(where).encode()).digest()[:7], "big")


def _let_siblings_read() -> None:
    """Allow descendants of the parent, which started the other ranks of this node, to read this process's memory.

    Where Yama guards processes (Ubuntu's default), only ancestors may. Without Yama the call fails and is not needed.
    """
    parent = os.getppid()
    if parent > 1:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(parent), 0, 0, 0)


def _gathered(backend: Any, size: int, words: list[int]) -> list[list[int]]:
    """Gather the `words` of all members, equally many from each (collective)."""
    mine = torch.tensor(words, dtype=torch.int64)
    out = torch.empty(size * len(words), dtype=torch.int64)
    backend._allgather_base(out, mine).wait()
    found: list[list[int]] = out.view(size, -1).tolist()
    return found


def _all_agree(backend: Any, here: bool) -> bool:
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MIN  # type: ignore[assignment]
    flag = torch.tensor([int(here)])
    backend.allreduce([flag], options).wait()
    return bool(flag.item())
