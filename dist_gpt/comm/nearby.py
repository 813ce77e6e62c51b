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
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from os import strerror

import torch
from torch import Tensor

READ_BYTES = 1 << 19
"""A piece that is summed: it stays in the cache between the two."""
NAMES = ("all_gather", "reduce_scatter", "all_reduce")
_WORD = struct.Struct("qqq")
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
class Member:
    """Another one of the group: which, its rank, its process, and the socket between us."""

    index: int
    rank: int
    pid: int
    link: socket.socket
    timeout_s: float

    def tell(self, address: int, name: int, size: int) -> None:
        """That this rank is in collective `name` of `size` bytes. Raises MemberError when it is gone."""
        try:
            self.link.send(_WORD.pack(address, name, size))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._gone() from error

    def hear(self, name: int, size: int) -> int:
        """The address in its next word, which belongs to collective `name` of `size` bytes. Raises MemberError when it
        is gone, says nothing in time, or is in another collective."""
        try:
            said = self.link.recv(_WORD.size)
        except BlockingIOError as error:
            late = f"timed out: rank {self.rank} did not come to the {NAMES[name]} within {self.timeout_s:g} s"
            raise MemberError(late) from error
        except ConnectionResetError as error:
            raise self._gone() from error
        if not said:
            raise self._gone()
        address, its_name, its_size = _WORD.unpack(said)
        if (its_name, its_size) != (name, size):
            theirs, ours = f"{NAMES[its_name]} of {its_size} bytes", f"{NAMES[name]} of {size}"
            raise MemberError(f"rank {self.rank} is in the {theirs}, this rank in the {ours}")
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
                why = strerror(ctypes.get_errno())
                raise MemberError(f"memory of rank {self.rank} (pid {self.pid}) cannot be read: {why}")
            done += got

    def _gone(self) -> MemberError:
        return MemberError(f"rank {self.rank} is gone: its connection was closed by peer")


class Nearby:
    """A group's collectives by reading. Each call blocks until nobody needs this rank's tensor any more, and belongs on
    the group's waiter. After an error every later call raises it again, and the others are told by a closed link."""

    def __init__(self, index: int, members: Sequence[Member]) -> None:
        self.index = index
        self.size = len(members) + 1
        # everybody begins with the next one: all at once would read from the same
        self._members = sorted(members, key=lambda member: (member.index - index) % self.size)
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._call = (0, 0)
        self._error: Exception | None = None

    def all_gather(self, out: Tensor, shard: Tensor) -> None:
        """out[i-th part] = member i's `shard`; one's own is there already."""
        with self._together("all_gather", out):
            parts = out.view(self.size, -1)
            self._tell(shard.data_ptr())
            for member in self._members:
                member.read(member.hear(*self._call), parts[member.index])
            self._end()

    def reduce_scatter(self, out: Tensor, full: Tensor) -> None:
        """`out` = this member's part of the sum of `full`; it may be that part of `full` itself, and no other."""
        with self._together("reduce_scatter", full):
            own = full.view(self.size, -1)[self.index]
            self._tell(full.data_ptr())
            self._reduce(out.view(-1), own, self.index * own.nbytes, torch.add)
            self._end()

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        """In place: everybody reduces a part, then reads the others' parts."""
        with self._together("all_reduce", tensor):
            flat = tensor.view(-1)
            width = -(-flat.numel() // self.size)
            parts = [flat[i * width : (i + 1) * width] for i in range(self.size)]
            offsets = [i * width * flat.element_size() for i in range(self.size)]
            own = parts[self.index]
            self._tell(tensor.data_ptr())
            addresses = self._reduce(own, own, offsets[self.index], _OPS[op])
            self._tell()
            for member, address in zip(self._members, addresses, strict=True):
                member.hear(*self._call)  # its part is reduced, and it has read this rank's addend
                member.read(address + offsets[member.index], parts[member.index])
            self._end()

    def close(self) -> None:
        """Let go of the links; who waits on one of them is woken."""
        for member in self._members:
            with suppress(OSError):
                member.link.shutdown(socket.SHUT_RDWR)
            member.link.close()

    def _reduce(self, out: Tensor, own: Tensor, offset: int, op: Callable[..., Tensor]) -> list[int]:
        """`out` = `own` and what lies `offset` bytes into each of the others' tensors. Returns where these begin.

        In 2 bytes it is summed in float32 and rounded once. The order is this member's own, the same in every run."""
        addresses = [member.hear(*self._call) for member in self._members]
        if self._piece.nbytes < min(READ_BYTES, own.nbytes):
            self._piece = torch.empty(min(READ_BYTES, own.nbytes), dtype=torch.uint8)
        step = READ_BYTES // own.element_size()
        for start in range(0, own.numel(), step):
            target, addend = out[start : start + step], own[start : start + step]
            piece = self._piece[: addend.nbytes].view(own.dtype)
            total = addend.float() if own.element_size() == 2 else target
            if total is target and out is not own:
                target.copy_(addend)
            for member, address in zip(self._members, addresses, strict=True):
                member.read(address + offset + start * own.element_size(), piece)
                op(total, piece, out=total)
            if total is not target:
                target.copy_(total)
        return addresses

    def _tell(self, address: int = 0) -> None:
        for member in self._members:
            member.tell(address, *self._call)

    def _end(self) -> None:
        """Everybody has read what it needs of this rank's."""
        self._tell()
        for member in self._members:
            member.hear(*self._call)

    def _together(self, name: str, tensor: Tensor) -> ExitStack:
        """Around one collective."""
        if self._error is not None:
            raise self._error
        self._call = NAMES.index(name), tensor.nbytes
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.push(self._failed)
        return stack

    def _failed(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self._error = error
            self.close()


_OPS: dict[str, Callable[..., Tensor]] = {"sum": torch.add, "max": torch.maximum}
