"""Bugs on purpose: each is the kind of mistake that hides when parallelisms compose, and must turn a cell red.

A plant is a function that stands in for one of the product's: it gets the number of the call in this process, the
original, and the original's arguments. It is active while a rank trains in the layout under test, and not while the
one process trains that it is compared with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dist_gpt.model.gpt
import dist_gpt.optim.optimizer
import dist_gpt.parallel.linear
import dist_gpt.plan.steps
import dist_gpt.replica
from dist_gpt import params, verify
from dist_gpt.comm.group import Group, Pending
from dist_gpt.comm.mesh import Backends
from dist_gpt.config.schema import Config
from dist_gpt.layout import even_split
from dist_gpt.model.gpt import Wiring
from dist_gpt.optim.grad_norm import clip_divisor, squared_norm_here
from dist_gpt.optim.optimizer import Optimizer
from dist_gpt.parallel.buckets import FlatBucket
from dist_gpt.parallel.executor import Executor
from dist_gpt.parallel.linear import _Row
from dist_gpt.parallel.sink import GradSink
from dist_gpt.replica import Rank
from dist_gpt.schedule.action import Action, Op


@dataclass(frozen=True)
class Plant:
    """`attribute` of `owner` (a module or a class) is replaced by `wrong`."""

    owner: Any
    attribute: str
    wrong: Callable[..., Any]


PLANTS: dict[str, Plant] = {}


def plant(owner: Any, attribute: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Lists the function below it as a plant, under its own name."""

    def add(wrong: Callable[..., Any]) -> Callable[..., Any]:
        PLANTS[wrong.__name__] = Plant(owner, attribute, wrong)
        return wrong

    return add


@contextmanager
def planted(name: str | None) -> Iterator[list[int]]:
    """Certificates taken inside meet the plant `name`; yields a list that grows with every call of it."""
    hits: list[int] = []
    if name is None:
        yield hits
        return
    original = verify.certify_rank

    def certify_with_bug(
        config: Config, rank: int, backends: Backends, reference: Path, **options: Any
    ) -> verify.Verdict:
        with _grown(PLANTS[name], hits):
            return original(config, rank, backends, reference, **options)

    verify.certify_rank = certify_with_bug
    try:
        yield hits
    finally:
        verify.certify_rank = original


@contextmanager
def _grown(bug: Plant, hits: list[int]) -> Iterator[None]:
    stored = vars(bug.owner)[bug.attribute]
    original = getattr(bug.owner, bug.attribute)

    def stand_in(*arguments: Any, **named: Any) -> Any:
        hits.append(1)
        return bug.wrong(len(hits), original, *arguments, **named)

    setattr(bug.owner, bug.attribute, staticmethod(stand_in) if isinstance(stored, staticmethod) else stand_in)
    try:
        yield
    finally:
        setattr(bug.owner, bug.attribute, stored)


@contextmanager
def first_of(group: Group) -> Iterator[None]:
    """This rank believes that it is the first of `group`."""
    index, group.index = group.index, 0
    try:
        yield
    finally:
        group.index = index


# --- sums and norms -------------------------------------------------------------------------------------------------


@plant(params._Builder, "__init__")
def partial_gradients_called_replicated(call: int, original: Any, self: Any, config: Any) -> None:
    """Plan and run agree, and nobody sums what every tensor rank saw for its own tokens only."""
    original(self, config)
    self.whole = params.REPLICATED


@plant(dist_gpt.optim.optimizer, "squared_norm_here")
def norm_counts_replicated_on_every_tensor_rank(call: int, original: Any, flats: Any, mesh: Any) -> Tensor:
    with first_of(mesh.tp):
        return original(flats, mesh)


@plant(dist_gpt.optim.optimizer, "squared_norm_here")
def norm_counts_tied_embedding_twice(call: int, original: Any, flats: Any, mesh: Any) -> Tensor:
    with first_of(mesh["embed"]):
        return original(flats, mesh)


@plant(dist_gpt.optim.optimizer, "squared_norm_here")
def norm_counts_every_data_rank(call: int, original: Any, flats: Any, mesh: Any) -> Tensor:
    with first_of(mesh.data):
        return original(flats, mesh)


@plant(Optimizer, "_apply")
def clipped_by_the_local_norm(call: int, original: Any, self: Optimizer, rate: float, _: Tensor, bad: Tensor) -> None:
    local = squared_norm_here(self.flats, self.mesh).sqrt()
    original(self, rate, clip_divisor(local, self.config.optim.clip), bad)


