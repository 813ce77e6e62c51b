"""Results of a benchmark: rows with their targets, a table of them, and the file that keeps them. Torch-free."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from dist_gpt.cpu import allowed

FOLDER = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One number. `target` is a lower bound (`at_least`) or an upper bound; without it the number is only reported."""

    what: str
    value: float
    unit: str = ""
    target: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        """True if the value meets the target; None without a target. NaN meets no target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the row in the table."""
        if self.target is None:
            return (self.what, number(self.value), self.unit, "", "")
        sign = ">=" if self.at_least else "<="
        return (self.what, number(self.value), self.unit, f"{sign} {self.target:g}", "met" if self.met else "NOT MET")


@dataclass
class Result:
    """Rows of one benchmark, a sentence on what was compared (`what`), the settings, and all measurements (`raw`)."""

    name: str
    what: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    grid: list[tuple[str, ...]] = field(default_factory=list)
    """Cells of a grid above the rows, for comparisons with many columns; the first line is the head."""
    notes: list[str] = field(default_factory=list)
    """Sentences below the grid."""

    @property
    def met(self) -> bool:
        """True if every row with a target meets it."""
        return all(row.met is not False for row in self.rows)

    def document(self, stamp: str) -> dict[str, Any]:
        """Return the result for a JSON document, with `stamp` as its date."""
        rows = [{**asdict(row), "met": row.met} for row in self.rows]
        return {
            "name": self.name, "stamp": stamp, "what": self.what, "met": self.met, "machine": machine(),
            "settings": self.settings, "rows": rows, "raw": self.raw, "grid": self.grid, "notes": self.notes,
        }  # fmt: skip


def number(value: float) -> str:
    """Return `value` with four significant digits and thousands separators; whole numbers in full."""
    if isinstance(value, int) or (value == int(value) if abs(value) < 1e15 else False):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(result: Result) -> str:
    """Return the rows in aligned columns under the benchmark's name and sentence."""
    rows = [("", "value", "", "target", ""), *(row.cells() for row in result.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [f"{result.name}: {result.what}", *_grid(result.grid), *(f"  {note}" for note in result.notes)]
    for what, value, unit, target, met in rows:
        cells = (what.ljust(widths[0]), value.rjust(widths[1]), unit.ljust(widths[2]), target.ljust(widths[3]), met)
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _grid(cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a grid: words aligned left, numbers right."""
    if not cells:
        return []
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        shown = [
            cell.rjust(width) if cell[:1].isdigit() or cell[:1] in "-+" else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append(("  " + "  ".join(shown)).rstrip())
    return lines


def machine() -> dict[str, Any]:
    """Return a description of the machine, with its current load."""
    return {
        "cores": len(allowed()),
        "cpu": _cpu(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def write(results: Sequence[Result], stamp: str, folder: Path = FOLDER) -> list[Path]:
    """Write one file per benchmark, replacing each atomically. Return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in results:
        path = folder / f"{result.name}.json"
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(result.document(stamp), indent=1) + "\n")
        aside.replace(path)
        paths.append(path)
    return paths
