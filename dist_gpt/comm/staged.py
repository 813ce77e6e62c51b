"""Run gloo on GPU tensors, through host memory: several ranks can share one GPU, which NCCL refuses.

Gloo cannot send or receive GPU tensors, and which of its collectives accept them differs between versions of torch. So
every operation works on copies in (pinned) host memory: what is sent is copied when the operation is issued, what is
received when it is waited for. Members make the same calls with the same bytes as on the CPU, so the ledger counts the
same, and the sums are gloo's own.

This is for checks of correctness, not for training: the host waits for the device in every call. No command uses it;
a caller must construct `StagedBackends`. Members do not read each other's memory (`comm.nearby` reads host memory
only). Copies run on the current stream of the thread that waits, which may be the group's own thread: all work on the
tensors must be on the default stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_gpt.comm.mesh import GlooBackends, GlooGroup


class StagedGroup(GlooGroup):
    """Gloo group whose tensors may lie on a device. `stages_all`: copy those on the CPU as well, for tests."""

    stages_all = False

    def host_copy(self, tensor: Tensor, filled: bool) -> Tensor:
        """Return a host buffer for `tensor` (contiguous), with its values if `filled`; return a CPU tensor as it is."""
        if not tensor.is_contiguous():
            raise ValueError(f"{tuple(tensor.shape)} with strides {tensor.stride()}: only contiguous tensors are sent")
        if tensor.device.type == "cpu" and not self.stages_all:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if filled:
            host.copy_(tensor)
        return host

    def staged(
        self, reads: Sequence[Tensor], writes: Sequence[Tensor], start: Callable[[list[Tensor], list[Tensor]], Any]
    ) -> StagedWork:
        """Call `start` with host copies of `reads` and buffers for `writes`; a tensor in both has a single copy."""
        hosts = {id(tensor): self.host_copy(tensor, True) for tensor in reads}
        for tensor in writes:
            if id(tensor) not in hosts:
                hosts[id(tensor)] = self.host_copy(tensor, False)
        into = [hosts[id(tensor)] for tensor in writes]
        work = start([hosts[id(tensor)] for tensor in reads], into)
        return StagedWork(work, list(zip(writes, into, strict=True)), list(hosts.values()))

    def allreduce(self, tensors: list[Tensor], options: dist.AllreduceOptions) -> StagedWork:
        """All-reduce `tensors` through host memory."""
        call = super().allreduce  # type: ignore[misc]
        return self.staged(tensors, tensors, lambda reads, writes: call(writes, options))

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions) -> StagedWork:
        """Broadcast `tensors` through host memory."""
        call = super().broadcast  # type: ignore[misc]
        return self.staged(tensors, tensors, lambda reads, writes: call(writes, options))

    def _allgather_base(self, out: Tensor, shard: Tensor) -> StagedWork:
        call = super()._allgather_base  # type: ignore[misc]
        return self.staged([shard], [out], lambda reads, writes: call(writes[0], reads[0]))

    def alltoall_base(self, out: Tensor, full: Tensor, out_sizes: list[int], sizes: list[int]) -> StagedWork:
        """Exchange parts of `full` through host memory."""
        call = super().alltoall_base  # type: ignore[misc]
        return self.staged([full], [out], lambda reads, writes: call(writes[0], reads[0], out_sizes, sizes))

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> StagedWork:
        """Send `tensors` to member `destination` through host memory."""
        call = super().send
        return self.staged(tensors, [], lambda reads, writes: call(reads, destination, tag))

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> StagedWork:
        """Receive `tensors` from member `source` through host memory."""
        call = super().recv
        return self.staged([], tensors, lambda reads, writes: call(writes, source, tag))


class StagedWork:
    """Operation on host copies. `wait` finishes it and copies the results back; it may be called again."""

    def __init__(self, work: Any, results: list[tuple[Tensor, Tensor]], held: list[Tensor]) -> None:
        self._work, self._results = work, results
        self._held = held  # host memory has to live until the operation is over
        self.is_completed = work.is_completed

    def wait(self) -> None:
        """Wait for the operation and copy its results back."""
        if self._work is None:
            return
        self._work.wait()
        for tensor, host in self._results:
            if tensor is not host:
                tensor.copy_(host)
        self._work, self._results, self._held = None, [], []


class StagedBackends(GlooBackends):
    """Factory of gloo groups for tensors on a device; members never read each other's memory."""

    def __init__(
        self, store: dist.Store, host: str, timeout_s: float, left_s: Callable[[], float] | None = None,
        stages_all: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(store, host, timeout_s, left_s=left_s, one_node=True, single_copy=False)
        self.stages_all = stages_all

    def make_group(self, store: dist.Store, index: int, size: int, options: Any) -> StagedGroup:
        """Return a new group, which the caller configures further."""
        group = StagedGroup(store, index, size, options)
        group.stages_all = self.stages_all
        return group