@plant(Optimizer, "_sum_copies")
def tied_gradients_not_summed(call: int, original: Any, self: Optimizer) -> None:
    """Each end of the pipeline keeps its own gradient of the embedding."""


@plant(FlatBucket, "finish_reduction")
def gradients_averaged_over_data(call: int, original: Any, self: FlatBucket) -> None:
    original(self)
    self.gradient_shard.div_(2)


@plant(FlatBucket, "start_reduction")
def reduce_scatter_without_the_sum(call: int, original: Any, self: FlatBucket, mesh: Any) -> None:
    """Bucket 0 is exchanged, and each rank goes on with its own."""
    own = self.gradient_shard.clone()
    original(self, mesh)
    summed = self._reducing
    if self.bucket.index == 0 and summed is not None:
        self._reducing = Pending(None, lambda: (summed.wait(), self.gradient_shard.copy_(own)))


@plant(FlatBucket, "start_reduction")
def bucket_not_reduced(call: int, original: Any, self: FlatBucket, mesh: Any) -> None:
    if self.bucket.index != 0:
        original(self, mesh)


# --- the batch and the loss -----------------------------------------------------------------------------------------


@plant(Rank, "micro_batch")
def micro_batches_swapped(call: int, original: Any, self: Rank, samples: Any, step: int, m: int, training: bool) -> Any:
    """The last stage reads the targets of the neighbouring micro-batch."""
    return original(self, samples, step, m ^ 1 if self.mesh.coords.pp else m, training)


@plant(Rank, "micro_batch")
def loss_scaled_per_data_rank(call: int, original: Any, self: Rank, *arguments: Any) -> Any:
    micro = original(self, *arguments)
    return replace(micro, scale=micro.scale * self.mesh.data.size)


@plant(Rank, "_once")
def loss_counted_on_every_tensor_rank(call: int, original: Any, self: Rank, loss: Tensor) -> Tensor:
    return loss


@plant(Rank, "evaluate")
def validation_loss_not_summed(call: int, original: Any, self: Rank, batches: Any) -> Tensor:
    """Each rank takes the sum of its own samples for the whole."""
    world, rank = self.mesh.world, self.mesh.rank
    self.mesh.groups["world"] = Group("world", (rank,), rank, None, self.mesh.ledger)
    try:
        return original(self, batches)
    finally:
        self.mesh.groups["world"] = world


@plant(Rank, "_validation_micro_batch")
def validation_samples_of_the_first_data_rank(call: int, original: Any, self: Rank, samples: Any, m: int) -> Any:
    here, self.mesh.coords = self.mesh.coords, replace(self.mesh.coords, dp=0)
    try:
        return original(self, samples, m)
    finally:
        self.mesh.coords = here


@plant(dist_gpt.model.gpt, "vocab_range")
def vocabulary_range_off_by_one(call: int, original: Any, config: Any, index: int) -> tuple[int, int]:
    start, stop = original(config, index)
    return start + (index > 0), stop


# --- collectives ----------------------------------------------------------------------------------------------------


@plant(dist_gpt.parallel.linear, "reduce_tokens")
def forward_all_reduce_left_out(call: int, original: Any, group: Group, x: Tensor, split: bool) -> Any:
    """The first row-parallel product of the run keeps the part of its own rank; all ranks leave it out."""
    return (x, Pending()) if call == 1 else original(group, x, split)


@plant(FlatBucket, "start_reduction")
def collective_too_many(call: int, original: Any, self: FlatBucket, mesh: Any) -> None:
    """Harmless to the numbers."""
    original(self, mesh)
    if self.bucket.index == 0:
        mesh.data.all_reduce(self.gradients.new_zeros(1)).wait()


# --- the pipeline ---------------------------------------------------------------------------------------------------


@plant(Executor, "_output_gradient")
def gradient_of_another_chunk(call: int, original: Any, self: Executor, chunk: int, m: int) -> Tensor:
    """What arrived for chunk 2 is used for chunk 0 of the same rank, too."""
    arrived = Action(chunk, Op.RECV_B, m) in self._receiving
    gradient: Tensor = original(self, chunk, m)
    kept: dict[int, Tensor] = vars(self).setdefault("kept", {})
    if arrived and chunk == 2:
        kept[m] = gradient
    return kept.pop(m) if arrived and chunk == 0 else gradient


