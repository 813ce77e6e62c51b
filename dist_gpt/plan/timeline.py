"""Schedule of a configuration: checked, then simulated with the declared FLOPs of each action as its cost."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from dist_gpt.config.schema import Config
from dist_gpt.plan.split import layers_per_chunk
from dist_gpt.plan.steps import RankPlan, layout_of, lowered_orders
from dist_gpt.schedule.action import COMPUTE, Op, format_order
from dist_gpt.schedule.check import check
from dist_gpt.schedule.expand import BACKWARD, FORWARD, RECOMPUTE, WEIGHT
from dist_gpt.schedule.lower import add_communication
from dist_gpt.schedule.orders import forward_only, placement
from dist_gpt.schedule.simulate import Timeline, simulate

_KINDS = {Op.F: (FORWARD,), Op.B: (RECOMPUTE, BACKWARD), Op.W: (WEIGHT,)}


def timeline(config: Config) -> Timeline:
    """Simulate a training step on every pipeline rank; time is in units of the costliest action, messages are free.

    Raises ScheduleError if the schedule is incomplete or would deadlock.
    """
    p = config.parallel
    return _timeline(p.schedule, p.pp, p.virtual_stages, config.micro_batches, tuple(_action_flops(config).items()))


def simulated_bubble(config: Config) -> float:
    """Return the idle share of a pipeline rank in the step, mean over ranks, by FLOPs alone (no communication)."""
    return timeline(config).bubble


def schedule_document(config: Config) -> dict[str, Any]:
    """Return the `schedule` of a plan.

    `chunks` are layers per chunk, `placement` the pipeline rank of each chunk, `orders` the compute actions of every
    pipeline rank.
    """
    p = config.parallel
    simulated = timeline(config)
    orders = lowered_orders(p.schedule, p.pp, p.virtual_stages, config.micro_batches)
    return {
        "name": p.schedule,
        "micro_batches": config.micro_batches,
        "chunks": layers_per_chunk(config),
        "placement": list(placement(p.schedule, p.pp, p.virtual_stages)),
        "simulated_bubble": simulated.bubble,
        "bubble_by_rank": list(simulated.bubble_by_rank),
        "orders": [format_order(a for a in order if a.op in COMPUTE) for order in orders],
    }


@lru_cache(maxsize=4)
def _timeline(
    name: str, pp: int, virtual_stages: int, micro_batches: int, flops: tuple[tuple[tuple[int, Op], int], ...]
) -> Timeline:
    orders = lowered_orders(name, pp, virtual_stages, micro_batches)
    where = placement(name, pp, virtual_stages)
    check(orders, where, micro_batches)
    check(
        add_communication(forward_only(name, pp, virtual_stages, micro_batches), where),
        where,
        micro_batches,
        training=False,
    )  # validation runs these
    cost = dict(flops)
    unit = max(cost.values(), default=0) or 1
    return simulate(orders, where, lambda rank, action: cost.get((action.chunk, action.op), 0) / unit)


def _action_flops(config: Config) -> dict[tuple[int, Op], int]:
    """Return the declared FLOPs of an F, B or W of each chunk; a recomputed forward is part of B.

    They are those of the tp rank with the largest piece of the vocabulary.
    """
    p = config.parallel
    layout = layout_of(config)
    holders = placement(p.schedule, p.pp, p.virtual_stages)
    flops = {}
    for chunk in range(len(holders)):
        plan = RankPlan(config, layout.rank(holders[chunk], 0, 0, 0))
        for op, kinds in _KINDS.items():
            costs = [
                plan.declare(step)
                for step in plan.steps
                if step.kind in kinds and step.action.chunk == chunk and step.action.micro_batch == 0
            ]
            flops[chunk, op] = sum(cost.flops + cost.recompute_flops for cost in costs)
    return flops
