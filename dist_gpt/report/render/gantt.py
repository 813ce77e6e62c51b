"""Figures over time: one step of several ranks in lanes, the pipeline as measured above the ideal, and the bubble."""

from __future__ import annotations

import re
from typing import Any

from matplotlib.axes import Axes

from dist_gpt.report import units
from dist_gpt.report.render import palette
from dist_gpt.report.render.canvas import FAINT, INK, MUTED, PAGE, WIDE, Canvas, compound, time_axis
from dist_gpt.report.render.elements import dict_of, list_of, rows_of, short
from dist_gpt.report.units import amount, number

MOST_RANKS, MOST_TIPS = 8, 2500
_ACTION = re.compile(r"(\d+)?([A-Z]+(?:_[A-Z]+)?)(\d+)?")
_KINDS = {
    "F": "forward", "B": "backward", "W": "weight", "R": "recompute", "STEP": "optimizer", "REDUCE": "transfer.data",
    "SEND_F": "transfer.pp", "SEND_B": "transfer.pp", "RECV_F": "wait.pp", "RECV_B": "wait.pp",
}  # fmt: skip

Span = tuple[float, float, str, str]
Paint = tuple[str, bool, float]


def spans_of(value: Any) -> list[Span]:
    """Return [start_s, end_s, kind, label] lists as tuples, without those that have no duration."""
    spans = []
    for row in list_of(value):
        if isinstance(row, (list, tuple)) and len(row) >= 3:
            start, end = number(row[0]), number(row[1])
            if start is not None and end is not None and end > start:
                spans.append((start, end, str(row[2]), str(row[3]) if len(row) > 3 else str(row[2])))
    return spans


def timeline(doc: dict[str, Any]) -> Canvas | None:
    """Draw one step: for each rank a compute lane above one lane per communication axis; None without data."""
    ranks = rows_of(dict_of(doc.get("timeline")).get("ranks"))[:MOST_RANKS]
    lanes = [
        (f"rank {short(row.get('rank'), 8)}", short(lane.get("lane"), 9), spans)
        for row in ranks
        for lane in rows_of(row.get("lanes"))[:8]
        if (spans := spans_of(lane.get("spans")))
    ]
    if not lanes:
        return None
    origin = min(span[0] for _, _, spans in lanes for span in spans)
    longest = max(span[1] for _, _, spans in lanes for span in spans) - origin
    tops, y, last = [], 0.0, ""
    for rank, lane, _ in lanes:
        y += 10 if rank != last and last else 0
        tops.append(y)
        y, last = y + (20 if lane == "compute" else 15), rank
    left = 142
    keys = _timeline_keys(lanes)
    above = Canvas(WIDE, 10).legend(keys, left, 0, WIDE) + 8
    canvas = Canvas(WIDE, above + y + 48)
    canvas.legend(keys, left, 2, WIDE)
    axes = canvas.axes(left, above, WIDE - left - 14, y)
    factor = time_axis(axes, longest, "time since the step began")
    axes.set_ylim(y, 0)
    axes.set_yticks([])
    tips, last, scale = MOST_TIPS, "", (origin, factor, longest)
    for top, (rank, lane, spans) in zip(tops, lanes, strict=True):
        if rank != last:
            canvas.text(0, above + top + 9, rank, color=INK, weight="bold")
        name = "doing" if lane == "compute" else lane
        canvas.text(left - 8, above + top + (9 if lane == "compute" else 6.5), name, 12, ha="right")
        drawn = [
            (start, end, _paint(lane, kind), f"{rank}, {lane}: {label}, {kind}") for start, end, kind, label in spans
        ]
        if lane == "compute":  # a rank that is blocked inside an entry does not compute
            drawn += [
                (start, end, _paint(name, kind), f"{rank} is blocked: {label}, {kind}")
                for owner, name, calls in lanes
                if owner == rank and name != "compute"
                for start, end, kind, label in calls
                if kind in ("transfer", "wait")
            ]
        tips -= _lane(canvas, axes, (top, 18.0 if lane == "compute" else 12.0), drawn, scale, tips)
        last = rank
    return canvas


def _paint(lane: str, kind: str) -> Paint:
    """Return the fill, striped and opacity of a span; waiting for a message of the pipeline is bubble."""
    if lane == "compute":
        return palette.colour(kind), palette.is_striped(kind), 1.0
    if lane == "pp" and kind == "wait":
        return palette.colour("bubble"), False, 1.0
    return palette.axis_colour(lane), kind == "wait", 0.35 if kind == "overlapped" else 1.0