@plant(GradSink, "run")
def weight_job_dropped(call: int, original: Any, self: GradSink, key: tuple[int, int]) -> None:
    """The weight step of micro-batch 1 finds nothing to do."""
    if key[1] == 1:
        self._queue.pop(key)
    else:
        original(self, key)


@plant(GradSink, "run")
def weight_job_of_another_micro_batch(call: int, original: Any, self: GradSink, key: tuple[int, int]) -> None:
    """The jobs of micro-batch 1 are lost and those of 2 run twice: as many FLOPs and bytes as planned."""
    m = key[1]
    if m == 1:
        self._queue.pop(key)
    if m == 2:
        jobs = list(self._queue[key])
        original(self, key)
        self._queue[key] = jobs
    if m != 1:
        original(self, key)


# --- gradients ------------------------------------------------------------------------------------------------------


@plant(dist_gpt.parallel.linear, "_weight_gradients")
def bias_gradient_forgotten(call: int, original: Any, sink: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    return original(sink, weight, None, *rest)


@plant(GradSink, "_target")
def gradient_overwritten(call: int, original: Any, self: GradSink, parameter: Any) -> tuple[Tensor, bool]:
    """Every micro-batch writes over the one before it."""
    return original(self, parameter)[0], True


@plant(_Row, "forward")
def row_bias_on_every_tensor_rank(
    call: int, original: Any, ctx: Any, x: Tensor, weight: Any, bias: Any, tp: Group, *rest: Any
) -> Tensor:
    """The bias is added before the sum, so the sum has it tp times."""
    return original(ctx, x, weight, bias, tp, *rest) + (tp.size - 1) * bias.detach()


# --- the update -----------------------------------------------------------------------------------------------------


@plant(FlatBucket, "start_gather")
def bucket_left_stale(call: int, original: Any, self: FlatBucket, mesh: Any) -> None:
    """Bucket 0 is gathered, to the wrong place."""
    if self.bucket.index == 0:
        self._gathering = mesh.data.all_gather(torch.empty_like(self.parameters), self.parameter_shard)
    else:
        original(self, mesh)


@plant(Optimizer, "_slices")
def norms_decay(call: int, original: Any, self: Optimizer) -> tuple[list[Any], list[Any]]:
    decayed, plain = original(self)
    return decayed + plain, []


# --- what must not depend on the rank -------------------------------------------------------------------------------


@plant(dist_gpt.replica, "initial_weight")
def weights_drawn_per_rank(call: int, original: Any, param: Any, seed: int) -> Tensor:
    return original(param, seed + int(os.environ["RANK"]))


@plant(dist_gpt.model.gpt, "dropout")
def dropout_keyed_per_rank(call: int, original: Any, x: Tensor, rate: float, key: Any, *rest: Any) -> Tensor:
    return original(x, rate, (*key, int(os.environ["RANK"])), *rest)


@plant(Wiring, "first_token")
def dropout_repeats_on_token_shards(call: int, original: Any, self: Wiring, micro: Any, tokens_here: int) -> int:
    """Every tensor rank takes its tokens for the first of the micro-batch."""
    return original(self, micro, 0)


@plant(dist_gpt.model.gpt, "add_positions")
def positions_repeat_on_token_shards(call: int, original: Any, x: Any, position: Any, first: int, sink: Any) -> Tensor:
    return original(x, position, 0, sink)


@plant(params.Param, "pieces")
def qkv_cut_as_one(call: int, original: Any, self: params.Param, tp: int, index: int) -> list[tuple[int, int]]:
    """The rows [q; k; v] are halved, so one rank gets the queries and the other the values."""
    if len(self.sections) == 1:
        return original(self, tp, index)
    return [even_split(sum(self.sections), tp, index)]


# --- the declarations -----------------------------------------------------------------------------------------------


@plant(dist_gpt.plan.steps, "head_forward_flops")
def plan_forgets_the_head(call: int, original: Any, config: Any, tokens: int) -> int:
    return 0


@plant(dist_gpt.plan.steps, "saved_bytes")
def plan_forgets_an_activation(call: int, original: Any, config: Any, block: int, tp_index: int) -> int:
    return original(config, block, tp_index) - 8 * (block == 1)
