"""Build the report's document from a run directory: plain JSON that pages, figures and comparisons read.

    document = analyze(load("runs/demo"))

Sections that need the profiling window are null or empty without one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from dist_gpt.events import OPS, TRAIN
from dist_gpt.report.analysis import collectives, pipeline, predicted, stragglers
from dist_gpt.report.analysis.clocks import Clocks, align
from dist_gpt.report.analysis.headline import headline, waterfall
from dist_gpt.report.analysis.identity import accounting, definitions, files, flat, identity
from dist_gpt.report.analysis.match import Calls, Meetings, match
from dist_gpt.report.analysis.replay import ReplayError, build, critical_path, free_axes
from dist_gpt.report.analysis.time_breakdown import KINDS, Blocked, Budget, Spans, blocked, budget, read_spans
from dist_gpt.report.analysis.verdict import profiling_cost, verdict, with_skipped_steps
from dist_gpt.report.read.load import Run

SCHEMA = 1
DRAWN_RANKS = 8


@dataclass
class Profile:
    """Data of the profiling window on one clock, shared by the sections of the report."""

    run: Run
    clocks: Clocks
    calls: Calls
    meetings: Meetings
    spans: Spans
    stood: Blocked
    budget: Budget

    @property
    def median_step(self) -> int | None:
        """Profiled step of median duration (of its slowest rank), which is drawn and replayed; None without any."""
        longest = self.budget.wall.max(axis=0) if self.budget.wall.size else np.empty(0)
        return self.budget.steps[int(np.argsort(longest)[len(longest) // 2])] if len(longest) else None


def profile(run: Run) -> Profile:
    """Align the clocks, match the calls and split the time of the steps that all ranks in `run` have finished."""
    _drop_unfinished(run)
    clocks = align(run)
    calls, meetings = match(run, clocks)
    spans = read_spans(run, clocks)
    stood = blocked(run, calls, meetings, spans)
    return Profile(run, clocks, calls, meetings, spans, stood, budget(run, calls, spans, stood))


def _drop_unfinished(run: Run) -> None:
    """Drop rows of steps that not all ranks have ended (the run continues, or died): means count whole steps."""
    ended = [{fact["step"] for fact in log.steps if fact["phase"] == TRAIN} for log in run.ranks.values()]
    whole = np.array(sorted(set.intersection(*ended)) if ended else [], dtype=np.int64)
    for log in run.ranks.values():
        log.calls = log.calls[np.isin(log.calls[:, 0], whole)]
        log.spans = log.spans[np.isin(log.spans[:, 0], whole)]


def analyze(run: Run, found: Profile | None = None) -> dict[str, Any]:
    """Return the report's document, ready for JSON; `found` is the profile of `run` if the caller has it."""
    p = found or profile(run)
    profiled = bool(p.budget.steps)
    sections = _window_sections(p) if profiled else _EMPTY
    memory = predicted.memory(run)
    time = verdict(run, sections["budget_s"], sections["stragglers"], sections["collectives"], sections["pipeline"])
    said = with_skipped_steps(run, time)
    document = {
        "schema": SCHEMA,
        "name": run.config.name,
        "run_dir": str(run.folder),
        "generated": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "verdict": {**asdict(said), "profiling": profiling_cost(run, p.budget.steps)},
        "failed": run.failed or None,
        "problems": run.problems,
        "identity": identity(run, p.clocks, p.budget.steps),
        "config": flat(run.config),
        "headline": headline(run, p.budget),
        **sections,
        "memory_bytes": memory,
        "predicted": predicted.predicted(run, memory, sections["pipeline"]),
        "roofline": predicted.roofline(run),
        "torch_kernels": [],
        "device_samples": [{"rank": rank, **row} for rank, log in run.ranks.items() for row in log.samples],
        "accounting": accounting(run),
        "engine": next((log.engine for log in run.ranks.values() if log.engine is not None), None),
        "definitions": definitions(),
        "files": files(run),
    }
    return dict(_finite(document))


_EMPTY: dict[str, Any] = {
    "budget_s": {}, "budget_by_rank": [], "budget_spread_s": {}, "waterfall": [], "collectives": [], "traffic": None,
    "sizes": [], "overlap": None, "timeline": None, "free": [], "replay_error": None, "stragglers": None,
    "pipeline": None, "critical_path": None,
}  # fmt: skip


