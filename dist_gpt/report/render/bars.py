"""Draw the report's figures as SVG. Every figure's function takes the document and returns None if it has no data.

Bars are here; points and lines are in points.py, matrices in matrices.py, schedules and timelines in gantt.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from dist_gpt.report import units
from dist_gpt.report.render import palette
from dist_gpt.report.render.canvas import FAINT, INK, MUTED, WIDE, Canvas, style, time_axis
from dist_gpt.report.render.elements import budget_rows, clean, dict_of, rows_of, short
from dist_gpt.report.render.gantt import bubble, pipeline, timeline
from dist_gpt.report.render.heatmaps import culprits, heat, traffic
from dist_gpt.report.render.scatter import busbw, clocks, roofline, samples, sizes
from dist_gpt.report.render.sections_comm import bucket_name
from dist_gpt.report.units import amount, number

Keys = list[tuple[str, str, bool]]


def keys_of(categories: Collection[str]) -> Keys:
    """Return the legend entries of budget categories."""
    return [(palette.label(c), palette.colour(c), palette.is_striped(c)) for c in palette.ordered(categories)]


def budget(doc: dict[str, Any]) -> Canvas | None:
    """Draw how each rank spent a step, as bars stacked by category."""
    bars = budget_rows(doc)
    used = {key for _, parts in bars for key, value in parts.items() if value > 0}
    if not used:
        return None
    row, left, right = (22 if len(bars) <= 20 else 17), 76, 70
    below = _legend_height(keys_of(used), WIDE - left)
    canvas = Canvas(WIDE, below + 14 + row * len(bars) + 44)
    canvas.legend(keys_of(used), left, 4, WIDE)
    axes = canvas.axes(left, below + 10, WIDE - left - right, row * len(bars))
    longest = max(sum(parts.values()) for _, parts in bars)
    factor = time_axis(axes, longest, "time of one step")
    axes.set_ylim(len(bars) - 0.5, -0.5)
    canvas.rows(axes, [name for name, _ in bars])
    for y, (name, parts) in enumerate(bars):
        at = 0.0
        for key in palette.ordered(used):
            seconds = max(parts.get(key, 0.0), 0.0)
            if seconds * (WIDE - left - right) > 0.15 * longest:
                tip = f"{name}: {palette.label(key)} {units.seconds(seconds)}"
                canvas.box(axes, at * factor, y - 0.39, seconds * factor, 0.78, key, tip)
            at += seconds
        canvas.value(axes, at * factor, y, f"{units.seconds(at)}")
    if bars[0][0] == "mean" and len(bars) > 1:
        axes.axhline(0.5, color=MUTED, linewidth=0.8)
    return canvas


def _legend_height(keys: Keys, width: float) -> float:
    """Return the height of `Canvas.legend` at this width."""
    return Canvas(WIDE, 10).legend(keys, 0, 0, width)


def waterfall(doc: dict[str, Any]) -> Canvas | None:
    """Draw the losses between the ideal step and the measured one, one after the other."""
    rows = [(str(row.get("what", "")), number(row.get("s"))) for row in rows_of(doc.get("waterfall"))]
    known = [(what, value) for what, value in rows if value is not None]
    if len(known) < 2:
        return None
    left, right, row = 262, 90, 25
    canvas = Canvas(WIDE, row * len(known) + 46)
    axes = canvas.axes(left, 4, WIDE - left - right, row * len(known))
    ends, at = [], 0.0
    for what, value in known[:-1]:
        ends.append((what, at, value))
        at += value
    ends.append((known[-1][0], 0.0, known[-1][1]))
    factor = time_axis(axes, max(max(start, start + value) for _, start, value in ends), "time of one step")
    axes.set_ylim(len(known) - 0.5, -0.5)
    canvas.rows(axes, [short(palette.label(what), 36) for what, _ in known])
    for y, (what, start, value) in enumerate(ends):
        fill, striped = _step_colour(what, y, len(ends))
        low = min(start, start + value)
        tip = f"{palette.label(what)}: {units.seconds(value)}"
        canvas.paint(axes, (low * factor, y - 0.36, abs(value) * factor, 0.72), fill, striped, tip)
        sign = "+" if 0 < y < len(ends) - 1 and value >= 0 else ""
        canvas.value(axes, max(start, start + value) * factor, y, f"{sign}{units.seconds(value)}")
        if y < len(ends) - 1:
            line = (start + value) * factor
            axes.plot([line, line], [y - 0.36, y + 1.36], color=MUTED, linewidth=0.8, clip_on=False)
    return canvas


def _step_colour(what: str, place: int, count: int) -> tuple[str, bool]:
    """Return the colour of a row of the waterfall, its category's if it names one, and whether it is striped."""
    if place in (0, count - 1):
        return (palette.colour("optimizer"), False) if place == 0 else (MUTED, False)
    words = what.lower().replace(",", " ").split()
    for word in (what, *words):
        if palette.ordered([word]) and (word.split(".")[0] in ("transfer", "wait") or palette.is_known(word)):
            return palette.colour(word), palette.is_striped(word)
    for axis in palette.AXES:
        if axis in words:
            return palette.axis_colour(axis), any(word.startswith("wait") for word in words)
    return palette.colour("descheduled"), False


