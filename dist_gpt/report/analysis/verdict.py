"""State in one line what a run is bound by, with the reason and what to try next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dist_gpt.events import TRAIN
from dist_gpt.report.analysis.headline import step_times
from dist_gpt.report.read.load import Run
from dist_gpt.report.units import count_of, percent
from dist_gpt.skips import Skipped

BOUND = 0.10
"""Smallest share of the step at which a loss counts as what a run is bound by."""
NEARLY_ALL = 0.9
BLAMED = 0.5
"""Smallest share of an axis' waiting at which the rank that caused it is named."""
AXES = {
    "tp": "tensor-parallel", "data": "data-parallel", "dp": "data-parallel", "pp": "pipeline", "cp": "context-parallel",
    "shard": "state-sharding", "replica": "state-replica", "embed": "tied-embedding", "world": "loss and norm",
}  # fmt: skip
DATA = "data loading"
"""Name of this loss, since `data` is the axis."""
NEXT = {
    "tp": "try a smaller parallel.tp (more dp or pp), keep a tp group inside one node, or a larger micro-batch",
    "data": "try smaller buckets (optim.bucket_mb), so that reductions overlap with the backward, or larger batches",
    "shard": "try larger micro-batches, or a sharding that moves fewer bytes (optim.sharding, optim.reshard: step)",
    "replica": "try larger batches: the traffic between nodes, once a step, does not grow with them",
    "pp": "try larger micro-batches, fewer pipeline stages, or stages on one node",
    "cp": "try a smaller parallel.cp or longer sequences",
    "embed": "untie the embeddings, or look at the first and the last pipeline stage",
    "world": "look at the rank that comes last: this collective carries only 24 bytes",
    "descheduled": "use as many ranks x threads as there are cores (OMP_NUM_THREADS), and check for other jobs on this "
    "machine",
    DATA: "read from a faster disk, or prepare the tokens beforehand",
    "unexplained": "the host is slow between entries of the step list: look at a torch.profiler window (profile.torch)",
}


def losses(budget_s: dict[str, float]) -> dict[str, float]:
    """Return the seconds of a step not spent computing, by what would fix them; an axis has its waits and transfers."""
    found: dict[str, float] = {}
    for name, seconds in budget_s.items():
        if "." in name:
            axis = name.split(".", 1)[1]
            found[axis] = found.get(axis, 0.0) + seconds
        elif name in ("bubble", "data", "checkpoint", "descheduled", "unexplained"):
            found[DATA if name == "data" else name] = seconds
    return found


@dataclass
class Verdict:
    """Verdict on a run. Shares are of the step; `culprit` is the rank that causes most of the loss, if one does."""

    line: str
    why: str
    next: str
    bound_by: str | None
    share: float | None = None
    wait_share: float | None = None
    culprit: int | None = None


def verdict(
    run: Run,
    budget_s: dict[str, float],
    stragglers: dict[str, Any] | None,
    collectives: list[dict[str, Any]],
    pipeline: dict[str, Any] | None,
) -> Verdict:
    """Return the verdict: the largest loss of the step, with the reason and what to try."""
    wall = sum(budget_s.values())
    lost = losses(budget_s)
    worst = max(lost, key=lambda name: lost[name], default=None)
    if worst is None or wall <= 0:
        return _without_window(run)
    late = _straggler(run, lost, stragglers)
    worst = late if late is not None else worst
    share = lost[worst] / wall
    if share < BOUND:
        compute = 1 - sum(lost.values()) / wall
        why = f"the largest loss is {_named(worst)}, {percent(share)} of the step"
        advice = "make matmuls larger or faster (see the roofline)"
        return Verdict(f"bound by computing: {percent(compute)} of the step", why, advice, "compute", compute)
    if worst in AXES:
        return _axis_verdict(run, worst, budget_s, wall, stragglers, collectives)
    why, advice, culprit = _reason(run, worst, pipeline)
    line = f"bound by {_named(worst)}: {percent(share)} of the step"
    if culprit is not None:
        line += f", most of it waiting for rank {culprit}"
    return Verdict(line, why, advice, "data" if worst == DATA else worst, share, None, culprit)


def with_skipped_steps(run: Run, said: Verdict) -> Verdict:
    """Return the verdict on a run's time with its skipped steps, which take time like any other, added to it.

    They come first if they made the run fail, and last if they are ordinary.
    """
    skipped = Skipped.of(run.metrics)
    if skipped.failed:
        trained = f"{skipped.steps - skipped.count} of {skipped.steps} steps changed the weights"
        why = f"{trained}. Skipped steps take time too: {said.line}; {said.why}"
        line = f"{skipped.text()}: the run failed" if run.failed else skipped.text()
        return replace(said, line=line, why=why, next=skipped.change)
    return replace(said, why=f"{said.why}. {skipped.text()}") if skipped.count else said


