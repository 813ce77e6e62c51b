"""Flat buffers on a rank, laid out by `plan.buckets`, and the collectives on them.

One parameter and one gradient buffer per bucket. Parameters and gradients of the model are views into them, so a
reduction or a gather is one collective in place and nothing is packed or unpacked. Where ZeRO keeps a shard only, the
whole buffer is there between two steps of the list at most: its storage is given back and taken again, and the views
stay as they are.
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
    """A flat buffer, with a view for each slot of its bucket, that is always there or only when it is taken. What is
    taken is counted in `tally`."""

    def __init__(self, bucket: Bucket, dtype: torch.dtype, device: torch.device, tally: Tally, always: bool) -> None:
        self.tensor = torch.empty(bucket.padded, dtype=dtype, device=device)
        self.views = [self.tensor[s.start : s.start + s.numel].view(s.shape) for s in bucket.slots]
        self.bytes, self.tally, self.always, self.there = self.tensor.nbytes, tally, always, always
        if always:
            self.tensor[bucket.numel :].zero_()  # padding is summed and stepped with the rest: keep it finite
        else:
            self.tensor.untyped_storage().resize_(0)

    def take(self) -> None:
        """Have storage; what is in it is anything."""
        if not self.there:
            self.there = True
            self.tensor.untyped_storage().resize_(self.bytes)
            self.tally.add(self.bytes)

    def give_back(self) -> None:
        """Have none, unless it is always there."""
        if self.there and not self.always:
            self.there = False
            self.tensor.untyped_storage().resize_(0)
            self.tally.add(-self.bytes)


class Tally:
    """Bytes of transient buffers on this rank."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


class FlatBucket:
    """Buffers of one bucket. `parameters` and `gradients`, each (padded,), are whole; `parameter_shard` and
    `gradient_shard`, each (padded / shards,), are this rank's piece: views of the whole where that is always there."""

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
        self.accumulated = False  # the shard holds a micro-batch of this step

    def views(self, slot: Slot) -> tuple[Tensor, Tensor]:
        """Parameter and gradient of `slot`, in the whole buffers."""
        number = self.bucket.slots.index(slot)
        return self._parameters.views[number], self._gradients.views[number]

    # --- parameters ----------------------------------------------------------------------------------------------

    def start_gather(self, mesh: Mesh) -> None:
        """Begin to collect the shards into `parameters`."""
        self._parameters.take()
        self._gathering = mesh.shard.all_gather(self.parameters, self.parameter_shard)

    def ready(self) -> None:
        """Until `parameters` can be read."""
        self._gathering.wait()

    def free(self) -> None:
        """Let go of what was gathered."""
        self.ready()
        self._parameters.give_back()

    def load(self, slot: Slot, value: Tensor) -> None:
        """`value`, of this tp rank's shape, becomes the parameter in `slot`."""
        if self.keeps_parameters:
            self.parameters[slot.start : slot.start + slot.numel].copy_(value.reshape(-1))
        self.load_shard(self.parameter_shard, slot, value)

    def load_shard(self, shard: Tensor, slot: Slot, value: Tensor) -> None:
        """The part of `value` that this rank owns, into its place of `shard` (padded / shards,)."""
        start, stop = max(slot.start, self.start), min(slot.start + slot.numel, self.stop)
        if start < stop:
            piece = value.reshape(-1)[start - slot.start : stop - slot.start]
            shard[start - self.start : stop - self.start].copy_(piece)

    # --- gradients -----------------------------------------------------------------------------------------------

    def open_gradients(self) -> bool:
        """Have room for a micro-batch's whole gradients; whether it was not there before."""
        if self.keeps_gradients:
            return False
        self.finish_reduction()  # of the micro-batch before
        if self._gradients.there:
            return False
        self._gradients.take()
        self.gradients[self.bucket.numel :].zero_()
        return True

    def start_reduction(self, mesh: Mesh) -> None:
        """Sum gradients: partial ones over tp (before, since the data sum mixes ranks), then all over data.

        Afterwards (`finish_reduction`) `gradient_shard` is summed over the ranks that share the state.
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
        """Until the sum is in `gradient_shard`; added to that of earlier micro-batches where only the shard is kept."""
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
    """All buckets of a rank, and the parameters that view into them."""

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
        self._under_way: list[FlatBucket] = []  # reductions, the oldest first
        sink.finishes_later = plan.stage >= 2

    def new(self, param: Param) -> Parameter:
        """A parameter that views into its bucket, its gradient bound to the sink. Its values are not set."""
        flat, slot = self._place[param.name]
        value, gradient = flat.views(slot)
        parameter = Parameter(value)
        self.sink.bind(parameter, gradient)
        self._members.setdefault(flat.bucket.index, []).append(parameter)
        return parameter

    def place(self, param: Param) -> tuple[FlatBucket, Slot]:
        """Where a parameter lies."""
        return self._place[param.name]

    def tensors(self) -> dict[str, Tensor]:
        """What this rank has stepped, by name: its parameters, or where they are sharded its piece of each bucket."""
        found = {}
        for flat in self.buckets:
            if flat.stage:
                found[f"bucket.{flat.bucket.index}"] = flat.parameter_shard
                continue
            for slot in flat.bucket.slots:
                found[slot.param.name] = flat.views(slot)[0]
        return found

    def begin(self) -> None:
        """Start of a training step."""
        self.sink.begin()
        for flat in self.buckets:
            flat.accumulated = False

    def ready(self, chunk: int, block: int) -> None:
        """Until the parameters of `block` can be read."""
        for flat in self._of_block.get((chunk, block), ()):
            flat.ready()

    def open_gradients(self, chunk: int, block: int) -> None:
        """Have room for the gradients of `block`; the first write of each overwrites."""
        for flat in self._of_block.get((chunk, block), ()):
            if flat.open_gradients():
                self.sink.expect(self._members[flat.bucket.index])

    def reduce(self, index: int, mesh: Mesh) -> None:
        """Start the reduction of bucket `index`. Those before it are ended first, but for REDUCTIONS_AHEAD: their
        buffers are needed, and what they left to do is done under the backward."""
        ahead = REDUCTIONS_AHEAD.get(self.stage)
        while ahead is not None and len(self._under_way) > ahead:
            self._under_way.pop(0).finish_reduction()
        self.buckets[index].start_reduction(mesh)
        self._under_way.append(self.buckets[index])

    def finish_reductions(self) -> None:
        """Until all sums are there."""
        for flat in self.buckets:
            flat.finish_reduction()
        self._under_way.clear()
