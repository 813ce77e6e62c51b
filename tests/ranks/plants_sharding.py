"""Bugs on purpose in what ZeRO, recomputation and sharding inside nodes add; see tests.ranks.plants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import dist_gpt.optim.optimizer
from dist_gpt.comm.group import Group
from dist_gpt.model.core import CoreAgain
from dist_gpt.optim.optimizer import Optimizer
from dist_gpt.parallel.buckets import FlatBucket, FlatBuffers
from dist_gpt.parallel.executor import Executor
from dist_gpt.parallel.linear import RowLinear
from dist_gpt.plan.steps import Cost, RankPlan
from dist_gpt.schedule.expand import GATHER, Step
from tests.ranks.plants import first_of, plant


@plant(FlatBucket, "finish_reduction")
def shard_overwritten_by_the_next_micro_batch(call: int, original: Any, self: FlatBucket) -> None:
    self.accumulated = False
    original(self)


@plant(FlatBucket, "open_gradients")
def gradients_written_while_they_are_reduced(call: int, original: Any, self: FlatBucket) -> bool:
    """The next micro-batch goes into the buffer that is still on its way."""
    if self._gradients.there:
        return False
    return bool(original(self))


@plant(FlatBucket, "start_gather")
def another_rank_s_shard_gathered(call: int, original: Any, self: FlatBucket, mesh: Any) -> None:
    """Bucket 0 of the second step is put together in the wrong order."""
    original(self, mesh)
    if self.bucket.index == 0 and call > 1:
        self.ready()
        with torch.no_grad():
            self.parameters.copy_(self.parameters.roll(len(self.parameter_shard)))


@plant(FlatBuffers, "ready")
def gather_not_waited_for(call: int, original: Any, self: FlatBuffers, chunk: int, block: int) -> None:
    """The first block computes with what is there: nothing yet."""
    original(self, chunk, block)
    if call == 1:
        for flat in self._of_block[chunk, block]:
            flat.parameters.zero_()


@plant(Executor, "_recompute")
def recomputed_with_another_mask(call: int, original: Any, self: Executor, step: Step, micro: Any) -> None:
    original(self, step, replace(micro, step=micro.step + 1))


@plant(RowLinear, "forward")
def recompute_stops_too_early(
    call: int, original: Any, self: RowLinear, x: Tensor, skip: bool = False, *rest: Any, **more: Any
) -> Any:
    """The second forward leaves out attention's projection as well: what comes after it sees nothing of it."""
    result = original(self, x, skip, *rest, **more)
    if torch.is_grad_enabled() and not skip and self.weight.shape[0] == self.weight.shape[1]:
        return result * 0
    return result


@plant(CoreAgain, "compute")
def core_again_without_the_mask(call: int, original: Any, self: CoreAgain, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the projection's weight gradient sees is of other values."""
    return original(self, q, k, v.flip(1))


@plant(Optimizer, "_sum_copies")
def nodes_not_summed(call: int, original: Any, self: Optimizer) -> None:
    mesh = self.mesh
    there, mesh.groups["replica"] = mesh.groups["replica"], Group("replica", (mesh.rank,), mesh.rank, None, mesh.ledger)
    try:
        original(self)
    finally:
        mesh.groups["replica"] = there


@plant(dist_gpt.optim.optimizer, "squared_norm_here")
def norm_counts_every_node(call: int, original: Any, flats: Any, mesh: Any) -> Tensor:
    with first_of(mesh.replica):
        return original(flats, mesh)


@plant(RankPlan, "declare")
def plan_forgets_the_gathers(call: int, original: Any, self: RankPlan, step: Step) -> Cost:
    return Cost() if step.kind == GATHER else original(self, step)


@plant(RankPlan, "declare")
def plan_forgets_what_is_computed_again(call: int, original: Any, self: RankPlan, step: Step) -> Cost:
    return replace(original(self, step), recompute_flops=0)
