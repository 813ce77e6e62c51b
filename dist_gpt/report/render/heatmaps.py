"""Draw the figures that are matrices: waiting between ranks, traffic between ranks, compute time by rank and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dist_gpt.report import units
from dist_gpt.report.render.canvas import HALF, HEAT, INK, MUTED, PAGE, RULE, Canvas
from dist_gpt.report.render.elements import dict_of, grid_of, labels_of, list_of, short

LETTERED = 12
"""Most rows of a matrix that shows its numbers."""
LARGEST = 128
"""Most rows of a matrix; more ranks are drawn as blocks of neighbours."""


def traffic(doc: dict[str, Any]) -> Canvas | None:
    """Draw the bytes that each rank sends to each other rank."""
    part = dict_of(doc.get("traffic"))
    grid = grid_of(part.get("wire_bytes"))
    if not grid or len(grid) != len(grid[0]) or not any(any(row) for row in grid):
        return None
    largest = max(max(row) for row in grid)
    power, prefix = units.byte_unit(largest)
    what = "ranks" if part.get("grouped") else "rank"
    names = _block_names(list_of(part.get("ranks")), len(grid)) if part.get("grouped") else None
    names = names or labels_of(part.get("ranks"), len(grid))
    return _matrix(grid, names, (f"to {what}", f"from {what}"), power, prefix, units.size)


def culprits(doc: dict[str, Any]) -> Canvas | None:
    """Draw the time that each rank (row) made each other rank (column) wait."""
    part = dict_of(doc.get("stragglers"))
    grid = grid_of(part.get("matrix_s"))
    if not grid or len(grid) != len(grid[0]) or not any(any(row) for row in grid):
        return None
    factor, unit = units.time_unit(max(max(row) for row in grid))
    names = labels_of(part.get("ranks"), len(grid))
    labels = ("waits: rank", "comes last: rank")
    if len(grid) > LARGEST:
        grid, names = _pooled(grid, names)
        labels = ("waits: ranks", "comes last: ranks")
    return _matrix(grid, names, labels, 1 / factor, unit, units.seconds)


def _block_names(starts: list[Any], count: int) -> list[str] | None:
    """Return the names 0–15, 16–31, ... of blocks given by their first ranks; None if `starts` is not that."""
    if len(starts) != count or count < 2 or not all(isinstance(start, int) for start in starts):
        return None
    width = starts[1] - starts[0]
    return [f"{start}–{start + width - 1}" for start in starts]


def _pooled(grid: list[list[float]], names: list[str]) -> tuple[list[list[float]], list[str]]:
    """Return the sums over blocks of neighbours, at most LARGEST of them, and the blocks' names."""
    width = -(-len(grid) // LARGEST)
    starts = np.arange(0, len(grid), width)
    sums = np.add.reduceat(np.add.reduceat(np.array(grid), starts, axis=0), starts, axis=1)
    ends = np.minimum(starts + width, len(grid)) - 1
    return sums.tolist(), [f"{names[a]}–{names[b]}" for a, b in zip(starts, ends, strict=True)]


def _matrix(
    grid: list[list[float]],
    names: list[str],
    labels: tuple[str, str],
    one: float,
    unit: str,
    show: Callable[[float], str],
) -> Canvas:
    """Draw a square matrix, stronger in colour for larger values; `one` is one `unit` in the grid's own unit."""
    rows, width = len(grid), len(grid[0])
    largest = max(max(row) for row in grid) or 1.0
    lettered = max(rows, width) <= LETTERED
    canvas = Canvas(HALF, 352)
    left = 60 if max(len(name) for name in names) <= 4 else 104
    top, height = (6, 304) if lettered else (30, 280)
    axes = canvas.axes(left, top, HALF - left - 6, height, grid="none")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(rows - 0.5, -0.5), xlabel=f"{labels[0]} ({unit})", ylabel=labels[1])
    if lettered:
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                tip = f"{labels[1]} {names[y]}, {labels[0]} {names[x]}: {show(value)}"
                strength = max(value, 0.0) / largest
                box = (x - 0.48, y - 0.48, 0.96, 0.96)
                fill = HEAT if strength > 0 else RULE
                canvas.paint(axes, box, fill, tip=tip, alpha=0.1 + 0.9 * strength if strength > 0 else 0.35)
                if value >= 0.005 * largest:
                    number = units.digits(value / one, 2) if value / one < 10 else f"{value / one:,.0f}"
                    size = 12 if max(rows, width) <= 8 else 10.5
                    axes.text(x, y, number, ha="center", va="center", color=INK, fontsize=size)
    else:
        _raster(axes, np.array(grid), 0.0, largest)
        scale_bar(canvas, left, 12, 120, "0", show(largest))
    _ticks(axes, "x", names, 5)
    _ticks(axes, "y", names, 12)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set(visible=not lettered, color=RULE)
    axes.tick_params(axis="both", length=0)
    return canvas


