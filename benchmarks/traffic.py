"""Count the bytes that a peer's training step moves, and give peers on gloo a true reduce-scatter.

Gloo's `reduce_scatter_tensor` is an all-reduce inside and moves twice the bytes. The one here exchanges the pieces all
to all and sums them, which moves (n-1)/n of the tensor, as a reduce-scatter must.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.utils._python_dispatch import TorchDispatchMode

RING, HALF = 2.0, 1.0
FACTORS = {
    "allreduce_": RING, "allreduce_coalesced_": RING, "all_reduce": RING, "all_reduce_": RING,
    "_reduce_scatter_base_": RING, "reduce_scatter_": RING, "reduce_scatter_tensor_coalesced_": RING,
    "reduce_scatter_tensor": RING,
    "_allgather_base_": HALF, "allgather_": HALF, "allgather_into_tensor_coalesced_": HALF,
    "all_gather_into_tensor": HALF,
    "alltoall_base_": HALF, "alltoall_": HALF, "broadcast_": HALF, "reduce_": HALF,
}  # fmt: skip
"""Bytes that leave a rank on gloo, as a multiple of (n-1)/n of the whole tensor."""
NOTHING = {"barrier", "monitored_barrier_", "wait_tensor"}


class Traffic(TorchDispatchMode):
    """Mode that counts the bytes that leave this rank, in `sent`, by operator.

    Every collective goes through torch's dispatcher, no matter which library issues it.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if space in ("c10d", "_c10d_functional") and name not in NOTHING:
            if name == "alltoall_base_" and args[4]:
                self.sent[name] += _sent_in_pieces(args[1], args[4])
            else:
                whole = max(sum(t.nbytes for t in tensors(arg)) for arg in args[:2])  # the larger of result and input
                self.sent[name] += FACTORS[name] * (self.ranks - 1) / self.ranks * whole
        return func(*args, **(kwargs or {}))


def _sent_in_pieces(tensor: Tensor, rows: Sequence[int]) -> float:
    """Return the bytes of `tensor` less those of the piece that this rank keeps; `rows` are the pieces' lengths."""
    return tensor.nbytes * (1 - rows[dist.get_rank()] / sum(rows)) if sum(rows) else 0.0


def tensors(found: object) -> Iterator[Tensor]:
    """Yield the tensors in `found`, a tensor or nested lists of tensors."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for part in found:
            yield from tensors(part)


def reduce_scatter(output: Tensor, full: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
    """Set `output` to this rank's part of the sum (or mean) of `full` over the group. Blocks until it is there."""
    ranks = dist.get_world_size(group)
    parts = torch.empty_like(full).view(ranks, -1)
    dist.all_to_all_single(parts.view(-1), full.reshape(-1), group=group)
    torch.sum(parts, dim=0, out=output.view(-1))
    if op == dist.ReduceOp.AVG:
        output.div_(ranks)
    elif op != dist.ReduceOp.SUM:
        raise ValueError(f"reduce_scatter of {op}; expected a sum or a mean")


class TrueReduceScatter(ReduceScatter):
    """True reduce-scatter in the form that `FSDPModule.set_custom_reduce_scatter` takes."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a new tensor for the operation."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Reduce `input_tensor` into `output_tensor`; `async_op` is not supported."""
        if async_op:
            raise NotImplementedError("expected fully_shard to wait for its reductions; async_op is not supported")
        reduce_scatter(output_tensor, input_tensor, op, group)


def patch_reduce_scatter() -> None:
    """Replace `torch.distributed.reduce_scatter_tensor` with the true one.

    DeepSpeed's stage 3 keeps the function that it finds when it starts, so call this before.
    """

    def patched(output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False):  # type: ignore[no-untyped-def]
        if async_op:
            raise NotImplementedError("expected DeepSpeed to wait for its reductions; async_op is not supported")
        reduce_scatter(output, input, op, group)

    dist.reduce_scatter_tensor = patched


def scatter_slices(slices: Sequence[tuple[int, Tensor]], group: Any = None) -> list[Tensor]:
    """Return the sums over the group of the slices that belong to this rank, in order.

    `slices` holds (owning rank, this rank's addend), with the same owners and sizes on every rank.
    """
    ranks, here = dist.get_world_size(group), dist.get_rank(group)
    by_rank = [[part.reshape(-1) for owner, part in slices if owner == rank] for rank in range(ranks)]
    sizes = [sum(part.numel() for part in parts) for parts in by_rank]
    full = torch.cat([part for parts in by_rank for part in parts])
    got = full.new_empty(ranks * sizes[here])
    dist.all_to_all_single(got, full, [sizes[here]] * ranks, sizes, group=group)
    summed = got.view(ranks, -1).sum(dim=0) if sizes[here] else got
    return list(summed.split([part.numel() for part in by_rank[here]])) if by_rank[here] else []
