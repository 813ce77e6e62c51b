"""Read one event file without trusting any of its lines.

A file is read in blocks, a block's lines are parsed by one json.loads where that works, and rows are checked as
arrays. An unreadable row would shift the count of the calls after it, by which ranks are matched, so all rows of the
steps that it may belong to are left out as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_gpt.events import CALL, CALL_COLUMNS, OPS, SCHEMA, SPAN, SPAN_COLUMNS
from dist_gpt.report.read.event_schema import FACTS, HEADER, STEP, complete, fits

BLOCK_BYTES = 4_000_000
LONGEST_LINE = 1_000_000
_FAR = (1 << 60) - 1  # ns: 36 years
_COUNTED, _UNCOUNTED = -1, 0
"""First number of an unreadable row: already counted as broken, or not yet."""
_WIDTH = {CALL: 1 + len(CALL_COLUMNS), SPAN: 1 + len(SPAN_COLUMNS)}
_AFTER_ISSUE = slice(CALL_COLUMNS.index("issued"), CALL_COLUMNS.index("cpu") + 1)
_HEADER = '{"schema":'


class SchemaError(ValueError):
    """Error for an event file with another schema than this version reads."""


class Attempt:
    """Contents of an event file's last attempt, which begins at the last header."""

    def __init__(self, header: dict[str, Any], number: int = 0) -> None:
        self.header = header
        self.number = number  # headers so far
        self.steps: list[dict[str, Any]] = []
        self.facts: dict[str, list[Any]] = {kind: [] for kind in FACTS}
        self.lines = 0
        self.cut = False
        self.broken = self.first_broken = 0
        self.gaps: set[int] = set()
        """Steps whose rows are left out; known once `rows` has run."""
        self._rows: dict[int, list[np.ndarray]] = {CALL: [], SPAN: []}
        self._comm: dict[str, Any] = {}

    def last(self, kind: str) -> Any:
        """Return the newest fact of a kind, or None."""
        return self.facts[kind][-1] if self.facts[kind] else None

    def fact(self, value: dict[str, Any]) -> bool:
        """Keep an object; return False if it does not have the shape of its kind. Unknown kinds pass."""
        if "phase" in value:
            return self._step(value)
        kind = next((kind for kind in FACTS if kind in value), None)
        if kind is None:
            return True
        if fits(value[kind], FACTS[kind]):
            self.facts[kind].append(complete(value[kind], FACTS[kind]))
            return True
        return False

    def _step(self, value: dict[str, Any]) -> bool:
        """Keep a step's fact; return False if it does not fit. Steps with the same traffic share one `comm` object."""
        before = self._comm.get(str(value["phase"]))
        if before is not None and value.get("comm") == before:
            value["comm"] = before
        if not fits(value, STEP):
            return False
        self._comm[value["phase"]] = value["comm"]
        self.steps.append(complete(value, STEP))
        return True

    def cannot_read(self, line: int) -> None:
        """Count the line of number `line` as broken."""
        self.broken += 1
        self.first_broken = self.first_broken or line

    def add_rows(self, kind: int, rows: list[list[Any]]) -> None:
        """Add rows of the right length for `kind`, in the order of the file."""
        if rows:
            self._rows[kind].append(_integers(rows))

    def rows(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (calls, spans) without their first column; `steps` is the length of the rank's step list."""
        channels = len(self.header["channels"])
        # kind, step, index, channel, op, payload, six times, flags; kind, step, index, three times
        low = [[CALL, 0, -1, 0, 0, 0, *[-_FAR] * 6, 0], [SPAN, 0, -1, *[-_FAR] * 3]]
        high = [[CALL, _FAR, steps - 1, channels - 1, len(OPS) - 1, _FAR, *[_FAR] * 7],
                [SPAN, _FAR, steps - 1, *[_FAR] * 3]]  # fmt: skip
        tables = [np.concatenate(self._rows[kind] or [np.empty((0, _WIDTH[kind]), np.int64)]) for kind in (CALL, SPAN)]
        self._rows = {}
        good = [np.asarray(((t >= a) & (t <= b)).all(axis=1)) for t, a, b in zip(tables, low, high, strict=True)]
        for table, readable in zip(tables, good, strict=True):
            self.gaps |= _steps_at(table[:, 1], readable)
            self.broken += int((~readable & (table[:, 0] != _COUNTED)).sum())
        if self.gaps:
            missing = np.array(sorted(self.gaps))
            good = [g & ~np.isin(t[:, 1], missing) for t, g in zip(tables, good, strict=True)]
        calls, spans = (t[g][:, 1:] for t, g in zip(tables, good, strict=True))
        np.maximum(calls[:, _AFTER_ISSUE], -1, out=calls[:, _AFTER_ISSUE])
        return calls, spans


def _integers(rows: list[list[Any]]) -> np.ndarray:
    """Return `rows` as (n, width) int64; a row that holds anything else becomes an unreadable one."""
    try:
        table = np.array(rows)
        if table.dtype == np.int64 and table.ndim == 2:
            return table
    except ValueError:
        pass  # a list inside a row
    unread = [_UNCOUNTED] * len(rows[0])
    return np.array([row if all(type(x) is int and abs(x) <= _FAR for x in row) else unread for row in rows], np.int64)


def _steps_at(step: np.ndarray, readable: np.ndarray) -> set[int]:
    """Return the steps that unreadable rows may belong to: those of the nearest readable rows before and after."""
    holes = np.flatnonzero(~readable)
    known = np.flatnonzero(readable)
    if not len(holes) or not len(known):
        return set()
    behind = np.searchsorted(known, holes)
    near = np.concatenate([behind[behind > 0] - 1, behind[behind < len(known)]])
    return set(step[known[near]].tolist())


# --- the file -------------------------------------------------------------------------------------------------------


def read_attempt(path: Path) -> Attempt:
    """Return the last attempt in a file, with an empty header if there is none. Raises SchemaError and OSError."""
    attempt, total = Attempt({}), 0
    for number, lines, cut in _blocks(path):
        total += len(lines)
        attempt = _take(attempt, number, lines, cut)
    attempt.lines = total
    return attempt


def _take(attempt: Attempt, number: int, lines: list[str], cut: bool) -> Attempt:
    """Add a block of lines, numbered from `number`, and return the attempt that is current after it.

    `cut`: the last line has no line end.
    """
    values = parse(lines)
    if cut and values[-1] is None:
        attempt.cut = True
        values.pop()
    rows: dict[int, list[list[Any]]] = {_WIDTH[CALL]: [], _WIDTH[SPAN]: []}
    width = _WIDTH[CALL]  # of the row before
    for i, value in enumerate(values):
        if type(value) is list and len(value) in rows:
            width = len(value)
            rows[width].append(value)
        elif type(value) is dict and "schema" in value:
            attempt = _begin(attempt, value)
            rows = {width: [] for width in rows}
        elif (type(value) is not dict or not attempt.fact(value)) and lines[i]:
            attempt.cannot_read(number + i)
            if not lines[i].startswith("{"):  # a broken row, of the kind that it starts like or else of the row before
                seems = next((w for kind, w in _WIDTH.items() if lines[i].startswith(f"[{kind},")), width)
                rows[seems].append([_COUNTED] * seems)
    for kind, width in _WIDTH.items():
        attempt.add_rows(kind, rows[width])
    return attempt


def _begin(before: Attempt, header: dict[str, Any]) -> Attempt:
    """Return the attempt that `header` begins. Raises SchemaError."""
    given = header["schema"]
    if type(given) is int and given != SCHEMA:
        advice = "a newer dist_gpt; update this one" if given > SCHEMA else "an older dist_gpt; use that one instead"
        raise SchemaError(f"schema {given}, expected {SCHEMA}: written by {advice}")
    return Attempt(complete(header, HEADER) if fits(header, HEADER) else {}, before.number + 1)


def _blocks(path: Path) -> Iterator[tuple[int, list[str], bool]]:
    """Yield (number of the first line, lines, whether the last line has no end) for each block of the file."""
    number, rest = 1, b""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            whole, newline, tail = block.rpartition(b"\n")
            if not newline:
                rest = (rest + block)[: LONGEST_LINE + 1]  # already too long to be parsed
                continue
            lines = (rest + whole).decode("utf-8", "replace").split("\n")
            yield number, lines, False
            number, rest = number + len(lines), tail
    if rest:
        yield number, [rest.decode("utf-8", "replace")], True


def parse(lines: list[str]) -> list[Any]:
    """Return the values of JSON lines, parsed all at once where possible; None for a line that is not JSON."""
    try:
        values: list[Any] = json.loads(f"[{','.join(lines)}]", parse_constant=lambda _: None)
        if len(values) == len(lines):
            return values
    except (ValueError, RecursionError):
        pass
    return [_parse_line(line) for line in lines]


def _parse_line(line: str) -> Any:
    if len(line) > LONGEST_LINE:
        return None
    try:
        return json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        at = line.find(_HEADER, 1)  # a resumed run appends its header to a line that was cut off
        return _parse_line(line[at:]) if at > 0 else None