def overlap(doc: dict[str, Any]) -> Canvas | None:
    """Draw, per axis and per bucket, communication under compute and communication that compute waited for."""
    part = dict_of(doc.get("overlap"))
    bars: list[tuple[str, str, float, float]] = []
    for row in rows_of(part.get("axes"))[:12]:
        axis = str(row.get("axis", ""))
        bars.append((f"{short(axis, 14)} axis", axis, amount(row.get("busy_s")), amount(row.get("exposed_s"))))
    buckets = rows_of(part.get("buckets"))[:24]
    for row in buckets:
        name = f"{bucket_name(row)} ({units.size(row.get('bytes'))})"
        bars.append((name, "data", amount(row.get("busy_s")), amount(row.get("exposed_s"))))
    if not any(max(busy, exposed) > 0 for _, _, busy, exposed in bars):
        return None
    left, right, row_height, gap = 210 if buckets else 110, 160, 23, 12 if buckets else 0
    count = len(bars)
    canvas = Canvas(WIDE, row_height * count + gap + 74)
    canvas.legend(
        [("exposed: nothing is computed", MUTED, False),
         ("faint, under compute: costs no time", FAINT, False)],
        left, 4, WIDE,
    )  # fmt: skip
    axes = canvas.axes(left, 28, WIDE - left - right, row_height * count + gap)
    longest = max(max(busy, exposed) for _, _, busy, exposed in bars)
    factor = time_axis(axes, longest, "communication time in one step")
    step = gap / row_height
    places = [i + (step if i >= count - len(buckets) else 0) for i in range(count)]
    axes.set_ylim(count - 0.5 + step, -0.5)
    canvas.rows(axes, [bar[0] for bar in bars], places)
    for y, (name, axis, busy, exposed) in zip(places, bars, strict=True):
        under = max(busy - exposed, 0.0)
        fill = palette.axis_colour(axis)
        canvas.paint(axes, (0, y - 0.36, exposed * factor, 0.72), fill, tip=f"{name}: {units.seconds(exposed)} exposed")
        tip = f"{name}: {units.seconds(under)} under compute"
        canvas.paint(axes, (exposed * factor, y - 0.36, under * factor, 0.72), fill, tip=tip, alpha=0.35)
        share = units.percent(under / max(busy, exposed)) if max(busy, exposed) > 0 else units.NONE
        canvas.value(axes, max(busy, exposed) * factor, y, f"{share} under compute")
    return canvas


def free(doc: dict[str, Any]) -> Canvas | None:
    """Draw how long the step would take if the communication of one axis took no time."""
    rows = [row for row in rows_of(doc.get("free")) if number(row.get("step_s"))]
    if not rows:
        return None
    rows.sort(key=lambda row: -amount(row.get("saving")))
    as_it_was = [amount(r["step_s"]) / (1 - amount(r["saving"])) for r in rows if amount(r.get("saving")) < 1]
    measured = max(as_it_was, default=None)
    left, right, row_height = 110, 160, 25
    canvas = Canvas(WIDE, row_height * len(rows) + 66)
    axes = canvas.axes(left, 22, WIDE - left - right, row_height * len(rows))
    longest = max([amount(row.get("step_s")) for row in rows] + [measured or 0.0])
    factor = time_axis(axes, longest, "replayed time of one step")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    canvas.rows(axes, [f"{short(row.get('axis'), 14)} free" for row in rows])
    for y, row in enumerate(rows):
        axis, value = str(row.get("axis", "")), amount(row.get("step_s"))
        canvas.paint(axes, (0, y - 0.36, value * factor, 0.72), palette.axis_colour(axis))
        shown = f"{units.seconds(value)}, saves {units.percent(row.get('saving'))}"
        canvas.value(axes, longest * factor, y, shown)
    if measured:
        axes.axvline(measured * factor, color=INK, linewidth=1.2, clip_on=False)
        where = left + (WIDE - left - right) * measured / longest
        canvas.text(where, 10, f"unchanged: {units.seconds(measured)}", ha="right" if where > WIDE / 2 else "left")
    return canvas


