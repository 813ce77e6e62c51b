"""Collectives of a group on one node, whose members read each other's memory.

What gloo sends over loopback is copied into the kernel and out of it again, piece by piece, by threads that wake each
other. Here the member that needs a tensor reads it in place, once (process_vm_readv), and sums while the piece is in
the cache. A socket between every two members carries the control words: where the tensor is, and that it has been
read. Where the system forbids such reads (another user, a container, Linux's Yama), all members find out when the
group is made, and gloo carries everything.

All members of a collective send the same words in one order, on one thread per group: a word that names its collective
is enough to tell them apart.
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
"""Bytes of a piece that is summed: it stays in the cache between the read and the sum."""
ALONE = 1 << 15
"""Values that torch processes on one thread (its grain size): a waiter must not start a thread team of its own."""
KINDS = ("all_gather", "reduce_scatter (sum)", "all_reduce (sum)", "all_reduce (max)")
DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_WORD = struct.Struct("qqqq")
_libc = ctypes.CDLL(None, use_errno=True)
process_vm_readv = getattr(_libc, "process_vm_readv", None)
"""Function of Linux's C library; None on other systems."""
if process_vm_readv is not None:
    process_vm_readv.restype = ctypes.c_ssize_t


class _Stretch(ctypes.Structure):
    """C's struct iovec: a piece of memory, with its length in bytes."""

    _fields_ = [("start", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class MemberError(RuntimeError):
    """Another member is gone, late, unreadable, or in another collective."""


@dataclass(frozen=True)
class Call:
    """Collective: index in KINDS, index in DTYPES, bytes of the whole tensor, and deadline (`time.monotonic`)."""

    kind: int
    dtype: int
    size: int
    deadline: float

    @property
    def left_s(self) -> float:
        """Seconds until the deadline, at least 1 ms."""
        return max(1e-3, self.deadline - monotonic())

    def __str__(self) -> str:
        return said(self.kind, self.dtype, self.size)


def said(kind: int, dtype: int, size: int) -> str:
    """Describe a collective in words."""
    return f"{KINDS[kind]} of {size} bytes of {str(DTYPES[dtype]).removeprefix('torch.')}"


@dataclass(frozen=True)
class Member:
    """Another member of the group: its index, rank and process, and the socket to it."""

    index: int
    rank: int
    pid: int
    link: socket.socket

    def tell(self, call: Call, address: int) -> None:
        """Tell the member that this rank is in `call`, with an address. Raise MemberError if the member is gone."""
        try:
            self.link.send(_WORD.pack(address, call.kind, call.dtype, call.size))
        except OSError as error:
            raise self._gone() from error

    def hear(self, call: Call) -> int:
        """Return the address in the member's next word, which must belong to `call`.

        Raise MemberError if the member is gone, sends nothing in time, or is in another collective.
        """
        try:
            self.link.settimeout(call.left_s)
            word = self.link.recv(_WORD.size)
        except TimeoutError as error:
            raise MemberError(f"timed out: rank {self.rank} did not start or did not finish the {call}") from error
        except OSError as error:
            raise self._gone() from error
        if not word:
            raise self._gone()
        address, *theirs = _WORD.unpack(word)
        if theirs != [call.kind, call.dtype, call.size]:
            raise MemberError(f"rank {self.rank} is in the {said(*theirs)}, this rank in the {call}")
        return int(address)

    def read(self, address: int, into: Tensor) -> None:
        """Fill `into` (contiguous) from the member's memory at `address`. Raise MemberError if it cannot be read."""
        done, size, one = 0, into.nbytes, ctypes.c_ulong(1)
        while done < size:
            here, there = _Stretch(into.data_ptr() + done, size - done), _Stretch(address + done, size - done)
            got = process_vm_readv(  # type: ignore[misc]  # where it is None no members connect
                self.pid, ctypes.byref(here), one, ctypes.byref(there), one, ctypes.c_ulong(0)
            )
            if got <= 0:
                why = os.strerror(ctypes.get_errno())
                raise MemberError(f"memory of rank {self.rank} (pid {self.pid}) cannot be read: {why}")
            done += got

    def _gone(self) -> MemberError:
        return MemberError(f"rank {self.rank} has exited or failed: it closed its connection")


class Nearby:
    """Collectives of a group by reading memory. A call blocks until no member needs this rank's tensor any more.

    Calls belong on the group's waiter. After an error every later call raises it again; closed links tell the others.
    """

    def __init__(self, index: int, members: Sequence[Member], timeout_s: float) -> None:
        self.index, self.timeout_s = index, timeout_s
        self.size = len(members) + 1
        # each begins with the next one, so that not all read from the same
        self._members = sorted(members, key=lambda member: (member.index - index) % self.size)
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._call = Call(0, 0, 0, 0.0)
        self._error: Exception | None = None
        _ALIVE.add(self)

    def all_gather(self, out: Tensor, shard: Tensor) -> None:
        """Write member i's `shard` to the i-th part of `out`; this member's own is there already."""
        with self._together("all_gather", out):
            parts = out.view(self.size, -1)
            self._tell(shard.data_ptr())
            for member in self._members:
                member.read(member.hear(self._call), parts[member.index])
            self._end()

    def reduce_scatter(self, out: Tensor, full: Tensor) -> None:
        """Write this member's part of the sum of `full` to `out`, which may be that part of `full` and no other."""
        with self._together("reduce_scatter (sum)", full):
            own = full.view(self.size, -1)[self.index]
            self._tell(full.data_ptr())
            self._reduce(out.view(-1), own, self.index * own.nbytes, "sum")
            self._end()

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        """Reduce `tensor` in place: each member reduces one part, then reads the others' parts."""
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
        """Close this process's descriptors of the links, without shutting the links down."""
        for member in self._members:
            member.link.close()

    def close(self) -> None:
        """Shut the links down, which wakes every thread that waits on one of them."""
        for member in self._members:
            with suppress(OSError):
                member.link.shutdown(socket.SHUT_RDWR)
            member.link.close()

    def _reduce(self, out: Tensor, own: Tensor, offset: int, op: str) -> list[int]:
        """Reduce `own` and the others' data, `offset` bytes into their tensors, to `out`; return where these begin.

        16-bit values are summed in float32 and rounded once. Each member has its own order, the same in every run.
        """
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
        """Wait until all members have read what they need of each other."""
        self._tell()
        for member in self._members:
            member.hear(self._call)

    def _together(self, kind: str, whole: Tensor) -> ExitStack:
        """Return the context of one collective; raise the error of an earlier one, if any."""
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
    """Return matching pieces that torch processes on one thread: the whole tensors where it has no other threads."""
    if torch.get_num_threads() == 1:
        return (tensors,)
    return zip(*(tensor.split(ALONE) for tensor in tensors), strict=True)


def _copy(to: Tensor, source: Tensor) -> None:
    """Copy `source` to `to`, unless both are the same memory."""
    if to.data_ptr() != source.data_ptr():
        for there, here in _small(to, source):
            there.copy_(here)


def _let_go() -> None:
    """Close a forked child's copies of the links, which would hide its parent's death from the other members."""
    for nearby in _ALIVE:
        nearby.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
