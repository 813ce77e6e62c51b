"""Compare the pipeline as it ran with the best that its schedule allows: the same actions, measured and simulated.

The bubble is the share of the pipelined part of a step (from the first action of any stage to the last) in which a
stage runs none of its actions. It is split by simulating the very list of actions that ran, with other costs:

    structural    idle time of the schedule itself, where every stage costs the same and messages are free
    imbalance     what each stage's own measured costs add
    transfer      what the measurement adds: messages, and everything else that held an action up
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from dist_gpt.layout import Layout
from dist_gpt.plan.steps import lowered_orders
from dist_gpt.report.analysis.match import Calls
from dist_gpt.report.analysis.time_breakdown import KINDS, Blocked, Spans
from dist_gpt.report.read.load import Run
from dist_gpt.schedule.action import COMPUTE, Action, Op
from dist_gpt.schedule.orders import placement
from dist_gpt.schedule.simulate import Timeline, simulate

IMBALANCED, WORTH = 1.1, 0.03
"""Smallest multiple of the mean stage, and smallest bubble from imbalance, at which a stage is called slow."""
Times = dict[Action, tuple[int, int, int]]
"""Start, end and ns blocked inside by the pipeline's messages, of every action of a stage."""


def pipeline_document(run: Run, calls: Calls, spans: Spans, stood: Blocked, drawn: int) -> dict[str, Any] | None:
    """Return the `pipeline` of a report, or None without one.

    It is of the pipeline at dp, cp, tp 0; its Gantt chart is of step `drawn`, or the last complete one.
    """
    if run.layout.pp == 1 or not len(spans.start):
        return None
    ranks = [run.layout.rank(stage, 0, 0, 0) for stage in range(run.layout.pp)]
    if any(rank not in run.ranks for rank in ranks):
        return None
    by_step = [[_actions(run, calls, spans, stood, rank, step) for rank in ranks] for step in _steps(spans)]
    complete = [stages for stages in by_step if all(stages)]
    if not complete:
        return None
    p = run.config.parallel
    orders = lowered_orders(p.schedule, p.pp, p.virtual_stages, run.config.micro_batches)
    where = placement(p.schedule, p.pp, p.virtual_stages)
    costs = _costs(complete)
    own = _simulated(orders, where, costs)
    even = _simulated(orders, where, _levelled(costs))
    measured = float(np.mean([_bubble(stages) for stages in complete]))
    stages = _stages(run.layout, where, costs, complete)
    shown = next((s for s, step in zip(by_step, _steps(spans), strict=True) if step == drawn and all(s)), complete[-1])
    return {
        "schedule": p.schedule,
        "micro_batches": run.config.micro_batches,
        "bubble": {
            "measured": measured,
            "structural": even.bubble,
            "imbalance": own.bubble - even.bubble,
            "transfer": measured - own.bubble,
            "simulated": own.bubble,
            "planned": run.plan.get("bubble"),
        },
        "stages": stages,
        "measured": _gantt(shown),
        "ideal": _ideal(own),
        **_advice(stages, measured, own.bubble, even.bubble),
    }


def _steps(spans: Spans) -> list[int]:
    return [int(step) for step in np.unique(spans.step)]


def _actions(run: Run, calls: Calls, spans: Spans, stood: Blocked, rank: int, step: int) -> Times:
    """Return the F, B and W of a rank in one step.

    Recomputation, which runs layer by layer between the layers of a backward, is part of it, as in the schedule.
    """
    here = spans.of(rank)
    rows = np.flatnonzero((spans.step[here] == step) & (spans.kind[here] <= KINDS.index("recompute"))) + here.start
    of = calls.of(rank)
    idle = np.flatnonzero((calls.step[of] == step) & (stood.bubble[of] > 0)) + of.start
    begun, lost = calls.wait[idle], stood.bubble[idle]
    entries = run.plan_of(rank).steps
    found: Times = {}
    for index, start, end in zip(
        *(column[rows].tolist() for column in (spans.index, spans.start, spans.end)), strict=True
    ):
        action = entries[index].action
        if action.op == Op.R:
            action = replace(action, op=Op.B)
        inside = int(lost[(begun >= start) & (begun < end)].sum())
        first, last, before = found.get(action, (start, end, 0))
        found[action] = min(first, start), max(last, end), before + inside
    return found  # fmt: skip


