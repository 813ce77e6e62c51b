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
from typing import Any

import torch
import torch.distributed as dist

from dist_gpt.comm.nearby import Member, MemberError, Nearby, process_vm_readv

MOST_MEMBERS = 128
"""Of a group that tries: each holds a socket for every other one."""
CONNECT_S = 20.0
PR_SET_PTRACER = 0x59616D61  # linux/prctl.h
SEQPACKET = socket.SOCK_SEQPACKET
_INDEX = struct.Struct("q")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Refused(Exception):
    """The members are on one node, and one of them may not read another one's memory."""


def meet(backend: Any, ranks: Sequence[int], index: int, timeout_s: float) -> Nearby | None:
    """Connect the members of the gloo group `backend`; None where they are on several nodes. All members call it;
    `timeout_s` is how long one of their collectives may wait for a member.

    Raises Refused, on all of them, where one may not read another one's memory.
    """
    size = len(ranks)
    if not 1 < size <= MOST_MEMBERS:
        return None
    proof = torch.randint(1 << 62, (1,), generator=_unseeded())  # only who reads the right process finds it there
    with ExitStack() as undo:
        door = undo.enter_context(socket.socket(socket.AF_UNIX, SEQPACKET))
        place = _place()
        try:
            door.bind(_name(os.getpid(), int(proof)))
            door.listen(size)
            door.settimeout(CONNECT_S)
            _let_siblings_read()
        except OSError:
            place = 0
        facts = _gathered(backend, size, [place, os.getpid(), proof.data_ptr(), int(proof)])
        places = {fact[0] for fact in facts}
        if len(places) > 1 or 0 in places:
            return None
        members: list[Member] = []
        why = "another rank may not"
        try:
            for i, link in sorted(_links(door, facts, index, undo).items()):
                _, pid, address, number = facts[i]
                members.append(Member(i, ranks[i], pid, _patient(link, timeout_s), timeout_s))
                found = torch.empty_like(proof)
                members[-1].read(address, found)
                if int(found) != number:
                    raise MemberError(f"process {pid} is not rank {ranks[i]} here")
        except (OSError, MemberError) as error:
            why = str(error)
            members.clear()
        if not _all_agree(backend, len(members) == size - 1):
            raise Refused(why)
        undo.pop_all()
        door.close()
    return Nearby(index, members)


def _links(door: socket.socket, facts: list[list[int]], index: int, undo: ExitStack) -> dict[int, socket.socket]:
    """A socket to every other member: this one knocks at those before it, and those after it knock here. Who knocks
    says which member it is, and the kernel says which process."""
    links = {}
    for i in range(index):
        links[i] = undo.enter_context(socket.socket(socket.AF_UNIX, SEQPACKET))
        links[i].connect(_name(facts[i][1], facts[i][3]))
        links[i].send(_INDEX.pack(index))
    while len(links) < len(facts) - 1:
        link, _ = door.accept()
        undo.enter_context(link)
        pid, uid, _ = _CREDENTIALS.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid != os.geteuid():
            continue
        link.settimeout(CONNECT_S)
        said = link.recv(_INDEX.size)
        i = _INDEX.unpack(said)[0] if len(said) == _INDEX.size else -1
        if index < i < len(facts) and facts[i][1] == pid:
            links[i] = link
    return links


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
    (another network is another node to who counts its bytes) and of users, the user. 0 where memory cannot be read."""
    if process_vm_readv is None or not hasattr(socket, "SO_PEERCRED"):
        return 0
    try:
        where = [Path("/proc/sys/kernel/random/boot_id").read_text(), str(os.geteuid())]
        where += [str(os.stat(f"/proc/self/ns/{name}").st_ino) for name in ("pid", "net", "user")]
    except OSError:
        return 0
    return int.from_bytes(hashlib.sha256(" ".join(where).encode()).digest()[:7], "big")


def _let_siblings_read() -> None:
    """Where yama guards processes (Ubuntu's default), only ancestors may read one. Allow it to what descends from the
    parent, which has started the other ranks of this node. Where there is no yama this says so, and is not needed."""
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(os.getppid()), 0, 0, 0)


def _patient(link: socket.socket, timeout_s: float) -> socket.socket:
    """Blocking, and no longer than that for a word."""
    link.setblocking(True)
    limit = struct.pack("ll", int(timeout_s), int(1e6 * (timeout_s % 1)))
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    return link


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
