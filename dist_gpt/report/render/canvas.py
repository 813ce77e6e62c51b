"""Figures measured in pixels: a matplotlib Figure and its SVG, small enough to be embedded in a page.

The colours of text, rules, background and heat are five hex values found nowhere else, so a page can replace them by
CSS variables (`themed`) and the figure follows light and dark mode. Unthemed, an SVG is a light figure without
background, for papers.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from dist_gpt.report import units
from dist_gpt.report.render import palette

INK, MUTED, RULE, PAGE, HEAT = "#1c2129", "#57606b", "#d9dee5", "#fefdfe", "#f08c3c"
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAGE: "--page", HEAT: "--heat"}
WIDE, HALF = 940, 456
"""Widths in pixels of a figure over the whole column, and of one of two side by side."""
SMALL = 13
"""Text size in pixels; still 10.5 pixels on a screen 800 pixels wide."""
FAINT = MUTED + "55"
"""Muted text colour, mostly transparent."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dist_gpt",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "font.family": ["DejaVu Sans"],
    "font.size": SMALL,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": SMALL,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 12,
    "ytick.labelsize": SMALL,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "hatch.color": PAGE,
    "hatch.linewidth": 2.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
HATCH = "/////"
_FONTS = "DejaVu Sans, Verdana, sans-serif"


@contextmanager
def style() -> Iterator[None]:
    """Set matplotlib up for making and writing figures inside the `with` block, and restore its settings after it."""
    with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        warnings.simplefilter("ignore")  # the reader's font may have a glyph that the measuring font lacks
        yield


class Canvas:
    """Figure of `width` x `height` pixels. Coordinates count from the upper left corner."""

    def __init__(self, width: int, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(self.figure)
        self._tips: list[str] = []

    def axes(self, left: float, top: float, width: float, height: float, grid: str = "x") -> Axes:
        """Add axes at this place in pixels, framed only below, with grid lines for axis `grid` (x, y, both or none)."""
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=3)
        axes.tick_params(axis="y", length=0)
        if grid != "none":
            axes.grid(True, axis=grid)  # type: ignore[arg-type]
        return axes

    def text(self, x: float, y: float, text: str, size: float = SMALL, **style: Any) -> None:
        """Draw text with its left end (see `ha`) at x, centred on y."""
        style = {"ha": "left", "va": "center", "color": MUTED, **style}
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, **style)

    def rows(self, axes: Axes, names: Iterable[str], places: Sequence[float] | None = None) -> None:
        """Label the rows of a chart, at the left edge of the figure."""
        shown = list(names)
        axes.set_yticks(range(len(shown)) if places is None else places, shown)
        axes.tick_params(axis="y", pad=axes.get_position().x0 * self.width)
        for name in axes.get_yticklabels():
            name.set_horizontalalignment("left")

    def value(self, axes: Axes, x: float, y: float, text: str, size: float = SMALL) -> None:
        """Draw text just right of the point (x, y) in data coordinates."""
        axes.annotate(text, (x, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=size,
                      annotation_clip=False)  # fmt: skip

    def tip(self, artist: Artist, text: str) -> None:
        """Set the text that is shown when the pointer rests on `artist`."""
        artist.set_gid(f"tip-{len(self._tips)}")
        self._tips.append(text)

    def box(self, axes: Axes, x: float, y: float, width: float, height: float, key: str, tip: str = "") -> Rectangle:
        """Draw a rectangle in data coordinates, lower left corner at (x, y), in the colour of budget category `key`."""
        return self.paint(axes, (x, y, width, height), palette.colour(key), palette.is_striped(key), tip)

    def paint(
        self,
        axes: Axes,
        box: tuple[float, float, float, float],
        fill: str,
        striped: bool = False,
        tip: str = "",
        **more: Any,
    ) -> Rectangle:
        """Draw a rectangle (x, y, width, height) in data coordinates, in any colour."""
        x, y, width, height = box
        more = {"linewidth": 0, "facecolor": fill, "clip_on": False, "hatch": HATCH if striped else None, **more}
        patch = Rectangle((x, y), width, height, **more)
        axes.add_artist(patch)
        if tip:
            self.tip(patch, tip)
        return patch

    def legend(self, keys: Sequence[tuple[str, str, bool]], left: float, top: float, right: float) -> float:
        """Draw (name, colour, striped) keys as patches with names, in as many rows as needed; return the height."""
        whole = self.figure.add_axes((0, 0, 1, 1), zorder=-1)
        whole.set_axis_off()
        whole.set(xlim=(0, self.width), ylim=(self.height, 0))
        x, y = left, top
        for name, fill, striped in keys:
            width = 17 + 7.6 * len(name) + 12
            if x > left and x + width > right:
                x, y = left, y + 19
            self.paint(whole, (x, y, 12, 12), fill, striped)
            whole.text(x + 17, y + 6.5, name, va="center", fontsize=SMALL, color=MUTED)
            x += width
        return y - top + 19

    def svg(self) -> str:
        """Return the figure as SVG text; the same figure always gives the same text."""
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
        return self._shrink(buffer.getvalue())

    def _shrink(self, svg: str) -> str:
        """Remove what nothing refers to, half of the text, and insert the tips."""
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, count=1, flags=re.S)
        svg = re.sub(r'\bd="([^"]*)"', lambda m: f'd="{_short_path(m[1])}"', svg)
        svg = re.sub(r"font-family: [^;\"]*", f"font-family: {_FONTS}", svg)
        svg = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", svg)
        svg = re.sub(r'<g id="tip-(\d+)">', lambda m: f"<g><title>{escape(self._tips[int(m[1])])}</title>", svg)
        used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', svg))
        svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
        svg = re.sub(r"\n\s*", "\n", svg)
        return svg.replace("base64,\n", "base64,").strip() + "\n"