def _bubble(stages: Sequence[Times]) -> float:
    """Return the idle share of the pipelined part, mean over stages."""
    busy = sum(last - first - lost for times in stages for first, last, lost in times.values())
    return 1 - busy / (len(stages) * _whole(stages))


def _whole(stages: Sequence[Times]) -> int:
    """Return the ns from the first action of any stage to the end of the last."""
    spans = [span for times in stages for span in times.values()]
    return max(last for _, last, _ in spans) - min(first for first, _, _ in spans)


def _costs(by_step: Sequence[Sequence[Times]]) -> dict[tuple[int, Op], float]:
    """Return the median ns of an F, B or W of each chunk, without the time that messages held it up."""
    samples: dict[tuple[int, Op], list[int]] = defaultdict(list)
    for stages in by_step:
        for times in stages:
            for action, (first, last, lost) in times.items():
                samples[action.chunk, action.op].append(last - first - lost)
    return {key: float(median(values)) for key, values in samples.items()}


def _levelled(costs: dict[tuple[int, Op], float]) -> dict[tuple[int, Op], float]:
    """Return the costs with each chunk's replaced by the mean over chunks."""
    by_op: dict[Op, list[float]] = defaultdict(list)
    for (_, op), cost in costs.items():
        by_op[op].append(cost)
    return {(chunk, op): sum(by_op[op]) / len(by_op[op]) for chunk, op in costs}


def _simulated(orders: Sequence[list[Action]], where: Sequence[int], costs: dict[tuple[int, Op], float]) -> Timeline:
    return simulate(orders, where, lambda rank, action: costs.get((action.chunk, action.op), 0.0))


def _stages(
    layout: Layout, where: Sequence[int], costs: dict[tuple[int, Op], float], by_step: Sequence[Sequence[Times]]
) -> list[dict[str, Any]]:
    found = []
    for stage in range(layout.pp):
        held = [chunk for chunk, holder in enumerate(where) if holder == stage]
        row: dict[str, Any] = {"stage": stage}
        for name, op in (("forward_s", Op.F), ("backward_s", Op.B), ("weight_s", Op.W)):
            row[name] = sum(costs.get((chunk, op), 0.0) for chunk in held) / 1e9
        busy = [sum(last - first - lost for first, last, lost in stages[stage].values()) for stages in by_step]
        whole = [_whole(stages) for stages in by_step]
        row["busy"] = sum(busy) / sum(whole)
        found.append(row)
    return found


def _gantt(stages: Sequence[Times]) -> list[list[list[Any]]]:
    """Return [start_s, end_s, action] per stage, without the time in which an action waits for its message."""
    zero = min(first for times in stages for first, _, _ in times.values())
    rows = []
    for times in stages:
        ordered = sorted(times.items(), key=lambda item: item[1])
        rows.append([[(first + lost - zero) / 1e9, (last - zero) / 1e9, str(a)] for a, (first, last, lost) in ordered])
    return rows


def _ideal(timeline: Timeline) -> list[list[list[Any]]]:
    return [
        [[s.start / 1e9, s.end / 1e9, str(s.action)] for s in rank if s.action.op in COMPUTE and s.end > s.start]
        for rank in timeline.spans
    ]


def _advice(stages: list[dict[str, Any]], measured: float, simulated: float, structural: float) -> dict[str, Any]:
    """Return what to try, and the stage that holds the others up, if one does.

    Such a stage comes first; otherwise the advice follows the largest part of the bubble.
    """
    loads = [s["forward_s"] + s["backward_s"] + s["weight_s"] for s in stages]
    slowest = max(range(len(loads)), key=loads.__getitem__)
    ratio = loads[slowest] * len(loads) / sum(loads)
    parts = {"structural": structural, "imbalance": simulated - structural, "transfer": measured - simulated}
    largest = max(parts, key=lambda name: parts[name])
    if ratio >= IMBALANCED and parts["imbalance"] >= WORTH:
        advice = (
            f"stage {slowest} takes {ratio:.2f} x the time of the mean stage: move a layer to another stage "
            "(parallel.layers), or check its device"
        )
        return {"advice": advice, "slow_stage": slowest}
    advice = "actions start later than the schedule allows, due to messages, waits inside stages or a busy machine"
    if largest == "structural":
        advice = (
            "the schedule itself causes most of the bubble: try more micro-batches (a smaller train.micro_batch or a "
            "larger global_batch), or schedule interleaved with virtual_stages 2"
        )
    return {"advice": advice, "slow_stage": None}