def _window_sections(p: Profile) -> dict[str, Any]:
    parts = collectives.parts_of(p.calls, p.meetings, len(p.budget.steps))
    mean = p.budget.mean_s()
    charges = stragglers.charge(p.calls, p.meetings, p.stood, p.budget)
    drawn = p.median_step or 0
    return {
        "budget_s": mean,
        "budget_by_rank": [{"rank": rank, **p.budget.of_rank_s(rank)} for rank in p.budget.ranks],
        "budget_spread_s": _spread(p.budget),
        "waterfall": waterfall(p.run, mean),
        "collectives": collectives.table(p.calls, p.meetings, p.stood, parts),
        "traffic": collectives.traffic(p.calls, parts, list(p.run.ranks)),
        "sizes": collectives.sizes(p.calls, parts),
        "overlap": collectives.overlap(p.run, p.calls, p.meetings, p.stood, parts, p.spans),
        "timeline": _timeline(p, drawn),
        **_replayed(p, drawn),
        "stragglers": stragglers.document(charges, p.budget, p.budget.computing),
        "pipeline": pipeline.pipeline_document(p.run, p.calls, p.spans, p.stood, drawn),
    }


def _spread(found: Budget) -> dict[str, float]:
    """Return the standard error of each category's mean over steps, in seconds; empty for fewer than two steps."""
    count = len(found.steps)
    if count < 2:
        return {}
    return {name: float(part.mean(axis=0).std(ddof=1)) / math.sqrt(count) / 1e9 for name, part in found.parts.items()}


def _replayed(p: Profile, step: int) -> dict[str, Any]:
    """Replay the step: return its duration with each axis free, and its critical path; both empty if that fails."""
    try:
        graph = build(p.run, p.clocks, p.calls, p.meetings, step)
        path = critical_path(graph)
        total = sum(part["s"] for part in path)
        return {
            "free": free_axes(graph),
            "replay_error": graph.replay_error,
            "critical_path": {"step": step, "step_s": total, "parts": path},
        }
    except ReplayError as error:
        p.run.problems.append(f"step {step} cannot be replayed: {error}")
        return {"free": [], "replay_error": None, "critical_path": None}


def _timeline(p: Profile, step: int) -> dict[str, Any]:
    """Return one step of at most DRAWN_RANKS ranks: their computing, and every collective from issue to end."""
    chosen = p.budget.ranks[:: -(-len(p.budget.ranks) // DRAWN_RANKS)]
    zero = min((int(p.spans.start[p.spans.of(r)][p.spans.step[p.spans.of(r)] == step].min(initial=1 << 62))
                for r in chosen), default=0)  # fmt: skip
    return {"step": step, "ranks": [{"rank": rank, "lanes": _lanes(p, rank, step, zero)} for rank in chosen]}


def _lanes(p: Profile, rank: int, step: int, zero: int) -> list[dict[str, Any]]:
    here, of = p.spans.of(rank), p.calls.of(rank)
    rows = np.flatnonzero(p.spans.step[here] == step) + here.start
    entries = p.run.plan_of(rank).steps
    spans = []
    for row in rows.tolist():
        kind, index = KINDS[p.spans.kind[row]], int(p.spans.index[row])
        if kind != "message":
            label = str(entries[index]) if index >= 0 else "data"
            spans.append([*_seconds(zero, p.spans.start[row], p.spans.end[row]), kind, label])
    lanes = [{"lane": "compute", "spans": spans}]
    for number, axis in enumerate(p.calls.axes):
        rows = np.flatnonzero((p.calls.step[of] == step) & (p.calls.axis[of] == number)) + of.start
        if len(rows):
            lanes.append({"lane": axis, "spans": [span for row in rows.tolist() for span in _pieces(p, row, zero)]})
    return lanes


def _pieces(p: Profile, row: int, zero: int) -> list[list[Any]]:
    """Return the spans of one call: in flight without blocking its rank (overlapped), then wait, then transfer."""
    c = p.calls
    payload = int(p.meetings.payload[c.meeting[row]]) if c.meeting[row] >= 0 else int(c.payload[row])
    label = f"{OPS[c.op[row]].replace('_', '-')} {payload:,} B"
    if c.wait[row] < 0:
        return [[*_seconds(zero, c.issue[row], max(c.done[row], c.issued[row])), "overlapped", label]]
    waiting = int(p.stood.wait[row] + p.stood.bubble[row])
    moment = int(c.wait[row])
    pieces = [[*_seconds(zero, c.issue[row], moment), "overlapped", label]] if moment > c.issued[row] else []
    if waiting:
        pieces.append([*_seconds(zero, moment, moment + waiting), "wait", label])
    if c.waited[row] > moment + waiting:
        pieces.append([*_seconds(zero, moment + waiting, c.waited[row]), "transfer", label])
    return pieces


def _seconds(zero: int, start: Any, end: Any) -> list[float]:
    return [round((int(start) - zero) / 1e9, 7), round((int(end) - zero) / 1e9, 7)]


def _finite(value: Any) -> Any:
    """Return `value` with plain Python numbers, and None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
