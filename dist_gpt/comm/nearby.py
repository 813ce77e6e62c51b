"""Members of a group that are on one node read each other's memory.

What gloo sends over the loopback is copied into the kernel and out of it again, piece by piece, by threads that wake
each other. Here whoever needs a tensor reads it where it lies, once (process_vm_readv), and sums while the piece is in
the cache. A socket between every two members carries what has to be said: where the tensor is, and that it has been
read. Where the system forbids it (another user, a container, Linux's yama) everybody finds out when the group is made,
and gloo carries everything.

A collective has the same words on all members, in one order, on one thread a group: each says what it belongs to, and
no more is needed to tell them apart.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from time import monotonic
from weakref import WeakSet

import torch
from torch import Tensor

READ_BYTES = 1 << 19
"""A piece that is summed: it stays in the cache between the two."""
ALONE = 1 << 15
"""Values that torch works on without its other threads (its grain size): a waiter must not gather a team of its own."""
KINDS = ("all_gather", "reduce_scatter (sum)", "all_reduce (sum)", "all_reduce (max)")
DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_WORD = struct.Struct("qqqq")
_libc = ctypes.CDLL(None, use_errno=True)
process_vm_readv = getattr(_libc, "process_vm_readv", None)
"""Linux's; None elsewhere."""
if process_vm_readv is not None:
    process_vm_readv.restype = ctypes.c_ssize_t


