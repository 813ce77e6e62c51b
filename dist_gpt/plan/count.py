"""Folds over declared steps: traffic, FLOPs and memory of a rank, of the whole job, and of its worst rank."""

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
    """Ranks in a group of `axis` that issues collectives (a pipeline message joins two)."""
    return 2 if axis in ("pp", "embed") else plan.layout.size(axis)


def count_comm(plan: RankPlan, steps: Sequence[Step]) -> Counts:
    """Calls and bytes that `steps` declare."""
    counts = Counts()
    for step, times in _distinct(steps).items():
        for call in plan.declare(step).comm:
            counts.add(call.axis, call.op, times * call.calls, call.payload, size_of(plan, call.axis))
    return counts


def count_flops(plan: RankPlan, steps: Sequence[Step]) -> int:
    """Model FLOPs that `steps` declare."""
    return sum(times * plan.declare(step).flops for step, times in _distinct(steps).items())


def count_recomputed(plan: RankPlan, steps: Sequence[Step]) -> int:
    """FLOPs that `steps` declare for running forwards again."""
    return sum(times * plan.declare(step).recompute_flops for step, times in _distinct(steps).items())


def _distinct(steps: Sequence[Step]) -> Counter[Step]:
    """Steps that differ only in their micro-batch declare the same: count them as one."""
    counter: Counter[tuple[object, ...]] = Counter()
    example: dict[tuple[object, ...], Step] = {}
    for step in steps:
        key = (step.kind, step.action.op, step.action.chunk, step.block, step.bucket, step.split)
        counter[key] += 1
        example.setdefault(key, step)
    return Counter({example[key]: times for key, times in counter.items()})


def peak_activations(plan: RankPlan, steps: Sequence[Step]) -> int:
    """Largest sum of bytes that stay between two steps, for later ones of the same block. A forward leaves what
    autograd keeps (its input alone, where the rest is computed again); a backward frees it, and where weight gradients
    come later leaves what these need."""
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
    """Largest sum of bytes of receives that are posted and not yet read."""
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
    """The memory_bytes object of plan and dry run. `optimizer`: masters and averages; `buffers`: messages, gathered
    parameters, gradients on their way; `host`: what the optimizer keeps in host memory, not part of the peak."""
    parts = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "buffers": buffers,
    }
    return {**parts, "peak": sum(parts.values()), "host": host}


def count_memory(plan: RankPlan, steps: Sequence[Step]) -> dict[str, int]:
    """Return the bytes of one rank in training, by category; with DeepSpeed, at the fullest moment of a step."""
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
    """Parameter elements whose optimizer state this rank holds (padding left out)."""
    total = 0
    for bucket in plan.buckets:
        start, stop = bucket.shard(plan.shards, plan.shard_index)
        total += max(0, min(stop, bucket.numel) - start)
    return total


def stored_parameters(plan: RankPlan) -> int:
    """Parameter elements this rank stores (padding left out)."""
    return sum(b.numel for b in plan.buckets)


def total_parameters(config: Config) -> int:
    """Parameters of the model, each once."""
    return sum(p.numel for p in parameter_table(config))


@dataclass(frozen=True)
class Kind:
    """Ranks that do the same: one example and how many there are."""

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
    """Return the data rank that holds most: the first has no padding, but DeepSpeed cuts inside parameters."""
    return fullest_rank(config, tp) if config.optim.engine == "deepspeed" else 0


def _vocabulary_kinds(config: Config) -> list[tuple[int, int]]:
    """(first tp rank, how many) of each width of a vocabulary piece; nothing else differs between tp ranks."""
    tp = config.parallel.tp
    wider = int(config.model.vocab_size or 0) % tp  # the first so many hold one row more
    return [(0, wider), (wider, tp - wider)] if wider else [(0, tp)]


def rank_kinds(config: Config) -> Iterator[Kind]:
    """Yield kinds of ranks that do the same work; the example of each is the rank that holds most."""
    yield from _kinds(config.model_dump_json())
