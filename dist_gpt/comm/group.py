"""Group of ranks along one axis, and its collectives.

Every collective goes through `Group._issue`, which records it in the ledger. A group of size 1 is the identity and
records nothing. Collectives return a `Pending`, whose `wait` makes the result usable (on CUDA it orders the current
stream after it, without blocking the host).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_gpt.comm.cma import Nearby
from dist_gpt.comm.ledger import Ledger, Numbered
from dist_gpt.comm.p2p_collectives import Exchange, WaitedWork, Waiter, add_up, start_exchange
from dist_gpt.events import scatters_directly

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Pending:
    """Issued collective. `finish`, the local part of an emulated one, runs once, after the backend is done."""

    __slots__ = ("_finish", "_ledger", "_record", "_work")

    def __init__(
        self,
        work: Any = None,
        finish: Callable[[], object] | None = None,
        ledger: Ledger | None = None,
        record: Numbered | None = None,
    ) -> None:
        self._work = work
        self._finish = finish
        self._ledger = ledger
        self._record = record

    def wait(self, and_for: Callable[[], object] | None = None) -> None:
        """Wait until the backend is done, `and_for` has returned, and the result can be used. May be called again."""
        ledger, record = self._ledger, self._record
        if ledger is not None and record is not None:
            self._ledger = self._record = None
            ledger.waits(record)
            self._until_done(and_for)
            ledger.woken(record)
            self._do_rest()
            ledger.waited(record)
        else:
            self._until_done(and_for)
            self._do_rest()

    def _until_done(self, and_for: Callable[[], object] | None) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
        if and_for is not None:
            and_for()

    def _do_rest(self) -> None:
        if self._finish is not None:
            self._finish()
            self._finish = None

    def done(self) -> bool:
        """Return whether the backend is done; never block."""
        return self._work is None or self._work.is_completed()


class Group:
    """Ranks along `axis`, this rank among them. `backend` is a c10d process group, or None for a single rank.

    A group with a `direction` ('f' or 'b') is a pipeline edge from its first rank to its second.
    """

    def __init__(
        self, axis: str, ranks: tuple[int, ...], rank: int, backend: Any, ledger: Ledger, direction: str = ""
    ) -> None:
        if len(ranks) > 1 and backend is None:
            raise ValueError(f"group {axis} {ranks}: no backend for {len(ranks)} ranks")
        self.axis = axis
        self.ranks = ranks
        self.index = ranks.index(rank)
        self.backend = backend
        self.ledger = ledger
        self.channel = ledger.channel(axis, ranks, direction) if len(ranks) > 1 else -1
        self.scratch_bytes = self.peak_scratch_bytes = 0  # receive buffers of running emulated operations
        # gloo's own reduce-scatter is an all-reduce inside: twice the wire bytes
        self.emulates_reduce_scatter = backend is not None and backend.name() == "gloo"
        # gloo's own all-gather copies through another buffer; over several nodes its ring sends less between them
        self.gathers_directly = self.emulates_reduce_scatter and (len(ranks) == 2 or backend.one_node)
        self._waiter = Waiter() if self.emulates_reduce_scatter else None
        self.near: Nearby | None = getattr(backend, "near", None)  # set where members read each other's memory
        self.refusal: str = getattr(backend, "refusal", "")

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return len(self.ranks)

    def _issue(
        self, op: str, payload: int, start: Callable[[], Any], finish: Callable[[], object] | None = None
    ) -> Pending:
        """Record and start a collective; every collective goes through here."""
        record = self.ledger.issue(self.axis, op, payload, self.channel)
        work = start()
        self.ledger.issued(record, work, emulated=finish is not None)
        return Pending(work, finish, self.ledger, record)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Pending:
        """Reduce `tensor` (contiguous) in place. Never use max on floats that can be NaN: gloo drops them."""
        if self.size == 1:
            return Pending()
        if self.near is not None:
            return self._issue("all_reduce", tensor.nbytes, self._reading(self.near.all_reduce, tensor, op))
        options = dist.AllreduceOptions()
        options.reduceOp = _REDUCTIONS[op]  # type: ignore[assignment]
        return self._issue("all_reduce", tensor.nbytes, lambda: self.backend.allreduce([tensor], options))

    def all_gather(self, out: Tensor, shard: Tensor) -> Pending:
        """Write member i's `shard` to the i-th part of `out` along dim 0. `shard` may be this rank's part of `out`."""
        if self.size == 1:
            if out.data_ptr() != shard.data_ptr():
                out.copy_(shard.view_as(out))
            return Pending()
        self._check_parts(out, shard)
        if self.near is not None:
            self._own_part(out, shard)
            return self._issue("all_gather", out.nbytes, self._reading(self.near.all_gather, out, shard))
        if self.gathers_directly:
            return self._issue("all_gather", out.nbytes, lambda: self._send_to_all(out, shard))
        return self._issue("all_gather", out.nbytes, lambda: self.backend._allgather_base(out, shard))

    def _send_to_all(self, out: Tensor, shard: Tensor) -> Any:
        parts = out.view(self.size, -1)
        self._own_part(out, shard)
        return self._exchange([parts[i] for i in self._others], [shard for _ in self._others])

    def _check_parts(self, whole: Tensor, part: Tensor) -> None:
        """Raise ValueError unless `whole` has `size` parts like `part`; reads and sends do not check that."""
        if part.numel() * self.size != whole.numel() or part.dtype != whole.dtype:
            parts = f"{self.size} parts of {part.numel()} {part.dtype}"
            raise ValueError(f"group {self}: {parts} are not {whole.numel()} {whole.dtype}")

    def _own_part(self, out: Tensor, shard: Tensor) -> None:
        """Copy `shard` to this rank's part of a gather's result, unless it lies there."""
        own = out.view(self.size, -1)[self.index]
        if own.data_ptr() != shard.data_ptr():
            own.copy_(shard.view(-1))

    def _reading(self, call: Callable[..., object], *arguments: object) -> Callable[[], WaitedWork]:
        """Return a function that starts `call`, a method of `Nearby`, on the waiter; tensors must be contiguous."""
        if self._waiter is None:
            raise ValueError(f"group {self}: only members on gloo read each other's memory")
        if not all(tensor.is_contiguous() for tensor in arguments if isinstance(tensor, Tensor)):
            raise ValueError(f"group {self}: tensors must be contiguous")
        return partial(self._waiter.watch, partial(call, *arguments), self.size - 1)

    @property
    def _others(self) -> list[int]:
        return [i for i in range(self.size) if i != self.index]

    def _exchange(self, receive: Iterable[Tensor], send: Iterable[Tensor]) -> Exchange:
        """Receive from and send to each of the other members, in their order."""
        if self._waiter is None:
            raise ValueError(f"group {self}: exchanges need gloo")
        return start_exchange(self.backend, self._others, receive, send, self._waiter)

    def reduce_scatter(self, out: Tensor, full: Tensor) -> Pending:
        """Write this rank's part, along dim 0, of the sum of `full` to `out`, which may be that part of `full`."""
        if self.size == 1:
            if out.data_ptr() != full.data_ptr():
                out.copy_(full.view_as(out))
            return Pending()
        self._check_parts(full, out)
        if self.near is not None:
            return self._issue("reduce_scatter", full.nbytes, self._reading(self.near.reduce_scatter, out, full))
        if self.emulates_reduce_scatter:
            return self._reduce_scatter_from_parts(out, full)
        options = dist.ReduceScatterOptions()
        options.reduceOp = dist.ReduceOp.SUM  # type: ignore[assignment]
        return self._issue("reduce_scatter", full.nbytes, lambda: self.backend._reduce_scatter_base(out, full, options))

    def _reduce_scatter_from_parts(self, out: Tensor, full: Tensor) -> Pending:
        """Send every member its part and sum the received ones: only (n-1)/n of the bytes go on the wire."""
        directly = scatters_directly(full.nbytes, self.size)
        parts = full.new_empty((self.size - directly, out.numel()))
        self.scratch_bytes += parts.nbytes
        self.peak_scratch_bytes = max(self.peak_scratch_bytes, self.scratch_bytes)
        mine = full.view(self.size, -1)

        def start() -> Any:
            if directly:
                return self._exchange(parts, [mine[i] for i in self._others])
            return self.backend.alltoall_base(parts.view_as(full), full, [], [])

        def finish() -> None:
            total = out.view(-1)
            if directly:
                add_up([mine[self.index], *parts], total)
            else:
                torch.sum(parts, dim=0, out=total)
            self.scratch_bytes -= parts.nbytes

        return self._issue("reduce_scatter", full.nbytes, start, finish)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Pending:
        """Broadcast `tensor` of the group's member `root` to all members, in place."""
        if self.size == 1:
            return Pending()
        options = dist.BroadcastOptions()
        options.rootRank = root
        return self._issue("broadcast", tensor.nbytes, lambda: self.backend.broadcast([tensor], options))

    def send(self, tensor: Tensor) -> Pending:
        """Send `tensor` to the other rank of a pair. It must live until the result is done."""

        def start() -> Any:
            work = self.backend.send([tensor], 1 - self.index, 0)
            return self._waiter.watch(work.wait) if self._waiter is not None else work

        return self._issue("send", tensor.nbytes, start)

    def recv(self, tensor: Tensor) -> Pending:
        """Receive from the other rank of a pair into `tensor`."""
        return self._issue("recv", 0, lambda: self.backend.recv([tensor], 1 - self.index, 0))

    def barrier(self) -> None:
        """Wait until every member is here. For control traffic only."""
        if self.size > 1:
            self._issue("barrier", 0, lambda: self.backend.barrier(dist.BarrierOptions())).wait()

    def close(self) -> None:
        """Shut the backend down; a process that exits without it sometimes aborts (pytorch PR 179291)."""
        if self.near is not None:
            self.near.close()  # wakes the waiter if it is still in a call
            self.near = None
        if self._waiter is not None:
            self._waiter.close()
        if self.backend is not None and hasattr(self.backend, "shutdown"):
            self.backend.shutdown()
        self.backend = None

    def __repr__(self) -> str:
        return f"Group({self.axis}, ranks {self.ranks}, index {self.index})"
