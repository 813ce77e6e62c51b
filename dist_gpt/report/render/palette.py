"""Names and colours of the budget's categories and of the axes, the same in every figure and table.

They build on the eight colours of Okabe and Ito, which are distinct for any colour vision. Time that a rank waits for
another has the colour of the axis, striped. All colours work on white and on black pages.
"""

from __future__ import annotations

from collections.abc import Iterable

COMPUTE = ("forward", "backward", "weight", "recompute", "optimizer")
AXES = ("tp", "cp", "pp", "data", "dp", "shard", "replica", "embed", "model", "world")
AXIS_NAMES = {
    "tp": "tensor parallel",
    "cp": "context parallel",
    "pp": "pipeline",
    "data": "data parallel (dp × cp)",
    "dp": "data parallel",
    "shard": "data ranks that share the state (in a node)",
    "replica": "copies of the state (across nodes)",
    "embed": "tied embedding",
    "model": "one replica (pp × tp)",
    "world": "all ranks",
}
_COLOURS = {
    "forward": "#56b4e9",
    "backward": "#0072b2",
    "weight": "#6a5fc1",
    "recompute": "#9ecae1",
    "optimizer": "#009e73",
    "tp": "#e69f00",
    "data": "#d55e00",
    "dp": "#c4511a",
    "shard": "#e07b39",
    "replica": "#a8481c",
    "pp": "#cc79a7",
    "cp": "#e3d43b",
    "embed": "#9b6bb3",
    "model": "#b5764a",
    "world": "#96703f",
    "bubble": "#a3abb5",
    "data.read": "#a3c957",
    "checkpoint": "#5c8a68",
    "descheduled": "#707a86",
    "unexplained": "#c9ced4",
}
_NAMES = {
    "weight": "weight gradients",
    "data": "reading data",
    "bubble": "pipeline bubble",
    "descheduled": "descheduled (no CPU)",
}
_OTHERS = ("#7f9c3a", "#4a90a4", "#b0678c", "#8a8f3c")
MEMORY = {
    "parameters": "#0072b2",
    "gradients": "#56b4e9",
    "optimizer": "#009e73",
    "activations": "#e69f00",
    "buffers": "#cc79a7",
}


def axis_colour(axis: str) -> str:
    """Return the colour of a parallel axis."""
    return _COLOURS[axis] if axis in AXES else _OTHERS[sum(map(ord, axis)) % len(_OTHERS)]


def colour(category: str) -> str:
    """Return the colour of a budget category, including `transfer.tp` and `wait.tp`."""
    group, _, axis = category.partition(".")
    if group in ("transfer", "wait") and axis:
        return axis_colour(axis)
    if category in ("woken late", "late"):
        return _COLOURS["descheduled"]
    if category == "data":
        return _COLOURS["data.read"]
    return _COLOURS[category] if category in _COLOURS and category not in AXES else axis_colour(category)


def is_known(category: str) -> bool:
    """Return whether `category` is a category of the budget whose name needs no axis."""
    return category in (*COMPUTE, "bubble", "data", "checkpoint", "descheduled", "unexplained")


def is_striped(category: str) -> bool:
    """Return whether a category is drawn in stripes: waiting, and unexplained time."""
    return category.startswith("wait.") or category == "unexplained"


def label(category: str) -> str:
    """Return a category's name for readers, such as "tp transfer" for `transfer.tp`."""
    group, _, axis = category.partition(".")
    if group in ("transfer", "wait") and axis:
        return f"{axis} {group}"
    return _NAMES.get(category, category)


def group_of(category: str) -> str:
    """Return a category's summary group: computing, moving bytes, waiting for later ranks, pipeline bubble or other."""
    if category in COMPUTE:
        return "computing"
    if category.startswith("transfer."):
        return "moving bytes"
    if category.startswith("wait."):
        return "waiting for later ranks"
    return "pipeline bubble" if category == "bubble" else "other"


def ordered(categories: Iterable[str]) -> list[str]:
    """Return categories in stacking order: compute, then each axis' transfer and wait, then the rest."""
    axes = [f"{kind}.{axis}" for axis in AXES for kind in ("transfer", "wait")]
    order = [*COMPUTE, *axes, "bubble", "data", "checkpoint", "descheduled"]
    place = {category: i for i, category in enumerate(order)}
    known = len(order)
    return sorted(set(categories), key=lambda c: (place.get(c, known + (c == "unexplained")), c))


def is_light(hex_colour: str) -> bool:
    """Return whether black text on this colour reads better than white, by relative luminance (WCAG 2)."""
    channels = [int(hex_colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return luminance > 0.179


def lighter(hex_colour: str, by: float = 0.5) -> str:
    """Return the colour mixed with white, which makes up the share `by`."""
    channels = [int(hex_colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + (255 - c) * by):02x}" for c in channels)
