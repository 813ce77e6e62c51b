"""Flat buffers on a rank, laid out by `plan.buckets`, and the collectives on them.

One parameter and one gradient buffer per bucket. Parameters and gradients of the model are views into them, so a
reduction or a gather is one collective in place and nothing is packed or unpacked.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from dist_gpt.comm.group import Pending
from dist_gpt.comm.mesh import Mesh
from dist_gpt.config.schema import Config
from dist_gpt.parallel.sink import GradSink
from dist_gpt.params import Param
from dist_gpt.plan.buckets import Bucket, state_shards

TORCH_DTYPE = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FlatBucket:
    """Buffers of one bucket: `parameters` and `gradients`, each (padded,), and this rank's shard of them."""

    def __init__(self, bucket: Bucket, shards: int, index: int, dtype: torch.dtype, device: torch.device) -> None:
        self.bucket = bucket
        self.shards = shards
        self.start, self.stop = bucket.shard(shards, index)
        self.parameters = torch.empty(bucket.padded, dtype=dtype, device=device)
        self.gradients = torch.empty(bucket.padded, dtype=dtype, device=device)
        for buffer in (self.parameters, self.gradients):
            buffer[bucket.numel :].zero_()  # padding is summed and stepped with the rest: keep it finite
        self.pending: list[Pending] = []

    @property
    def parameter_shard(self) -> Tensor:
        return self.parameters[self.start : self.stop]

    @property
    def gradient_shard(self) -> Tensor:
        return self.gradients[self.start : self.stop]

    def start_reduction(self, mesh: Mesh) -> None:
        """Sum gradients: partial ones over tp (before, since the data sum mixes ranks), then all over data.

        Afterwards `gradient_shard` is final; the rest of the buffer is scratch.
        """
        if mesh.tp.size > 1 and self.bucket.partial_numel:
            mesh.tp.all_reduce(self.gradients[: self.bucket.partial_numel]).wait()
        if self.shards == 1:
            self.pending.append(mesh.data.all_reduce(self.gradients))
        else:
            self.pending.append(mesh.data.reduce_scatter(self.gradient_shard, self.gradients))

    def finish_reduction(self) -> None:
        for pending in self.pending:
            pending.wait()
        self.pending.clear()

    def start_gather(self, mesh: Mesh) -> Pending:
        """Collect the stepped shards into `parameters`."""
        return mesh.data.all_gather(self.parameters, self.parameter_shard)


class FlatBuffers:
    """All buckets of a rank, and the parameters that view into them."""

    def __init__(
        self, config: Config, buckets: tuple[Bucket, ...], data_index: int, sink: GradSink, device: torch.device
    ) -> None:
        shards = state_shards(config)
        dtype = TORCH_DTYPE[config.train.dtype]
        index = data_index if shards > 1 else 0
        self.sink = sink
        self.device = device
        self.buckets = [FlatBucket(b, shards, index, dtype, device) for b in buckets]
        self._place = {
            slot.param.name: (flat, slot) for flat, b in zip(self.buckets, buckets, strict=True) for slot in b.slots
        }

    def new(self, param: Param) -> Parameter:
        """A parameter that views into its bucket, its gradient bound to the sink. Its values are not set."""
        flat, slot = self._place[param.name]
        stop = slot.start + slot.numel
        parameter = Parameter(flat.parameters[slot.start : stop].view(slot.shape))
        self.sink.bind(parameter, flat.gradients[slot.start : stop].view(slot.shape))
        return parameter
