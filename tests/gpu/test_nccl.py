"""Test NCCL on one GPU: a group of one rank is made, used and released like larger ones."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dist_gpt.comm.mesh import NcclBackends

DEVICE = torch.device("cuda", 0)


def test_a_group_of_one_rank_sums_gathers_and_ends() -> None:
    backend = NcclBackends(dist.HashStore(), DEVICE, 60.0).connect("data", (0,), 0)
    try:
        assert backend.name() == "nccl"
        x, out, part = (torch.arange(8.0, device=DEVICE) for _ in range(3))
        backend.allreduce([x], dist.AllreduceOptions()).wait()
        backend._allgather_base(out.zero_(), part).wait()
        options = dist.ReduceScatterOptions()
        options.reduceOp = dist.ReduceOp.SUM  # type: ignore[assignment]
        scattered = torch.empty_like(x)
        backend._reduce_scatter_base(scattered, part, options).wait()
        for got in (x, out, scattered):
            assert torch.equal(got.cpu(), torch.arange(8.0))
    finally:
        backend.shutdown()