class _Stretch(ctypes.Structure):
    """struct iovec."""

    _fields_ = [("start", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class MemberError(RuntimeError):
    """Another member is gone, late, or elsewhere."""


@dataclass(frozen=True)
class Call:
    """A collective: which of KINDS, which of DTYPES, bytes of the whole, and until when it may take."""

    kind: int
    dtype: int
    size: int
    deadline: float

    @property
    def left_s(self) -> float:
        return max(1e-3, self.deadline - monotonic())

    def __str__(self) -> str:
        return said(self.kind, self.dtype, self.size)


def said(kind: int, dtype: int, size: int) -> str:
    """A collective in words."""
    return f"{KINDS[kind]} of {size} bytes of {str(DTYPES[dtype]).removeprefix('torch.')}"


@dataclass(frozen=True)
class Member:
    """Another one of the group: which, its rank, its process, and the socket between us."""

    index: int
    rank: int
    pid: int
    link: socket.socket

    def tell(self, call: Call, address: int) -> None:
        """That this rank is in `call`. Raises MemberError when it is gone."""
        try:
            self.link.send(_WORD.pack(address, call.kind, call.dtype, call.size))
        except OSError as error:
            raise self._gone() from error

    def hear(self, call: Call) -> int:
        """The address in its next word, which belongs to `call`. Raises MemberError when it is gone, says nothing in
        time, or is in another collective."""
        try:
            self.link.settimeout(call.left_s)
            word = self.link.recv(_WORD.size)
        except TimeoutError as error:
            raise MemberError(f"timed out: rank {self.rank} did not come to, or did not end, the {call}") from error
        except OSError as error:
            raise self._gone() from error
        if not word:
            raise self._gone()
        address, *theirs = _WORD.unpack(word)
        if theirs != [call.kind, call.dtype, call.size]:
            raise MemberError(f"rank {self.rank} is in the {said(*theirs)}, this rank in the {call}")
        return int(address)

    def read(self, address: int, into: Tensor) -> None:
        """`into` (contiguous) = as many bytes of its memory, from `address` on. Raises MemberError."""
        done, size, one = 0, into.nbytes, ctypes.c_ulong(1)
        while done < size:
            here, there = _Stretch(into.data_ptr() + done, size - done), _Stretch(address + done, size - done)
            got = process_vm_readv(  # type: ignore[misc]  # where it is None nobody meets
                self.pid, ctypes.byref(here), one, ctypes.byref(there), one, ctypes.c_ulong(0)
            )
            if got <= 0:
                why = os.strerror(ctypes.get_errno())
                raise MemberError(f"memory of rank {self.rank} (pid {self.pid}) cannot be read: {why}")
            done += got

    def _gone(self) -> MemberError:
        return MemberError(f"rank {self.rank} is gone, or has failed: its connection was closed by peer")


class Nearby:
    """A group's collectives by reading. Each call blocks until nobody needs this rank's tensor any more, and belongs on
    the group's waiter. After an error every later call raises it again, and the others are told by a closed link."""

    def __init__(self, index: int, members: Sequence[Member], timeout_s: float) -> None:
        self.index, self.timeout_s = index, timeout_s
        self.size = len(members) + 1
        # everybody begins with the next one: all at once would read from the same
        self._members = sorted(members, key=lambda member: (member.index - index) % self.size)
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._call = Call(0, 0, 0, 0.0)
        self._error: Exception | None = None
        _ALIVE.add(self)

    def all_gather(self, out: Tensor, shard: Tensor) -> None:
        """out[i-th part] = member i's `shard`; one's own is there already."""
        with self._together("all_gather", out):
            parts = out.view(self.size, -1)
            self._tell(shard.data_ptr())
            for member in self._members:
                member.read(member.hear(self._call), parts[member.index])
            self._end()

    def reduce_scatter(self, out: Tensor, full: Tensor) -> None:
        """`out` = this member's part of the sum of `full`; it may be that part of `full` itself, and no other."""
        with self._together("reduce_scatter (sum)", full):
            own = full.view(self.size, -1)[self.index]
            self._tell(full.data_ptr())
            self._reduce(out.view(-1), own, self.index * own.nbytes, "sum")
            self._end()

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        """In place: everybody reduces a part, then reads the others' parts."""
        with self._together(f"all_reduce ({op})", tensor):
            flat = tensor.view(-1)
            width = -(-flat.numel() // self.size)
            parts = [flat[i * width : (i + 1) * width] for i in range(self.size)]
            offsets = [i * width * flat.element_size() for i in range(self.size)]
            own = parts[self.index]
            self._tell(tensor.data_ptr())
            addresses = self._reduce(own, own, offsets[self.index], op)
            self._tell()
            for member, address in zip(self._members, addresses, strict=True):
                member.hear(self._call)  # its part is reduced, and it has read this rank's addend
                member.read(address + offsets[member.index], parts[member.index])
            self._end()

    def forget(self) -> None:
        """Close this process's descriptors of the links, and nothing else."""
        for member in self._members:
            member.link.close()

    def close(self) -> None:
        """Let go of the links; who waits on one of them is woken."""
        for member in self._members:
            with suppress(OSError):
                member.link.shutdown(socket.SHUT_RDWR)
            member.link.close()

    def _reduce(self, out: Tensor, own: Tensor, offset: int, op: str) -> list[int]:
        """`out` = `own` and what lies `offset` bytes into each of the others' tensors. Returns where these begin.

        In 2 bytes it is summed in float32 and rounded once. The order is this member's own, the same in every run."""
        addresses = [member.hear(self._call) for member in self._members]
        if self._piece.nbytes < min(READ_BYTES, own.nbytes):
            self._piece = torch.empty(min(READ_BYTES, own.nbytes), dtype=torch.uint8)
        step = READ_BYTES // own.element_size()
        for start in range(0, own.numel(), step):
            at = slice(start, start + step)
            sources = [address + offset + start * own.element_size() for address in addresses]
            self._reduce_piece(out[at], own[at], sources, _OPS[op])
        return addresses

    def _reduce_piece(self, out: Tensor, own: Tensor, sources: list[int], op: Callable[..., Tensor]) -> None:
        piece = self._piece[: own.nbytes].view(own.dtype)
        total = torch.empty_like(own, dtype=torch.float32) if own.dtype in _NARROW else out
        _copy(total, own)
        for member, address in zip(self._members, sources, strict=True):
            member.read(address, piece)
            for so_far, addend in _small(total, piece):
                op(so_far, addend, out=so_far)
        _copy(out, total)

    def _tell(self, address: int = 0) -> None:
        for member in self._members:
            member.tell(self._call, address)

    def _end(self) -> None:
        """Everybody has read what it needs of this rank's."""
        self._tell()
        for member in self._members:
            member.hear(self._call)

    def _together(self, kind: str, whole: Tensor) -> ExitStack:
        """Around one collective."""
        if self._error is not None:
            raise self._error
        deadline = monotonic() + self.timeout_s
        self._call = Call(KINDS.index(kind), DTYPES.index(whole.dtype), whole.nbytes, deadline)
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.push(self._failed)
        return stack

    def _failed(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self._error = error
            self.close()


_OPS: dict[str, Callable[..., Tensor]] = {"sum": torch.add, "max": torch.maximum}
_NARROW = (torch.bfloat16, torch.float16)
_ALIVE: WeakSet[Nearby] = WeakSet()


def _small(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Matching pieces that torch works on alone: all at once where this thread has no others."""
    if torch.get_num_threads() == 1:
        return (tensors,)
    return zip(*(tensor.split(ALONE) for tensor in tensors), strict=True)


def _copy(to: Tensor, source: Tensor) -> None:
    """`to` = `source`, unless it is the same."""
    if to.data_ptr() != source.data_ptr():
        for there, here in _small(to, source):
            there.copy_(here)


def _let_go() -> None:
    """In a forked child: with its copies of the links, the others would not notice its parent's death."""
    for nearby in _ALIVE:
        nearby.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