def _timeline_keys(lanes: list[tuple[str, str, list[Span]]]) -> list[tuple[str, str, bool]]:
    kinds = {kind for _, lane, spans in lanes if lane == "compute" for _, _, kind, _ in spans}
    kinds |= {"bubble" for _, lane, spans in lanes if lane == "pp" for _, _, kind, _ in spans if kind == "wait"}
    keys = [(palette.label(kind), palette.colour(kind), palette.is_striped(kind)) for kind in palette.ordered(kinds)]
    axes = palette.ordered({f"transfer.{lane}" for _, lane, _ in lanes if lane != "compute"})
    return keys + [(palette.label(key), palette.colour(key), False) for key in axes] + [
        ("striped: waiting for a later rank", MUTED, True), ("faint: under compute", FAINT, False),
    ]  # fmt: skip


def _lane(
    canvas: Canvas,
    axes: Axes,
    where: tuple[float, float],
    spans: list[tuple[float, float, Paint, str]],
    scale: tuple[float, float, float],
    tips: int,
) -> int:
    """Draw one lane; return the number of spans with a tip: all that are wide enough, or none if over `tips` are."""
    (top, height), (origin, factor, longest) = where, scale
    wide = [(end - start) * 760 > 1.5 * longest for start, end, *_ in spans]
    single = sum(wide) <= tips
    groups: dict[Paint, list[tuple[float, float, float, float]]] = {}
    for place, ((start, end, paint, tip), is_wide) in enumerate(zip(spans, wide, strict=True)):
        box = ((start - origin) * factor, top, (end - start) * factor, height)
        if is_wide and single:
            said = f"{tip}, {units.seconds(end - start)}"
            canvas.paint(axes, box, paint[0], paint[1], said, alpha=paint[2], zorder=2 + 1e-4 * place)
        else:
            groups.setdefault(paint, []).append(box)
    for place, ((fill, striped, alpha), boxes) in enumerate(groups.items()):
        order = 2 + 1e-4 * (len(spans) + place) if single else 2.0
        axes.add_artist(compound(boxes, fill, striped, alpha=alpha, clip_on=False, zorder=order))
    return sum(wide) if single else 0


def cell_of(name: str) -> tuple[int, str, str]:
    """Return the chunk, budget category and micro-batch of an action such as `2F0`."""
    match = _ACTION.fullmatch(name)
    if match is None or match[2] not in _KINDS:
        return 0, "unexplained", ""
    return int((match[1] or "0")[:6]), _KINDS[match[2]], (match[3] or "")[:4]


def pipeline(doc: dict[str, Any]) -> Canvas | None:
    """Draw the stages over one time axis, measured above the schedule's ideal; None without data."""
    part = dict_of(doc.get("pipeline"))
    charts = [
        (name, [spans_of(stage) for stage in list_of(part.get(key))][:64])
        for name, key in (("measured", "measured"), ("ideal", "ideal"))
    ]
    charts = [(name, stages) for name, stages in charts if any(stages)]
    if not charts:
        return None
    longest = max(span[1] for _, stages in charts for spans in stages for span in spans)
    kinds = {cell_of(span[2])[1] for _, stages in charts for spans in stages for span in spans}
    keys = [(palette.label(k), palette.colour(k), palette.is_striped(k)) for k in palette.ordered(kinds)]
    if any(chunk for _, stages in charts for spans in stages for chunk in _rounds(spans)):
        keys.append(("pale: a later chunk of the same stage", FAINT, False))
    row = 26 if max(len(stages) for _, stages in charts) <= 8 else 16
    left, y = 76, 30.0
    canvas = Canvas(WIDE, y + sum(26 + row * len(stages) for _, stages in charts) + 44)
    canvas.legend(keys, left, 4, WIDE)
    for i, (name, stages) in enumerate(charts):
        end = max((span[1] for spans in stages for span in spans), default=0.0)
        canvas.text(left, y + 11, f"{name}: {units.seconds(end)}", 13, color=INK, weight="bold")
        axes = canvas.axes(left, y + 24, WIDE - left - 14, row * len(stages))
        factor = time_axis(axes, longest, "time since the first forward" if i == len(charts) - 1 else "")
        axes.set_ylim(len(stages) - 0.5, -0.5)
        canvas.rows(axes, [f"stage {stage}" for stage in range(len(stages))])
        if i < len(charts) - 1:
            axes.set_xlabel("")
            axes.tick_params(axis="x", labelbottom=False)
        for stage, spans in enumerate(stages):
            _stage(canvas, axes, (stage, name), spans, (factor, longest, row))
        y += 26 + row * len(stages)
    return canvas


