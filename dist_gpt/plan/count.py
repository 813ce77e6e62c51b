"""Folds over declared steps: traffic, FLOPs and memory of a rank, and the kinds of ranks in a job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from dist_gpt.config.schema import Config
from dist_gpt.events import Counts
from dist_gpt.params import parameter_table
from dist_gpt.plan.buffers import peak_transients, scatter_bytes
from dist_gpt.plan.deepspeed import DeepSpeedMemory, fullest_rank
from dist_gpt.plan.steps import RankPlan, layout_of
from dist_gpt.schedule.action import Op
from dist_gpt.schedule.expand import BACKWARD, FORWARD, RECOMPUTE, RECV, WEIGHT, Step

_INPUT = {Op.F: Op.RECV_F, Op.B: Op.RECV_B}  # the message that an action may read


def size_of(plan: RankPlan, axis: str) -> int:
    """Return the number of ranks in a group of `axis` that issues collectives (a pipeline message joins two)."""
    return 2 if axis in ("pp", "embed") else plan.layout.size(axis)


def count_comm(plan: RankPlan, steps: Sequence[Step]) -> Counts:
    """Return the calls and bytes that `steps` declare."""
    counts = Counts()
    for step, times in _distinct(steps).items():
        for call in plan.declare(step).comm:
            counts.add(call.axis, call.op, times * call.calls, call.payload, size_of(plan, call.axis))
    return counts


def count_flops(plan: RankPlan, steps: Sequence[Step]) -> int:
    """Return the model FLOPs that `steps` declare."""
    return sum(times * plan.declare(step).flops for step, times in _distinct(steps).items())


def count_recomputed(plan: RankPlan, steps: Sequence[Step]) -> int:
    """Return the FLOPs that `steps` declare for recomputing forwards."""
    return sum(times * plan.declare(step).recompute_flops for step, times in _distinct(steps).items())


def _distinct(steps: Sequence[Step]) -> Counter[Step]:
    """Count steps that differ only in their micro-batch as one: they declare the same."""
    counter: Counter[tuple[object, ...]] = Counter()
    example: dict[tuple[object, ...], Step] = {}
    for step in steps:
        key = (step.kind, step.action.op, step.action.chunk, step.block, step.bucket, step.split)
        counter[key] += 1
        example.setdefault(key, step)
    return Counter({example[key]: times for key, times in counter.items()})


def peak_activations(plan: RankPlan, steps: Sequence[Step]) -> int:
    """Return the largest sum of bytes that stay between two steps, for later steps of the same block.

    A forward leaves what autograd keeps (only its input if the rest is recomputed); a backward frees it and, if weight
    gradients come later, leaves what they need.
    """
    kinds = (FORWARD, RECOMPUTE, BACKWARD)
    left = {(s.kind, s.block): plan.declare(s).saved_bytes for s in _distinct(steps) if s.kind in kinds}
    live = peak = 0
    for step in steps:
        if step.kind in (FORWARD, RECOMPUTE):
            live += left[step.kind, step.block]
        elif step.kind == BACKWARD:
            live -= left[FORWARD, step.block] + left.get((RECOMPUTE, step.block), 0)
            live += left[BACKWARD, step.block]
        elif step.kind == WEIGHT:
            live -= left[BACKWARD, step.block]
        peak = max(peak, live)
    return peak


def peak_messages(plan: RankPlan, steps: Sequence[Step]) -> int:
    """Return the largest sum of bytes of receives that are posted and not yet read."""
    size = plan.hidden_bytes // (plan.layout.tp if plan.config.parallel.sequence_parallel else 1)
    waiting: set[object] = set()
    peak = 0
    for step in steps:
        if step.kind == RECV:
            waiting.add(step.action)
            peak = max(peak, len(waiting))
        elif waiting and step.kind in (FORWARD, BACKWARD):
            waiting.discard(replace(step.action, op=_INPUT[step.action.op]))
    return peak * size


def memory_document(
    parameters: int, gradients: int, optimizer: int, activations: int, buffers: int, host: int = 0
) -> dict[str, int]:
    """Return the `memory_bytes` object of plan and dry run, in bytes.

    `optimizer`: masters and moments; `buffers`: messages, gathered parameters, gradients under reduction; `host`: what
    the optimizer keeps in host memory, not part of the peak.
    """
    parts = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "buffers": buffers,
    }
    return {**parts, "peak": sum(parts.values()), "host": host}


def count_memory(plan: RankPlan, steps: Sequence[Step]) -> dict[str, int]:
    """Return the training memory of one rank in bytes, by category; with DeepSpeed, at the fullest moment of a step."""
    if not plan.ours:
        index = plan.layout.data_index(plan.rank)
        held = DeepSpeedMemory(plan.config, plan.coords.tp, index, peak_activations(plan, steps))
        return memory_document(**held.document())
    o, precision = plan.config.optim, plan.precision
    whole = sum(b.padded for b in plan.buckets)
    shard = whole // plan.shards
    averages = 2 if o.name == "adamw" else 1 if o.momentum else 0
    state = owned_elements(plan) * precision.bytes("state") * averages
    masters = shard * precision.bytes("master")
    return memory_document(
        parameters=(shard if plan.stage == 3 else whole) * precision.bytes("compute"),
        gradients=(shard if plan.stage >= 2 else whole) * precision.bytes("gradient"),
        optimizer=0 if o.offload else state + (masters if precision.low else 0),
        activations=peak_activations(plan, steps),
        buffers=peak_messages(plan, steps) + peak_transients(plan, steps) + scatter_bytes(plan, steps),
        host=masters + shard * precision.bytes("gradient") + state if o.offload else 0,
    )


def owned_elements(plan: RankPlan) -> int:
    """Return the number of parameter elements whose optimizer state this rank holds (without padding)."""
    total = 0
    for bucket in plan.buckets:
        start, stop = bucket.shard(plan.shards, plan.shard_index)
        total += max(0, min(stop, bucket.numel) - start)
    return total


def stored_parameters(plan: RankPlan) -> int:
    """Return the number of parameter elements that this rank stores (without padding)."""
    return sum(b.numel for b in plan.buckets)


def total_parameters(config: Config) -> int:
    """Return the number of parameters of the model, each counted once."""
    return sum(p.numel for p in parameter_table(config))


@dataclass(frozen=True)
class Kind:
    """Set of ranks that do the same work: the plan of one of them, and their number."""

    plan: RankPlan
    ranks: int


@lru_cache(maxsize=4)
def _kinds(config_json: str) -> tuple[Kind, ...]:
    config = Config.model_validate_json(config_json)
    layout = layout_of(config)
    return tuple(
        Kind(RankPlan(config, layout.rank(pp, _example(config, tp), 0, tp)), alike * layout.data)
        for pp in range(layout.pp)
        for tp, alike in _vocabulary_kinds(config)
    )


def _example(config: Config, tp: int) -> int:
    """Return the data rank that holds most: the first, without padding; DeepSpeed, however, cuts inside parameters."""
    return fullest_rank(config, tp) if config.optim.engine == "deepspeed" else 0


def _vocabulary_kinds(config: Config) -> list[tuple[int, int]]:
    """Return (first tp rank, number of ranks) per width of a vocabulary piece; tp ranks differ in nothing else."""
    tp = config.parallel.tp
    wider = int(config.model.vocab_size or 0) % tp  # that many ranks, the first ones, hold one more row
    return [(0, wider), (wider, tp - wider)] if wider else [(0, tp)]


def rank_kinds(config: Config) -> Iterator[Kind]:
    """Yield the kinds of ranks of a job; the plan of each kind is that of the rank that holds most."""
    yield from _kinds(config.model_dump_json())
