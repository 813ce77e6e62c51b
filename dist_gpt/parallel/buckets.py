"""Flat buffers of a rank, laid out by `plan.buckets`, and the collectives on them.

There is one parameter and one gradient buffer per bucket. The model's parameters and gradients are views into them, so
a reduction or a gather is one collective in place, without packing. Where ZeRO keeps only a shard, the whole buffer
exists only from one step of the list to another: its storage is freed and allocated again while the views stay valid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from dist_gpt.comm.group import Pending
from dist_gpt.comm.mesh import Mesh
from dist_gpt.parallel.sink import GradSink
from dist_gpt.params import Param
from dist_gpt.plan.buckets import Bucket, Slot
from dist_gpt.plan.buffers import REDUCTIONS_AHEAD
from dist_gpt.plan.precision import Precision
from dist_gpt.plan.steps import RankPlan

TORCH_DTYPE = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Whole:
    """Flat buffer with a view for each slot of its bucket; it has storage always, or only while it is taken.

    Storage that is taken is counted in `tally`.
    """

    def __init__(self, bucket: Bucket, dtype: torch.dtype, device: torch.device, tally: Tally, always: bool) -> None:
        self.tensor = torch.empty(bucket.padded, dtype=dtype, device=device)
        self.views = [self.tensor[s.start : s.start + s.numel].view(s.shape) for s in bucket.slots]
        self.bytes, self.tally, self.always, self.there = self.tensor.nbytes, tally, always, always
        if always:
            self.tensor[bucket.numel :].zero_()  # padding is summed and stepped with the rest: keep it finite
        else:
            self.tensor.untyped_storage().resize_(0)

    def take(self) -> None:
        """Allocate the storage, uninitialised, unless it exists."""
        if not self.there:
            self.there = True
            self.tensor.untyped_storage().resize_(self.bytes)
            self.tally.add(self.bytes)

    def give_back(self) -> None:
        """Free the storage, unless it is always kept."""
        if self.there and not self.always:
            self.there = False
            self.tensor.untyped_storage().resize_(0)
            self.tally.add(-self.bytes)


class Tally:
    """Live and peak bytes of the transient buffers on this rank."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def add(self, size: int) -> None:
        """Count `size` more bytes; a negative size is freed."""
        self.live += size
        self.peak = max(self.peak, self.live)


class FlatBucket:
    """Buffers of one bucket.

    `parameters` and `gradients`, each (padded,), are whole; `parameter_shard` and `gradient_shard`, each
    (padded / shards,), are this rank's piece: views of the whole buffer if that is always kept.
    """

    def __init__(self, bucket: Bucket, plan: RankPlan, device: torch.device, tally: Tally) -> None:
        self.bucket, self.stage, self.shards, self.tally = bucket, plan.stage, plan.shards, tally
        self.start, self.stop = bucket.shard(plan.shards, plan.shard_index)
        p: Precision = plan.precision
        compute, gradient = TORCH_DTYPE[p.compute], TORCH_DTYPE[p.gradient]
        self.reduce_dtype = TORCH_DTYPE[p.reduce] if p.casts and plan.layout.data > 1 else None
        width = self.stop - self.start
        self.keeps_parameters, self.keeps_gradients = self.stage < 3, self.stage < 2
        self._parameters = Whole(bucket, compute, device, tally, self.keeps_parameters)
        self._gradients = Whole(bucket, gradient, device, tally, self.keeps_gradients)
        self.parameters, self.gradients = self._parameters.tensor, self._gradients.tensor
        self.parameter_shard = (
            self.parameters[self.start : self.stop]
            if self.keeps_parameters
            else torch.zeros(width, dtype=compute, device=device)
        )
        self.gradient_shard = (
            self.gradients[self.start : self.stop]
            if self.keeps_gradients
            else torch.zeros(width, dtype=gradient, device=device)
        )
        self._reducing: Pending | None = None
        self._cast: Tensor | None = None
        self._gathering = Pending()
        self.accumulated = False  # the shard holds gradients of this training step

    def views(self, slot: Slot) -> tuple[Tensor, Tensor]:
        """Return the parameter and the gradient of `slot` as views of the whole buffers."""
        number = self.bucket.slots.index(slot)
        return self._parameters.views[number], self._gradients.views[number]

    # --- parameters ----------------------------------------------------------------------------------------------

    def start_gather(self, mesh: Mesh) -> None:
        """Start to gather the shards into `parameters`."""
        self._parameters.take()
        self._gathering = mesh.shard.all_gather(self.parameters, self.parameter_shard)

    def ready(self) -> None:
        """Wait until `parameters` can be read."""
        self._gathering.wait()

    def free(self) -> None:
        """Wait for the gather, then free the gathered parameters."""
        self.ready()
        self._parameters.give_back()

    def load(self, slot: Slot, value: Tensor) -> None:
        """Set the parameter in `slot` to `value`, of this tp rank's shape."""
        if self.keeps_parameters:
            self.parameters[slot.start : slot.start + slot.numel].copy_(value.reshape(-1))
        self.load_shard(self.parameter_shard, slot, value)

    def load_shard(self, shard: Tensor, slot: Slot, value: Tensor) -> None:
        """Copy the part of `value` that this rank owns to its place in `shard` (padded / shards,)."""
        start, stop = max(slot.start, self.start), min(slot.start + slot.numel, self.stop)
        if start < stop:
            piece = value.reshape(-1)[start - slot.start : stop - slot.start]
            shard[start - self.start : stop - self.start].copy_(piece)

    # --- gradients -----------------------------------------------------------------------------------------------

    def open_gradients(self) -> bool:
        """Make room for a micro-batch's whole gradients; return whether it was allocated now."""
        if self.keeps_gradients:
            return False
        self.finish_reduction()  # of the previous micro-batch
        if self._gradients.there:
            return False
        self._gradients.take()
        self.gradients[self.bucket.numel :].zero_()
        return True

    def start_reduction(self, mesh: Mesh) -> None:
        """Start to sum gradients: partial ones over tp (first, since the data sum mixes ranks), then all over data.

        After `finish_reduction`, `gradient_shard` is summed over the ranks that share the state.
        """
        if mesh.tp.size > 1 and self.bucket.partial_numel:
            mesh.tp.all_reduce(self.gradients[: self.bucket.partial_numel]).wait()
        source = self.gradients
        if self.reduce_dtype is not None:
            source = self._cast = self.gradients.to(self.reduce_dtype)
            self.tally.add(source.nbytes)
            self._gradients.give_back()
        if not self.stage:
            self._reducing = mesh.data.all_reduce(source)
        else:
            self._reducing = mesh.shard.reduce_scatter(source[self.start : self.stop], source)

    def finish_reduction(self) -> None:
        """Wait until the sum is in `gradient_shard`, added to earlier micro-batches' if only the shard is kept."""
        if self._reducing is None:
            return
        self._reducing.wait()
        self._reducing = None
        source = self._cast if self._cast is not None else self.gradients
        if not self.keeps_gradients or self._cast is not None:
            summed = source[self.start : self.stop]
            if not self.keeps_gradients and self.accumulated:
                self.gradient_shard.add_(summed)
            else:
                self.gradient_shard.copy_(summed)
        self.accumulated = True
        if self._cast is not None:
            self.tally.add(-self._cast.nbytes)
            self._cast = None
        self._gradients.give_back()


