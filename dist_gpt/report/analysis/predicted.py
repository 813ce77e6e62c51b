"""Compare the plan with measurements (bytes, memory, bubble), and kernels with the device's ceiling."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from dist_gpt.events import TRAIN, Counts
from dist_gpt.plan.count import count_comm, count_memory
from dist_gpt.plan.steps import RankPlan
from dist_gpt.report.read.load import Run

EXACT_RANKS = 64
"""Most ranks whose memory is planned one by one; of more, those alike but for padding share a plan."""

SHOWN_RANKS = 16
"""Most ranks whose memory is compared with the plan; of more, one rank of each stage is."""


def predicted(run: Run, memory: list[dict[str, Any]], pipeline: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the `predicted` of a report: rows with `predicted`, `measured`, `error` (relative) and `unit`.

    Times are not among them, since the plan predicts none.
    """
    rows = _bytes(run)
    shown = set(run.ranks)
    if len(shown) > SHOWN_RANKS:
        shown = {run.layout.rank(stage, 0, 0, 0) for stage in range(run.layout.pp)}
    for row in memory:
        if row["measured"] is None or row["rank"] not in shown:
            continue
        for name in row["predicted"]:
            pair = row["predicted"][name], row["measured"].get(name)
            rows.append(_row(f"memory, {name}, rank {row['rank']}", *pair, "B", name in ("parameters", "gradients")))
    if pipeline is not None:
        bubble = pipeline["bubble"]
        rows.append(_row("bubble (planned with FLOPs as time)", bubble["planned"], bubble["measured"], "share", False))
        rows.append(
            _row("bubble (simulated with measured costs)", bubble["simulated"], bubble["measured"], "share", False)
        )
    return rows


def _row(what: str, want: Any, got: Any, unit: str, exact: bool) -> dict[str, Any]:
    if not all(isinstance(value, (int, float)) for value in (want, got)):
        want = want if isinstance(want, (int, float)) else None
        return {"what": what, "predicted": want, "measured": got, "error": None, "unit": unit, "must_be_equal": exact}
    error = (got - want) / want if want else float(got != want)
    return {"what": what, "predicted": want, "measured": got, "error": error, "unit": unit, "must_be_equal": exact}


def _bytes(run: Run) -> list[dict[str, Any]]:
    """Compare payload and calls per step of all ranks read, by axis and operation, from the always-on counters."""
    planned, issued = Counts(), Counts()
    steps: dict[int, int] = defaultdict(int)
    for rank, log in run.ranks.items():
        plan = run.plan_of(rank)
        for fact in log.steps:
            if fact["phase"] != TRAIN:
                continue
            steps[rank] += 1
            for axis, ops in fact["comm"].items():
                for op, tally in ops.items():
                    into = issued.tallies[axis, op]
                    into.add(tally["calls"], tally["payload_bytes"], tally["wire_bytes"])
        planned.merge(count_comm(plan, plan.steps), steps[rank])
    most = max(steps.values(), default=0) or 1
    rows = []
    for axis, op in sorted(set(planned.tallies) | set(issued.tallies)):
        if op == "recv":  # counted at the sender
            continue
        want, got = planned.tallies[axis, op], issued.tallies[axis, op]
        pairs = (
            ("payload", "B/step", want.payload_bytes, got.payload_bytes),
            ("calls", "1/step", want.calls, got.calls),
        )
        for what, unit, a, b in pairs:
            rows.append(_row(f"{axis} {op}, {what} of all ranks", _each(a, most), _each(b, most), unit, True))
    return rows


def _each(total: int, steps: int) -> float:
    """Return `total` per step, as an int if it divides evenly."""
    return total // steps if total % steps == 0 else total / steps


def memory(run: Run) -> list[dict[str, Any]]:
    """Return the `memory_bytes` of a report, a row per rank."""
    rows = []
    for rank, log in run.ranks.items():
        plan = RankPlan(run.config, rank) if run.layout.world <= EXACT_RANKS else run.plan_of(rank)
        seen = log.memory
        rows.append(
            {
                "rank": rank,
                "predicted": count_memory(plan, plan.steps),
                "measured": seen["parts"] if seen else None,
                "allocated_peak": seen.get("peak_bytes") if seen else None,
                "source": seen.get("source") if seen else None,
                "rss": seen.get("rss_bytes") if seen else None,
            }
        )
    return rows


def roofline(run: Run) -> dict[str, Any]:
    """Return the `roofline` of a report: one rank's kernels, measured alone, under the best that its device did."""
    log = next((log for log in run.ranks.values() if log.ceiling), None)
    if log is None or log.ceiling is None:
        return {"ceiling": None, "kernels": []}
    ceiling = {**log.ceiling, "source": f"a large matmul and a large copy, measured on rank {log.rank}'s device"}
    kernels = []
    for kernel in log.kernels:
        speed = kernel["flops"] / kernel["seconds"] if kernel["seconds"] else 0.0
        reach = min(ceiling["flops_per_s"], kernel["flops"] / max(1, kernel["bytes"]) * ceiling["bytes_per_s"])
        kernels.append({**kernel, "flops_per_s": speed, "share_of_ceiling": speed / reach if reach else None})
    return {"ceiling": ceiling, "kernels": kernels}