def _short_path(path: str) -> str:
    """Return path data rounded to hundredths of a pixel, without spare blanks."""
    path = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), path)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", path.strip())


def themed(svg: str, name: str) -> str:
    """Return the SVG for a page: colours as CSS variables, ids unique in the page, and scaled to its column."""
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.S)
    match = re.match(r'<svg[^>]*?viewBox="0 0 (\S+) (\S+)"[^>]*>', svg)
    if match is None:
        return ""
    body = svg[match.end() :]

    def recolour(tag: re.Match[str]) -> str:
        text = tag[0]
        if "#" not in text or text.startswith("<image"):
            return text
        text = re.sub(r'fill="(#\w{6})"', r'style="fill: \1"', text)
        return re.sub(r"#[0-9a-f]{6}", lambda m: f"var({VARIABLES[m[0]]})" if m[0] in VARIABLES else m[0], text)

    body = re.sub(r"<[a-zA-Z][^<>]*>", recolour, body)
    body = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", body)
    head = f'<svg class="plot" viewBox="0 0 {match[1]} {match[2]}" style="max-width: {match[1]}px" role="img"'
    return f'{head} aria-labelledby="caption-{name}">{body}'


def compound(boxes: Sequence[tuple[float, float, float, float]], fill: str, striped: bool, **more: Any) -> PathPatch:
    """Return many rectangles (x, y, width, height) as one shape, far smaller in SVG than one by one."""
    vertices: list[tuple[float, float]] = []
    codes: list[np.uint8] = []
    for x, y, width, height in boxes:
        vertices += [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]
        codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    hatch = HATCH if striped else None
    return PathPatch(Path(vertices, codes), facecolor=fill, linewidth=0, hatch=hatch, **more)


def time_axis(axes: Axes, largest: float, label: str, which: str = "x") -> float:
    """Set axis limits from 0 to `largest` seconds in a readable unit; return the factor from seconds to that unit."""
    factor, unit = units.time_unit(largest)
    top = largest * factor or 1.0
    if which == "x":
        axes.set(xlim=(0, top), xlabel=f"{label} ({unit})")
    else:
        axes.set(ylim=(0, top), ylabel=f"{label} ({unit})")
    return factor