class FlatBuffers:
    """All buckets of a rank, and the parameters that are views into them."""

    def __init__(self, plan: RankPlan, sink: GradSink, device: torch.device) -> None:
        self.sink, self.device, self.tally = sink, device, Tally()
        self.buckets = [FlatBucket(b, plan, device, self.tally) for b in plan.buckets]
        self._place = {slot.param.name: (flat, slot) for flat in self.buckets for slot in flat.bucket.slots}
        self._members: dict[int, list[Parameter]] = {}
        self._of_block = {
            (flat.bucket.chunk, block): [other for other in self.buckets if other.bucket.chunk == flat.bucket.chunk
                                         and block in other.bucket.blocks]
            for flat in self.buckets for block in flat.bucket.blocks
        }  # fmt: skip
        self.stage = plan.stage
        self._under_way: list[FlatBucket] = []  # reductions in progress, the oldest first
        sink.finishes_later = plan.stage >= 2

    def new(self, param: Param) -> Parameter:
        """Return a parameter that is a view into its bucket, uninitialised, with its gradient bound to the sink."""
        flat, slot = self._place[param.name]
        value, gradient = flat.views(slot)
        parameter = Parameter(value)
        self.sink.bind(parameter, gradient)
        self._members.setdefault(flat.bucket.index, []).append(parameter)
        return parameter

    def place(self, param: Param) -> tuple[FlatBucket, Slot]:
        """Return the bucket and the slot of a parameter."""
        return self._place[param.name]

    def tensors(self) -> dict[str, Tensor]:
        """Return what this rank has stepped, by name: its parameters or, if sharded, its piece of each bucket."""
        found = {}
        for flat in self.buckets:
            if flat.stage:
                found[f"bucket.{flat.bucket.index}"] = flat.parameter_shard
                continue
            for slot in flat.bucket.slots:
                found[slot.param.name] = flat.views(slot)[0]
        return found

    def begin(self) -> None:
        """Start a training step: the first write of each gradient overwrites."""
        self.sink.begin()
        for flat in self.buckets:
            flat.accumulated = False

    def ready(self, chunk: int, block: int) -> None:
        """Wait until the parameters of `block` can be read."""
        for flat in self._of_block.get((chunk, block), ()):
            flat.ready()

    def open_gradients(self, chunk: int, block: int) -> None:
        """Make room for the gradients of `block`; the first write to new room overwrites."""
        for flat in self._of_block.get((chunk, block), ()):
            if flat.open_gradients():
                self.sink.expect(self._members[flat.bucket.index])

    def reduce(self, index: int, mesh: Mesh) -> None:
        """Start the reduction of bucket `index`.

        Earlier reductions but the last REDUCTIONS_AHEAD are finished first, because their buffers are needed; what they
        have left to do is done under the backward.
        """
        ahead = REDUCTIONS_AHEAD.get(self.stage)
        while ahead is not None and len(self._under_way) > ahead:
            self._under_way.pop(0).finish_reduction()
        self.buckets[index].start_reduction(mesh)
        self._under_way.append(self.buckets[index])

    def finish_reductions(self) -> None:
        """Wait until the sums of all buckets are in their `gradient_shard`."""
        for flat in self.buckets:
            flat.finish_reduction()
        self._under_way.clear()