def _rounds(spans: list[Span]) -> dict[int, int]:
    """Return {chunk: round over the pipeline} of a stage's chunks except its first; empty for plain schedules."""
    chunks = sorted({cell_of(span[2])[0] for span in spans if _ACTION.fullmatch(span[2])})
    return {chunk: i for i, chunk in enumerate(chunks) if i}


def _stage(
    canvas: Canvas, axes: Axes, where: tuple[int, str], spans: list[Span], scale: tuple[float, float, float]
) -> None:
    """Draw one row of the chart: a box per action, with its micro-batch where there is room."""
    (stage, chart), (factor, longest, row) = where, scale
    rounds = _rounds(spans)
    room = 8.5 * max((len(cell_of(span[2])[2]) for span in spans), default=0) + 2  # all are numbered, or none
    groups: dict[tuple[str, bool], list[tuple[float, float, float, float]]] = {}
    for start, end, name, _ in spans:
        chunk, kind, micro_batch = cell_of(name)
        fill, pixels = palette.colour(kind), (end - start) / longest * (WIDE - 90)
        fill = palette.lighter(fill, 0.5) if chunk in rounds else fill
        message = kind.endswith(".pp")  # beside compute: a thin strip below it
        high = 0.12 if message else 0.74
        box = (start * factor, stage + 0.36 if message else stage - 0.42, (end - start) * factor, high)
        if pixels < 2 or len(spans) > 600:
            groups.setdefault((fill, palette.is_striped(kind)), []).append(box)
            continue
        tip = f"{chart}, stage {stage}: {name}, {units.seconds(end - start)}"
        edge = {"edgecolor": PAGE, "linewidth": 1.0} if pixels > 6 and not message else {}
        canvas.paint(axes, box, fill, palette.is_striped(kind), tip, **edge)
        if micro_batch and pixels > room and not message:
            tone = "#111111" if palette.is_light(fill) else "#ffffff"
            size = 12 if row > 20 else 11.5
            middle = (start + end) / 2 * factor
            axes.text(middle, stage - 0.05, micro_batch, ha="center", va="center", color=tone, fontsize=size)
    for (fill, striped), boxes in groups.items():
        axes.add_artist(compound(boxes, fill, striped, clip_on=False))


def bubble(doc: dict[str, Any]) -> Canvas | None:
    """Draw the measured bubble, split by cause, above the simulated and the planned one; None without data."""
    part = dict_of(dict_of(doc.get("pipeline")).get("bubble"))
    pieces = [("structural", palette.colour("bubble"), False), ("imbalance", palette.axis_colour("pp"), True),
              ("transfer", palette.axis_colour("pp"), False)]  # fmt: skip
    split = [(name, fill, striped, max(amount(part.get(name)), 0.0)) for name, fill, striped in pieces]
    measured = number(part.get("measured"))
    if measured is None and not any(share for *_, share in split):
        return None
    others = [(name, number(part.get(key))) for name, key in (("simulated", "simulated"), ("planned", "planned"))]
    bars = [(name, share) for name, share in others if share is not None]
    total = max(measured or 0.0, sum(share for *_, share in split))
    largest = max([total, 0.01] + [share for _, share in bars])
    canvas = Canvas(WIDE, 30 + 27 * (1 + len(bars)) + 44)
    canvas.legend([(name, fill, striped) for name, fill, striped, _ in split], 84, 4, WIDE)
    axes = canvas.axes(84, 30, WIDE - 84 - 64, 27 * (1 + len(bars)))
    axes.set(
        xlim=(0, 100 * largest),
        ylim=(len(bars) + 0.5, -0.5),
        xlabel="idle share of the pipelined part of a step (%)",
    )
    canvas.rows(axes, ["measured", *[name for name, _ in bars]])
    at = 0.0
    for name, fill, striped, share in split:
        canvas.paint(axes, (100 * at, -0.36, 100 * share, 0.72), fill, striped, f"{name} {units.percent(share)}")
        at += share
    if measured and measured > at:
        canvas.paint(axes, (100 * at, -0.36, 100 * (measured - at), 0.72), FAINT, False, "not split")
    for y, (name, share) in enumerate([("measured", total), *bars]):
        if y:
            canvas.paint(axes, (0, y - 0.36, 100 * share, 0.72), FAINT, False, f"{name} {units.percent(share)}")
        canvas.value(axes, 100 * share, y, units.percent(share))
    return canvas