def _ticks(axes: Axes, which: str, names: Sequence[str], most: int) -> None:
    """Name the rows or columns: all of up to LETTERED, else every n-th, so that at most `most` names appear."""
    every = -(-len(names) // most) if len(names) > LETTERED else 1
    places = range(0, len(names), every)
    shown = [short(names[i], 9 if every > 1 else 5) for i in places]
    if which == "x":
        axes.set_xticks(places, shown)
    else:
        axes.set_yticks(places, shown)


def _raster(axes: Axes, grid: np.ndarray, low: float, high: float) -> None:
    """Draw the grid as an image of one colour, more transparent for smaller values, which suits any page."""
    strength = np.clip((grid - low) / ((high - low) or 1.0), 0.0, 1.0)
    image = np.empty((*grid.shape, 4), dtype=np.uint8)
    image[..., :3] = [int(HEAT[i : i + 2], 16) for i in (1, 3, 5)]
    image[..., 3] = np.round(255 * (0.04 + 0.96 * strength))
    rows, width = grid.shape
    axes.imshow(image, interpolation="none", aspect="auto", extent=(-0.5, width - 0.5, rows - 0.5, -0.5))


def scale_bar(canvas: Canvas, left: float, middle: float, width: float, low: str, high: str) -> None:
    """Draw the key of the colours, from `low` to `high`."""
    bar = canvas.axes(left + 7.4 * len(low) + 6, middle - 6, width, 12, grid="none")
    bar.set_axis_off()
    _raster(bar, np.linspace(0, 1, 64)[None, :], 0.0, 1.0)
    canvas.text(left, middle, low)
    canvas.text(left + 7.4 * len(low) + width + 14, middle, high)


def heat(doc: dict[str, Any]) -> Canvas | None:
    """Draw the compute time of every rank in every profiled step."""
    part = dict_of(dict_of(doc.get("stragglers")).get("heat"))
    grid = grid_of(part.get("compute_s"))
    if not grid or not any(any(row) for row in grid):
        return None
    values = np.array(grid)
    known = values[values > 0]
    low = float(known.min())
    high = max(float(values.max()), 1.15 * float(np.median(known)))  # noise must not look like a straggler
    names = labels_of(part.get("ranks"), len(grid))
    if len(grid) > LARGEST:  # the slowest of each block, since a row thinner than a pixel may not show
        starts = np.arange(0, len(grid), -(-len(grid) // LARGEST))
        values, names = np.maximum.reduceat(values, starts, axis=0), [names[i] for i in starts]
    rows = len(values)
    canvas = Canvas(HALF, 352)
    axes = canvas.axes(60, 30, HALF - 66, 280, grid="none")
    _raster(axes, values, low, high)
    if rows <= 32:
        for y in range(1, rows):
            axes.axhline(y - 0.5, color=PAGE, linewidth=1.5)
    axes.set(xlabel="step", ylabel="rank")
    _ticks(axes, "x", labels_of(part.get("steps"), len(grid[0])), 10)
    _ticks(axes, "y", names, 12)
    axes.tick_params(axis="both", length=0)
    axes.spines["bottom"].set(color=MUTED)
    scale_bar(canvas, 60, 12, 120, f"computing {units.seconds(low)}", units.seconds(high))
    return canvas
