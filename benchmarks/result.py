"""What a benchmark found: rows with their targets, a table of them, and the file that keeps them. No torch."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from dist_gpt.processors import allowed

FOLDER = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One number. `target` with `at_least` says what it must reach; without a target it is only told."""

    what: str
    value: float
    unit: str = ""
    target: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        """None without a target. A value that is not a number meets nothing."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        if self.target is None:
            return (self.what, number(self.value), self.unit, "", "")
        sign = ">=" if self.at_least else "<="
        return (self.what, number(self.value), self.unit, f"{sign} {self.target:g}", "met" if self.met else "NOT MET")


@dataclass
class Result:
    """Rows of one benchmark, in one sentence what was compared, the settings, and every single measurement."""

    name: str
    what: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    grid: list[tuple[str, ...]] = field(default_factory=list)
    """What the table shows above the rows, where they are many sided: cells, the first line being the head."""
    notes: list[str] = field(default_factory=list)
    """Sentences below it."""

    @property
    def met(self) -> bool:
        return all(row.met is not False for row in self.rows)

    def document(self, stamp: str) -> dict[str, Any]:
        """As JSON keeps it."""
        rows = [{**asdict(row), "met": row.met} for row in self.rows]
        return {
            "name": self.name, "stamp": stamp, "what": self.what, "met": self.met, "machine": machine(),
            "settings": self.settings, "rows": rows, "raw": self.raw, "grid": self.grid, "notes": self.notes,
        }  # fmt: skip


def number(value: float) -> str:
    """Four significant digits, thousands apart, whole numbers whole."""
    if isinstance(value, int) or (value == int(value) if abs(value) < 1e15 else False):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(result: Result) -> str:
    """The rows in aligned columns under the benchmark's sentence."""
    rows = [("", "value", "", "target", ""), *(row.cells() for row in result.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [f"{result.name}: {result.what}", *_grid(result.grid), *(f"  {note}" for note in result.notes)]
    for what, value, unit, target, met in rows:
        cells = (what.ljust(widths[0]), value.rjust(widths[1]), unit.ljust(widths[2]), target.ljust(widths[3]), met)
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _grid(cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligned columns: words left, numbers right."""
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
    """Where this was measured."""
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
    """One file per benchmark, written aside and put in place."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in results:
        path = folder / f"{result.name}.json"
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(result.document(stamp), indent=1) + "\n")
        aside.replace(path)
        paths.append(path)
    return paths
