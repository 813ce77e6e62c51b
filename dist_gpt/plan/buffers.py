"""Bytes held for a while besides activations: gathered parameters, unreduced gradients, their casts, receive buffers.

The walk over the steps takes and frees exactly what `parallel.buckets` takes, frees and tallies.
"""

from __future__ import annotations

from collections.abc import Sequence

from dist_gpt.events import NEAR_MEMBERS, scatter_room
from dist_gpt.plan.buckets import Bucket
from dist_gpt.plan.steps import RankPlan
from dist_gpt.schedule.expand import BACKWARD, FREE, GATHER, REDUCE, UPDATE, WEIGHT, Step


def peak_transients(plan: RankPlan, steps: Sequence[Step]) -> int:
    """Return the largest sum of transient bytes at any moment of `steps`.

    It adds gathered parameters (stage 3), whole gradients (stages 2 and 3) and gradients in the reduction's dtype.
    """
    walk = _Walk(plan)
    for step in steps:
        walk.take(step)
    return walk.peak


def needs_room(plan: RankPlan) -> bool:
    """Return whether a reduce-scatter needs a receive buffer (see comm.group).

    It does on gloo, unless the ranks that share state are on one node and read each other's memory. If the backend is
    left open, gloo is assumed, which needs more.
    """
    launch = plan.config.launch
    if launch.backend == "nccl":
        return False
    per_node = max(1, plan.layout.world // launch.nodes)
    members = plan.layout.group(plan.shard_axis, plan.rank)
    nodes = {rank // per_node for rank in members}
    return not launch.reads_memory or len(nodes) > 1 or len(members) > NEAR_MEMBERS


REDUCTIONS_AHEAD = {1: 1, 2: 0, 3: 0}
"""Stage -> number of reductions that may be under way when another one starts. Without sharding all may: they need no
buffers."""


def scatter_bytes(plan: RankPlan, steps: Sequence[Step]) -> int:
    """Return the peak bytes of the receive buffers of reduce-scatters under way."""
    if not plan.stage or not needs_room(plan):
        return 0
    element, shards = plan.precision.bytes("reduce"), plan.shards
    sizes = [scatter_room(plan.buckets[s.bucket or 0].padded * element, shards) for s in steps if s.kind == REDUCE]
    together = REDUCTIONS_AHEAD[plan.stage] + 1
    return max((sum(sizes[i : i + together]) for i in range(len(sizes))), default=0)


class _Walk:
    """Live transient bytes, step by step, and their peak."""

    def __init__(self, plan: RankPlan) -> None:
        self.plan, self.precision = plan, plan.precision
        self.live = self.peak = 0
        self.open: set[int] = set()  # buckets with a live whole gradient
        self.reducing: list[int] = []  # bytes freed when reductions end
        self.reduced_last: int | None = None  # in stages 2 and 3, one at a time

    def take(self, step: Step) -> None:
        """Apply what `step` allocates and frees."""
        plan = self.plan
        bucket = plan.buckets[step.bucket] if step.bucket is not None else None
        if step.kind == GATHER and plan.stage == 3 and bucket is not None:
            self._grow(bucket.padded * plan.element)
        elif step.kind == FREE and bucket is not None:
            self.live -= bucket.padded * plan.element
        elif plan.stage >= 2 and (step.kind == WEIGHT or (step.kind == BACKWARD and not step.split)):
            for one in buckets_of_gradients(plan, step):
                if one.index == self.reduced_last:
                    self._end()
                if one.index not in self.open:
                    self.open.add(one.index)
                    self._grow(self._whole(one))
        elif step.kind == REDUCE and bucket is not None:
            self._reduce(bucket)
        elif step.kind == UPDATE:
            self._end()

    def _reduce(self, bucket: Bucket) -> None:
        casts = self.precision.casts and self.plan.layout.data > 1
        cast = bucket.padded * self.precision.bytes("reduce") if casts else 0
        if self.plan.stage < 2:
            while self.plan.stage and len(self.reducing) > REDUCTIONS_AHEAD[self.plan.stage]:
                self.live -= self.reducing.pop(0)
            self._grow(cast)
            self.reducing.append(cast)
            return
        self._end()
        self.open.discard(bucket.index)
        self.reduced_last = bucket.index
        if cast:
            self._grow(cast)
            self.live -= self._whole(bucket)
        self.reducing.append(cast or self._whole(bucket))

    def _end(self) -> None:
        self.live -= sum(self.reducing)
        self.reducing.clear()
        self.reduced_last = None

    def _whole(self, bucket: Bucket) -> int:
        return bucket.padded * self.precision.bytes("gradient")

    def _grow(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def buckets_of_gradients(plan: RankPlan, step: Step) -> list[Bucket]:
    """Return the buckets that receive the gradients of `step`."""
    return [b for b in plan.buckets if b.chunk == step.action.chunk and step.block in b.blocks]
