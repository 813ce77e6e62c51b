"""Parts of the report's sections, the same for HTML and Markdown, and helpers that make a document safe to show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_gpt.report.units import NONE, number

# Control characters (not allowed in XML), halves of surrogate pairs (nor in UTF-8), and the marks that change the
# direction of text, which would disguise a name.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
LONGEST = 2000
"""Most characters of one string that are shown."""


@dataclass(frozen=True)
class Cell:
    """Field of a table. `bar` (0 to 1) is drawn behind it, in the colour of the budget category `key`."""

    text: str
    sort: float | None = None
    bar: float | None = None
    key: str = ""
    tone: str = ""  # good | bad | warn | muted
    title: str = ""


@dataclass(frozen=True)
class Column:
    """Head of a column; `kind` is text, number or code."""

    label: str
    kind: str = "number"
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Table of cells. `note` says what was cut."""

    caption: str
    columns: tuple[Column, ...]
    rows: list[list[Cell]]
    note: str = ""
    folded: bool = False
    half: bool = False


@dataclass(frozen=True)
class Picture:
    """Figure of `plots`, with a caption that says how to read it."""

    name: str
    caption: str
    half: bool = False


@dataclass(frozen=True)
class Note:
    """Sentence with a tone: plain | good | bad | warn | missing."""

    text: str
    tone: str = "plain"


@dataclass(frozen=True)
class Facts:
    """Key figures: (label, value, meaning)."""

    items: list[tuple[str, str, str]]


Part = Table | Picture | Note | Facts


@dataclass(frozen=True)
class Section:
    """Section of the report: heading, most important sentence (`lead`) and parts."""

    id: str
    title: str
    lead: str = ""
    parts: list[Part] = field(default_factory=list)
    missing: bool = False


WINDOW = "a profiling window (`--set profile.steps=[10,20]`) and the event files of all ranks"
"""Requirement of most measurements, as part of a sentence."""


def missing(id: str, title: str, why: str) -> Section:
    """Return a section about which nothing is known, with the sentence that says why."""
    return Section(id, title, "", [Note(why, "missing")], missing=True)


def text(value: Any, kind: str = "") -> Cell:
    """Return a text cell; None and empty text become a dash."""
    return Cell(NONE if value is None or value == "" else str(value), tone=kind)


def figure(shown: str, value: Any, **more: Any) -> Cell:
    """Return a cell with a number as `shown`, sorted by `value`."""
    return Cell(shown, sort=number(value), **more)


def columns(*labels: str) -> tuple[Column, ...]:
    """Return column heads: label `=name` is text, `#name` code, all others numbers; `name|meaning` adds a title."""
    made = []
    for label in labels:
        kind = {"=": "text", "#": "code"}.get(label[0], "number")
        name, _, title = label.lstrip("=#").partition("|")
        made.append(Column(name, kind, title))
    return tuple(made)


def clean(value: Any, depth: int = 0) -> Any:
    """Return the document without what cannot be printed: control characters, very long strings, NaN and infinities."""
    if isinstance(value, str):
        value = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
        return value if len(value) <= LONGEST else value[:LONGEST] + "…"
    if isinstance(value, float):
        return number(value)
    if depth > 30:
        return None
    if isinstance(value, dict):
        return {clean(str(key)): clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item, depth + 1) for item in value]
    return value


def rows_of(value: Any) -> list[dict[str, Any]]:
    """Return the dicts of a list or tuple; an empty list for anything else."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, (list, tuple)) else []


def dict_of(value: Any) -> dict[str, Any]:
    """Return `value` if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def list_of(value: Any) -> list[Any]:
    """Return a list or tuple as a list; an empty one for anything else."""
    return list(value) if isinstance(value, (list, tuple)) else []


def grid_of(value: Any) -> list[list[float]]:
    """Return a rectangle of numbers, 0 where one is unknown; empty if rows differ in length."""
    grid = [[number(x) or 0.0 for x in row] for row in list_of(value) if isinstance(row, (list, tuple))]
    return grid if grid and grid[0] and all(len(row) == len(grid[0]) for row in grid) else []


def labels_of(value: Any, length: int) -> list[str]:
    """Return the names of `length` rows or columns: as given, else their positions."""
    names = list_of(value)
    return [str(name) for name in names] if len(names) == length else [str(i) for i in range(length)]


def sentence(*parts: str) -> str:
    """Join sentences by one space, without the empty ones."""
    return " ".join(part for part in parts if part)


def listing(words: Sequence[str], most: int = 6) -> str:
    """Return words as "a, b and c"; those beyond `most` become "N more"."""
    shown = list(words[:most])
    if len(words) > most:
        shown.append(f"{len(words) - most} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else ""


def short(value: Any, most: int) -> str:
    """Return a value as text of at most `most` characters, without the middle of a longer one."""
    shown = " ".join(str(value).split())
    if len(shown) <= most:
        return shown
    tail = most // 3
    return f"{shown[: most - tail - 1]}…{shown[-tail:]}"


Budget = tuple[str, dict[str, float]]


def budget_rows(doc: dict[str, Any], most: int = 40) -> list[Budget]:
    """Return the budget's bars, (label, seconds by category), the mean first; above `most` ranks, means of blocks."""
    ranks = [
        (row.get("rank", i), {k: number(v) or 0.0 for k, v in row.items() if k not in ("rank", "wall_s")})
        for i, row in enumerate(rows_of(doc.get("budget_by_rank")))
    ]
    mean = {key: number(value) or 0.0 for key, value in dict_of(doc.get("budget_s")).items()}
    bars: list[Budget] = [("mean", mean)] if any(mean.values()) else []
    if len(ranks) <= most:
        return bars + [(f"rank {rank}", parts) for rank, parts in ranks]
    width = -(-len(ranks) // 32)
    for start in range(0, len(ranks), width):
        block = ranks[start : start + width]
        keys = dict.fromkeys(key for _, parts in block for key in parts)
        sums = {key: sum(parts.get(key, 0.0) for _, parts in block) / len(block) for key in keys}
        bars.append((f"{block[0][0]}–{block[-1][0]}", sums))
    return bars
