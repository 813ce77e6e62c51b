"""How the members of a gloo group come to read each other's memory: see who is on the same node, connect every two,
and try.
"""

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

from dist_gpt.comm.nearby import Member, MemberError, Nearby, process_vm_readv
from dist_gpt.events import NEAR_MEMBERS

CONNECT_S = 20.0
PR_SET_PTRACER = 0x59616D61  # linux/prctl.h
_INDEX = struct.Struct("q")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Refused(Exception):
    """The members are on one node, and one of them may not read another one's memory."""


def connect_members(backend: Any, ranks: Sequence[int], index: int, timeout_s: float) -> Nearby | None:
    """Connect the members of the gloo group `backend`; None where they are on several nodes. All members call it;
    `timeout_s` is how long one of their collectives may take.

    Raises Refused, on all of them, where one may not read another one's memory. Whatever fails on one of them alone is
    such a refusal: the others wait for its vote.
    """
    size = len(ranks)
    if not 1 < size <= NEAR_MEMBERS:
        return None
    proof = torch.randint(1 << 62, (1,), generator=_unseeded())  # only who reads the right process finds it there
    with ExitStack() as undo:
        place, door, why = 0, None, "another rank may not"
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
    """Where others knock."""
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        door.bind(name)
        door.listen(size)
    except OSError:
        door.close()
        raise
    return door


def _links(door: socket.socket, facts: list[list[int]], index: int, undo: ExitStack) -> dict[int, socket.socket]:
    """A socket to every other member: this one knocks at those before it, and those after it knock here. Who knocks
    says which member it is, the kernel says which process, and the answer says that this process may be read."""
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
            raise MemberError(f"process {pid} says that it is member {i}")
        link.send(_INDEX.pack(index))
        links[i] = link
    for i in range(index):
        if links[i].recv(_INDEX.size) != _INDEX.pack(i):
            raise MemberError(f"member {i} did not answer")
    return links


def _try_to_read(member: Member, address: int, number: int) -> None:
    """Raises MemberError where its memory cannot be read, or is another process's."""
    found = torch.empty(1, dtype=torch.int64)
    member.read(address, found)
    if int(found) != number:
        raise MemberError(f"process {member.pid} is not rank {member.rank} here")


def _name(pid: int, number: int) -> bytes:
    """In Linux's abstract namespace: no file, and gone with the process."""
    return f"\0dist_gpt.{pid}.{number}".encode()


def _unseeded() -> torch.Generator:
    """Random numbers that neither come from a seed nor move those that do."""
    generator = torch.Generator()
    generator.seed()
    return generator


def _place() -> int:
    """Where processes can see each other: this boot of the kernel, the namespaces of process numbers, of the network
    (another network is another node to who counts its bytes) and of users, the user. 0 where memory cannot be read.
    Raises OSError."""
    if process_vm_readv is None or not hasattr(socket, "SO_PEERCRED"):
        return 0
    where = [Path("/proc/sys/kernel/random/boot_id").read_text(), str(os.geteuid())]
    where += [str(os.stat(f"/proc/self/ns/{name}").st_ino) for name in ("pid", "net", "user")]
    return int.from_bytes(hashlib.sha256(" ".join(where).encode()).digest()[:7], "big")


def _let_siblings_read() -> None:
    """Where yama guards processes (Ubuntu's default), only ancestors may read one. Allow it to what descends from the
    parent, which has started the other ranks of this node. Where there is no yama this says so, and is not needed."""
    parent = os.getppid()
    if parent > 1:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(parent), 0, 0, 0)


def _gathered(backend: Any, size: int, words: list[int]) -> list[list[int]]:
    """Everybody's `words`, as many of each."""
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