def _without_window(run: Run) -> Verdict:
    """Return the verdict from the always-on counters: how long each axis blocked a rank, mean over ranks and steps."""
    why = "outside a profiling window only counts, bytes and blocked times are recorded"
    advice = "run with --set profile.steps=[10,20] to see which ranks wait for which and what is exposed"
    steps = [fact for log in run.ranks.values() for fact in log.steps if fact["phase"] == TRAIN and fact["step"] > 1]
    wall = sum(fact["step_s"] for fact in steps)
    blocked: dict[str, float] = {}
    for fact in steps:
        for axis, seconds in (fact.get("blocked_s") or {}).items():
            blocked[axis] = blocked.get(axis, 0.0) + seconds
    if not steps or not wall:
        return Verdict("no training step was recorded", "the run ended before its second step", advice, None)
    worst = max(blocked, key=lambda axis: blocked[axis], default=None)
    share = blocked[worst] / wall if worst is not None else 0.0
    if len(run.ranks) == 1 and share == 0.0:
        return Verdict("one rank, so there is no communication", why, advice, None, 0.0)
    if worst is None or share < BOUND:
        total = sum(blocked.values()) / wall
        return Verdict(f"communication blocks ranks for {percent(total)} of the step", why, advice, None, total)
    what = f"{AXES.get(worst, worst)} communication blocks ranks for {percent(share)} of the step"
    return Verdict(what, why, advice, None, share)


def _axis_verdict(
    run: Run,
    axis: str,
    budget_s: dict[str, float],
    wall: float,
    stragglers: dict[str, Any] | None,
    collectives: list[dict[str, Any]],
) -> Verdict:
    wait, transfer = budget_s.get(f"wait.{axis}", 0.0), budget_s.get(f"transfer.{axis}", 0.0)
    culprit = _culprit(axis, stragglers, wait * len(run.ranks))
    what, mostly = _operation(axis, wait + transfer, collectives)
    line = f"bound by {what}: {percent((wait + transfer) / wall)} of the step exposed{mostly}"
    if culprit is not None:
        points = 100 * culprit["axes"][axis] / len(run.ranks) / wall
        line += f", {points:.0f} points of it waiting for rank {culprit['rank']}"
    elif wait / wall >= 0.01:
        line += f", {100 * wait / wall:.0f} points of it waiting for the slowest rank"
    if culprit is not None and wait > transfer:
        why = f"rank {culprit['rank']} delays the others {_how_often(culprit)}"
        advice = f"check rank {culprit['rank']}: its host, its device, other jobs there (see stragglers)"
    elif wait > transfer:
        why = "ranks reach their collectives at different times; no single rank is the cause"
        advice = (
            "see the stragglers (an uneven split of layers shows there too), and check for other jobs on the machine"
        )
    else:
        why = f"{percent(transfer / wall)} of the step is transfer: messages are in flight and nothing is computed"
        advice = NEXT.get(axis, "see the collectives")
    if len(run.ranks) < run.layout.world:
        why += ". Not all ranks were read: waiting for the missing ones is shown as transfer"
    if (crowded := crowd(run)) is not None:
        why, advice = f"{why}. {crowded}, so these times include waiting for a CPU", NEXT["descheduled"]
    bound_by = f"{'wait' if wait > transfer else 'transfer'}.{axis}"
    rank = culprit["rank"] if culprit is not None else None
    return Verdict(line, why, advice, bound_by, (wait + transfer) / wall, wait / wall, rank)