def memory(doc: dict[str, Any]) -> Canvas | None:
    """Draw the predicted parts of each rank's peak above the measured ones."""
    rows = memory_rows(doc)
    bars = [
        (entry, kind, parts := dict_of(entry.get(kind)), _top(parts) or _allocated(entry, kind))
        for entry in rows
        for kind in ("predicted", "measured")
    ]
    largest = max((top for *_, top in bars), default=0.0)
    if largest <= 0:
        return None
    left, right, height = 76, 76, 36 if len(rows) <= 12 else 26
    keys: Keys = [(name, fill, False) for name, fill in palette.MEMORY.items()]
    canvas = Canvas(WIDE, height * len(rows) + 76)
    canvas.legend([*keys, ("faint, upper bar: predicted", FAINT, False)], left, 4, WIDE)
    axes = canvas.axes(left, 30, WIDE - left - right, height * len(rows))
    power, prefix = units.byte_unit(largest)
    axes.set(xlim=(0, largest / power), xlabel=f"bytes at the peak ({prefix})", ylim=(len(rows) - 0.5, -0.5))
    canvas.rows(axes, [f"rank {short(row.get('rank'), 8)}" for row in rows])
    for i, (owner, kind, parts, top) in enumerate(bars):
        y, at = i // 2 - (0.38 if kind == "predicted" else -0.02), 0.0
        for name, fill in palette.MEMORY.items():
            value = max(amount(parts.get(name)), 0.0)
            tip = f"rank {owner.get('rank')}, {kind} {name}: {units.size(value)}"
            if value * 700 > largest * 0.2:
                pale = 0.4 if kind == "predicted" else 1.0
                canvas.paint(axes, (at / power, y, value / power, 0.34), fill, tip=tip, alpha=pale)
            at += value
        if top > at:  # a measured peak whose parts are unknown
            canvas.paint(axes, (at / power, y, (top - at) / power, 0.34), MUTED, tip="not in any part", alpha=0.6)
        if top:
            canvas.value(axes, max(top, at) / power, y + 0.17, units.size(top), 12)
    return canvas


def _allocated(row: dict[str, Any], kind: str) -> float:
    """Return the allocator's peak, in place of measured parts that are unknown; 0 for predicted ones."""
    return amount(row.get("allocated_peak")) if kind == "measured" else 0.0


def _top(parts: dict[str, Any]) -> float:
    """Return the peak, or the sum of the parts if no peak is given."""
    return amount(parts.get("peak")) or sum(amount(parts.get(name)) for name in palette.MEMORY)


def memory_rows(doc: dict[str, Any], most: int = 16) -> list[dict[str, Any]]:
    """Return the rows of all ranks, or of the `most` ranks with the highest peaks."""
    rows = rows_of(doc.get("memory_bytes"))
    if len(rows) <= most:
        return rows
    peaks = [max(_top(dict_of(row.get("measured"))), _top(dict_of(row.get("predicted")))) for row in rows]
    return [rows[i] for i in sorted(sorted(range(len(rows)), key=lambda i: -peaks[i])[:most])]


def critical(doc: dict[str, Any]) -> Canvas | None:
    """Draw the critical path: one bar per rank, stacked by what the rank did."""
    by_rank: dict[str, dict[str, float]] = {}
    for row in rows_of(dict_of(doc.get("critical_path")).get("parts")):
        parts = by_rank.setdefault(f"rank {short(row.get('rank'), 8)}", {})
        what = short(row.get("what"), 30)
        parts[what] = parts.get(what, 0.0) + max(amount(row.get("s")), 0.0)
    bars = sorted(by_rank.items(), key=lambda bar: -sum(bar[1].values()))[:12]
    used = {what for _, parts in bars for what, value in parts.items() if value > 0}
    if not used:
        return None
    left, right, height = 76, 70, 24
    below = _legend_height(keys_of(used), WIDE - left)
    canvas = Canvas(WIDE, below + height * len(bars) + 54)
    canvas.legend(keys_of(used), left, 4, WIDE)
    axes = canvas.axes(left, below + 8, WIDE - left - right, height * len(bars))
    factor = time_axis(axes, max(sum(parts.values()) for _, parts in bars), "time on the critical path of one step")
    axes.set_ylim(len(bars) - 0.5, -0.5)
    canvas.rows(axes, [name for name, _ in bars])
    for y, (name, parts) in enumerate(bars):
        at = 0.0
        for what in palette.ordered(parts):
            tip = f"{name}: {palette.label(what)} {units.seconds(parts[what])}"
            canvas.box(axes, at * factor, y - 0.38, parts[what] * factor, 0.76, what, tip)
            at += parts[what]
        canvas.value(axes, at * factor, y, f"{units.seconds(at)}")
    return canvas


FIGURES: dict[str, Callable[[dict[str, Any]], Canvas | None]] = {
    "clocks": clocks,
    "budget": budget,
    "waterfall": waterfall,
    "busbw": busbw,
    "traffic": traffic,
    "sizes": sizes,
    "overlap": overlap,
    "timeline": timeline,
    "free": free,
    "culprits": culprits,
    "heat": heat,
    "pipeline": pipeline,
    "bubble": bubble,
    "memory": memory,
    "roofline": roofline,
    "critical": critical,
    "samples": samples,
}


def figures(doc: dict[str, Any]) -> dict[str, str]:
    """Draw every figure that the document has data for; return name -> SVG text (see `canvas.themed` for a page)."""
    doc = clean(doc)
    drawn = {}
    with style():
        for name, draw in FIGURES.items():
            canvas = draw(doc)
            if canvas is not None:
                drawn[name] = canvas.svg()
    return drawn
