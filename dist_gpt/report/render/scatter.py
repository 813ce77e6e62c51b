"""Draw the figures of points and lines: bus bandwidth, roofline, message sizes, clocks, device samples."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from dist_gpt.report import units
from dist_gpt.report.render import palette
from dist_gpt.report.render.canvas import HALF, INK, MUTED, RULE, WIDE, Canvas, time_axis
from dist_gpt.report.render.elements import dict_of, list_of, rows_of, short
from dist_gpt.report.render.sections_cost import sample_time
from dist_gpt.report.units import amount, number

MARKERS = {"all_reduce": "o", "all_gather": "^", "reduce_scatter": "v", "all_to_all": "D", "broadcast": "P"}


def log_axis(axes: Axes, which: str, values: Sequence[float], show: Callable[[float], str], most: int = 8) -> None:
    """Make an axis logarithmic around `values`, with at most `most` ticks that show their unit: 1 MB, 10 MB."""
    low, high = max(min(values) / 2, 1e-300), min(max(values) * 2, 1e300)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**p for p in decades for m in mantissas if low <= m * 10.0**p <= high]
        if len(ticks) <= most:
            break
    ticks = ticks[:: -(-len(ticks) // most)]
    axis = axes.xaxis if which == "x" else axes.yaxis
    if which == "x":
        axes.set(xscale="log", xlim=(low, high))
    else:
        axes.set(yscale="log", ylim=(low, high))
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda x, _: re.sub(r"\.0+(?= |$)", "", show(float(f"{x:.6g}"))))


PLACES = ((9, 0, "left"), (-9, 0, "right"), (0, 13, "center"), (0, -13, "center"), (9, 13, "left"), (9, -13, "left"),
          (-9, 13, "right"), (-9, -13, "right"), (14, 28, "left"),
          (14, -28, "left"), (-14, 28, "right"), (-14, -28, "right"))  # fmt: skip
"""Places of a name beside its point: pixels to the right and up, and the end that is next to the point."""


def name_points(canvas: Canvas, axes: Axes, named: Sequence[tuple[float, float, str]], taken: Sequence[Any]) -> None:
    """Write names beside points where they cover neither each other nor the points `taken`; leave out the others."""
    area = axes.get_window_extent()
    occupied = [_around(axes, x, y) for x, y in taken]
    for x, y, name in named:
        px, py = axes.transData.transform((x, y))
        width = 7.4 * len(name)
        for dx, dy, ha in PLACES:
            left = px + dx - {"left": 0.0, "right": width, "center": width / 2}[ha]
            box = (left, py + dy - 7, left + width, py + dy + 7)
            inside = left >= area.x0 and box[2] <= area.x1 and box[1] >= area.y0 and box[3] <= area.y1 + 4
            if inside and not any(_meet(box, other) for other in occupied):
                line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5}
                axes.annotate(name, (x, y), xytext=(dx, dy), textcoords="offset points", ha=ha, va="center",
                              arrowprops=line if dx and dy else None)  # fmt: skip
                occupied.append(box)
                break


def _around(axes: Axes, x: float, y: float) -> tuple[float, float, float, float]:
    px, py = axes.transData.transform((x, y))
    return px - 5, py - 5, px + 5, py + 5


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def busbw(doc: dict[str, Any]) -> Canvas | None:
    """Draw the bus bandwidth of every axis and operation over the size of a call."""
    series: dict[tuple[str, str], list[tuple[float, float, bool]]] = {}
    for row in rows_of(doc.get("collectives")):
        payload, speed = amount(row.get("payload_bytes")), amount(row.get("busbw_bytes_per_s"))
        if payload > 0 and speed > 0:
            key = (str(row.get("axis", "")), str(row.get("op", "")))
            series.setdefault(key, []).append((payload, speed, bool(row.get("emulated"))))
    if not series:
        return None
    canvas = Canvas(WIDE, 316)
    axes = canvas.axes(92, 10, WIDE - 104, 262, grid="both")
    points = [point for line in series.values() for point in line]
    log_axis(axes, "x", [p[0] for p in points], units.size)
    log_axis(axes, "y", [p[1] for p in points], units.rate, 5)
    axes.set(xlabel="payload of one call (bytes)", ylabel="bus bandwidth")
    ends = []
    for (axis, op), line in sorted(series.items())[:40]:
        line.sort()
        fill = palette.axis_colour(axis)
        axes.plot([p[0] for p in line], [p[1] for p in line], color=fill, linewidth=1, alpha=0.45)
        for payload, speed, emulated in line:
            face = "none" if emulated else fill
            (dot,) = axes.plot(payload, speed, MARKERS.get(op, "o"), color=fill, markerfacecolor=face, markersize=8)
            mark = ", emulated" if emulated else ""
            canvas.tip(dot, f"{axis} {op} of {units.size(payload)}: {units.rate(speed)}{mark}")
        ends.append((line[-1][0], line[-1][1], f"{short(axis, 12)} {short(op, 18)}"))
    name_points(canvas, axes, ends, [(p[0], p[1]) for p in points])
    return canvas


def roofline(doc: dict[str, Any]) -> Canvas | None:
    """Draw the speed of each kernel over its FLOPs per byte, below the measured ceiling."""
    part = dict_of(doc.get("roofline"))
    ceiling = dict_of(part.get("ceiling"))
    points = []
    for row in rows_of(part.get("kernels")):
        work, traffic, speed = (amount(row.get(key)) for key in ("flops", "bytes", "flops_per_s"))
        if min(work, traffic, speed) > 0:
            points.append((work / traffic, speed, str(row.get("name", ""))))
    if not points:
        return None
    top, slope = number(ceiling.get("flops_per_s")), number(ceiling.get("bytes_per_s"))
    canvas = Canvas(WIDE, 316)
    axes = canvas.axes(104, 12, WIDE - 116, 260, grid="both")
    knee = [top / slope] if top and slope and top > 0 and slope > 0 else []
    log_axis(axes, "x", [p[0] for p in points] + knee, units.plain)
    log_axis(axes, "y", [p[1] for p in points] + ([top] if top and top > 0 else []), units.flops, 6)
    axes.set(xlabel="FLOPs per byte of memory traffic", ylabel="speed")
    if knee and top and slope:
        left, right = axes.get_xlim()
        axes.plot([left, knee[0], max(right, knee[0])], [left * slope, top, top], color=INK, linewidth=1.6)
        axes.annotate(f"measured ceiling {units.flops(top)}", (knee[0], top), xytext=(2, 9), fontsize=12,
                      textcoords="offset points")  # fmt: skip
    for x, y, name in points[:80]:
        (dot,) = axes.plot(x, y, "o", color=palette.colour("backward"), markersize=8, markeredgewidth=0)
        canvas.tip(dot, f"{name}: {units.flops(y)}, {units.plain(x)} FLOPs a byte")
    points.sort(key=lambda p: -p[1])
    name_points(canvas, axes, [(x, y, short(name, 24)) for x, y, name in points], [(p[0], p[1]) for p in points])
    return canvas


def sizes(doc: dict[str, Any]) -> Canvas | None:
    """Draw the number of messages of each size, by axis."""
    counts: dict[str, dict[float, float]] = {}
    for row in rows_of(doc.get("sizes")):
        bins = {amount(b.get("low")): amount(b.get("calls")) for b in rows_of(row.get("bins"))}
        if any(calls > 0 for calls in bins.values()):
            counts[str(row.get("axis", ""))] = bins
    lows = sorted({low for bins in counts.values() for low, calls in bins.items() if calls > 0})[:64]
    if not lows:
        return None
    order = palette.ordered([f"transfer.{axis}" for axis in counts])
    names = [key.removeprefix("transfer.") for key in order][:8]
    canvas = Canvas(HALF, 352)
    height = canvas.legend([(short(name, 10), palette.axis_colour(name), False) for name in names], 56, 4, HALF)
    axes = canvas.axes(56, height + 16, HALF - 62, 294 - height, grid="y")
    totals = []
    for x, low in enumerate(lows):
        at = 0.0
        for name in names:
            calls = counts[name].get(low, 0.0)
            if calls > 0:
                tip = f"{name}: {units.plain(calls)} calls a step of {units.binary(low)} and more"
                canvas.paint(axes, (x - 0.4, at, 0.8, calls), palette.axis_colour(name), tip=tip)
            at += calls
        if len(lows) <= 12:
            axes.annotate(units.plain(round(at, 1)), (x, at), xytext=(0, 7), textcoords="offset points", ha="center",
                          va="center", fontsize=12)  # fmt: skip
        totals.append(at)
    every = -(-len(lows) // 6)
    axes.set(xlim=(-0.6, len(lows) - 0.4), ylim=(0, max(totals) * 1.04), ylabel="calls of a rank in one step")
    axes.set_xticks(range(0, len(lows), every), [units.binary(low) for low in lows[::every]])
    axes.set_xlabel("payload of one call (bytes, lower bound)")
    axes.yaxis.set_major_formatter(lambda y, _: units.plain(float(f"{y:.6g}")))
    return canvas


def clocks(doc: dict[str, Any]) -> Canvas | None:
    """Draw each rank's clock against rank 0's, with its error, and beside it the errors alone."""
    rows = [r for r in rows_of(dict_of(doc.get("identity")).get("clocks")) if number(r.get("offset_s")) is not None]
    if len(rows) < 2:
        return None
    rows.sort(key=lambda row: amount(row.get("rank")))
    ranks = [amount(row.get("rank")) for row in rows]
    offsets = [amount(row.get("offset_s")) for row in rows]
    errors = [abs(amount(row.get("error_s"))) for row in rows]
    canvas = Canvas(WIDE, 200)
    left = canvas.axes(64, 8, 380, 150, grid="y")
    factor, unit = units.time_unit(max(*(abs(o) for o in offsets), *errors))
    fill = palette.colour("backward")
    if len(rows) <= 64:
        left.errorbar(ranks, [o * factor for o in offsets], yerr=[e * factor for e in errors], fmt="o", color=fill,
                      markersize=5, capsize=3, linewidth=1.2)  # fmt: skip
    else:
        low = [(o - e) * factor for o, e in zip(offsets, errors, strict=True)]
        high = [(o + e) * factor for o, e in zip(offsets, errors, strict=True)]
        left.fill_between(ranks, low, high, color=fill, alpha=0.3, linewidth=0)
        left.plot(ranks, [o * factor for o in offsets], ".", color=fill, markersize=3)
    left.axhline(0, color=MUTED, linewidth=0.8)
    left.set(xlabel="rank", ylabel=f"offset to rank 0 ({unit})")
    right = canvas.axes(550, 8, 380, 150, grid="y")
    factor = time_axis(right, max(errors) * 1.1, "± error", "y")
    if len(rows) <= 64:
        right.bar(ranks, [e * factor for e in errors], color=fill, width=0.6)
    else:
        right.plot(ranks, [e * factor for e in errors], ".", color=fill, markersize=3)
    right.set(xlabel="rank")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(min(ranks) - 0.6, max(ranks) + 0.6)
    return canvas


def samples(doc: dict[str, Any]) -> Canvas | None:
    """Draw clock, power and temperature of the devices over time, of at most eight ranks."""
    rows = [row for row in list_of(doc.get("device_samples")) if isinstance(row, dict)]
    by_rank: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if sample_time(row) is not None:
            by_rank.setdefault(str(row.get("rank", "")), []).append(row)
    wanted = [("sm_clock_hz", 1e-9, "SM clock (GHz)"), ("power_w", 1.0, "power (W)"), ("temperature_c", 1.0, "°C")]
    kinds = [kind for kind in wanted if any(number(row.get(kind[0])) is not None for row in rows)]
    if not by_rank or not kinds:
        return None
    canvas = Canvas(WIDE, 110 * len(kinds) + 54)
    names = sorted(by_rank, key=lambda name: (len(name), name))[:8]
    tones = [*palette.MEMORY.values(), "#d55e00", RULE, MUTED]
    canvas.legend([(f"rank {short(name, 8)}", tones[i], False) for i, name in enumerate(names)], 64, 4, WIDE)
    for place, (key, scale, name) in enumerate(kinds):
        axes = canvas.axes(64, 28 + 110 * place, WIDE - 76, 94, grid="both")
        for i, rank in enumerate(names):
            line = [(sample_time(r) or 0.0, amount(r.get(key)) * scale) for r in by_rank[rank] if number(r.get(key))]
            line.sort()
            axes.plot([t for t, _ in line], [v for _, v in line], color=tones[i], linewidth=1.4)
        axes.set_ylabel(name)
        if place < len(kinds) - 1:
            axes.set_xticklabels([])
        else:
            axes.set_xlabel("time since the run began (s)")
    return canvas