def _operation(axis: str, exposed: float, collectives: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the axis' operation if one makes nearly all exposed time; else the axis, and the one that makes most."""
    by_op: dict[str, float] = {}
    for row in collectives:
        if row["axis"] == axis:
            by_op[row["op"]] = by_op.get(row["op"], 0.0) + row["exposed_s"] + row["wait_s"]
    most = max(by_op, key=lambda op: by_op[op], default=None)
    if most is None or not exposed:
        return f"{AXES[axis]} communication", ""
    name, share = most.replace("_", "-"), by_op[most] / sum(by_op.values()) if sum(by_op.values()) else 0.0
    if share >= NEARLY_ALL:
        return f"{AXES[axis]} {name}", ""
    return f"{AXES[axis]} communication", f" (mostly {name})" if share >= BLAMED else ""


def _straggler(run: Run, lost: dict[str, float], stragglers: dict[str, Any] | None) -> str | None:
    """Return the axis on which the worst straggler does most harm, or None if it is not the largest loss.

    A straggler is the largest loss if all that it causes, on whatever axes, is more than any loss without it.
    """
    rows = (stragglers or {}).get("culprits", [])
    total = sum((stragglers or {}).get("caused_s", []))
    if not rows or rows[0]["caused_s"] < BLAMED * total:
        return None
    mine = {axis: seconds / len(run.ranks) for axis, seconds in rows[0]["axes"].items()}
    without = [seconds - mine.get(name, 0.0) for name, seconds in lost.items()]
    return max(mine, key=lambda axis: mine[axis]) if sum(mine.values()) > max(without) else None


def _culprit(axis: str, stragglers: dict[str, Any] | None, waited_s: float) -> dict[str, Any] | None:
    """Return the straggler that caused most of `waited_s`, the waiting of all ranks on the axis; None if none did."""
    rows = (stragglers or {}).get("culprits", [])
    worst = max(rows, key=lambda row: row["axes"].get(axis, 0.0), default=None)
    return worst if worst is not None and waited_s and worst["axes"].get(axis, 0.0) >= BLAMED * waited_s else None


def _how_often(row: dict[str, Any]) -> str:
    often = "in nearly every step" if row["kind"] == "persistent" else "in some steps"
    return f"{often}, by {1e3 * row['caused_s']:.1f} ms per step summed over the waiting ranks"


def _named(loss: str) -> str:
    names = {
        "bubble": "the pipeline bubble", "descheduled": "too few CPUs", "checkpoint": "checkpoints",
        "unexplained": "time that the profile does not explain",
    }  # fmt: skip
    return names.get(loss, f"{AXES.get(loss, loss)} communication")


def _reason(run: Run, loss: str, pipeline: dict[str, Any] | None) -> tuple[str, str, int | None]:
    """Return why, what to try, and the rank that causes the loss, if one does."""
    if loss == "bubble" and pipeline is not None:
        b = pipeline["bubble"]
        why = (
            f"stages are idle for {percent(b['measured'])} of the pipelined part: {percent(b['structural'])} from the "
            f"schedule, {percent(b['imbalance'])} from uneven stages, {percent(b['transfer'])} from messages and waits"
        )
        slow = pipeline["slow_stage"]
        return why, pipeline["advice"], None if slow is None else run.layout.rank(slow, 0, 0, 0)
    if loss == "bubble":
        return "stages wait for messages from other stages", NEXT["pp"], None
    if loss == "descheduled":
        why = crowd(run) or "Other jobs use this machine, or other threads of a rank hold the interpreter"
        return f"ranks waited for a CPU, not for each other. {why}", NEXT[loss], None
    return "see the budget", NEXT.get(loss, "see the budget by rank"), None


def crowd(run: Run) -> str | None:
    """Return `8 ranks x 1 thread share 2 cores of HOST` if cores are too few; None if not, and on a GPU."""
    header = next(iter(run.ranks.values())).header
    here = sum(log.header.get("host") == header.get("host") for log in run.ranks.values())
    threads, cores = header.get("threads") or 1, header.get("cores")
    if header.get("device") != "cpu" or not isinstance(cores, int) or here * threads <= cores:
        return None
    ranks, each, shared = count_of(here, "rank"), count_of(threads, "thread"), count_of(cores, "core")
    return f"{ranks} x {each} share{'s' if here == 1 else ''} {shared} of {header.get('host')}"


def profiling_cost(run: Run, window: list[int]) -> dict[str, Any]:
    """Return the cost of recording: steps inside the window against those outside, and the always-on ledger alone."""
    times = step_times(run)
    watched = {log.memory["step"] for log in run.ranks.values() if log.memory and log.memory.get("step")}
    inside = sorted(s for step, s in times.items() if step in window)
    outside = sorted(s for step, s in times.items() if step not in window and step not in watched and step > 1)
    end = next((log.end for log in run.ranks.values() if log.end), None)
    middle = {name: values[len(values) // 2] if values else None for name, values in (("in", inside), ("out", outside))}
    record_s = end["record_ns"] / 1e9 if end else None
    step_s = middle["out"] or middle["in"]
    return {
        "step_s_inside": middle["in"],
        "step_s_outside": middle["out"],
        "ratio": middle["in"] / middle["out"] if middle["in"] and middle["out"] else None,
        "record_s": record_s,
        "records_per_step": end["records_per_step"] if end else None,
        "share": record_s * end["records_per_step"] / step_s if end and record_s and step_s else None,
    }
