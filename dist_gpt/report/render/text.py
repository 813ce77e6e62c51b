"""Write report.md, and the lines that `dist-gpt report` and the end of a run print."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from dist_gpt.report import units
from dist_gpt.report.render import palette
from dist_gpt.report.render.elements import (
    Cell,
    Facts,
    Note,
    Part,
    Picture,
    Section,
    Table,
    clean,
    dict_of,
    list_of,
    rows_of,
    short,
)
from dist_gpt.report.render.sections import budget_shares, profiling_cost, sections, summary, tiles
from dist_gpt.report.render.sections_comm import exposed_s

WIDTH, MOST_LINES = 108, 40


# --- Markdown ----------------------------------------------------------------------------------------


def markdown(doc: dict[str, Any], compare: dict[str, Any] | None = None) -> str:
    """Return the report as Markdown; pictures are links to figures/*.svg beside it."""
    doc, compare = clean(doc), clean(compare) if compare else None
    verdict = dict_of(doc.get("verdict"))
    blocks = [f"# {_inline(doc.get('name') or 'run')}: where the time went"]
    place = [_inline(doc.get(key)) for key in ("run_dir", "generated") if doc.get(key)]
    blocks += [" · ".join(place)] if place else []
    blocks.append(f"**{_inline(verdict.get('line') or NO_VERDICT)}**")
    blocks += [_inline(verdict["why"])] if verdict.get("why") else []
    blocks += [_inline(summary(doc))] if budget_shares(doc) else []
    blocks += [f"Try next: {_inline(verdict['next'])}"] if verdict.get("next") else []
    if found := tiles(doc):
        blocks.append(_rows([[name for name, _, _ in found], ["---"] * len(found), [value for _, value, _ in found]]))
    blocks.append(f"Cost of profiling: {_inline(profiling_cost(doc))}")
    if problems := list_of(doc.get("problems")):
        lines = [f"- {_inline(problem)}" for problem in problems[:50]]
        blocks.append("Problems in the data of this report:\n\n" + "\n".join(lines))
    for section in sections(doc, compare):
        blocks += _section(section)
    return "\n\n".join(blocks) + "\n"


NO_VERDICT = "No verdict: the records of this run are not sufficient."


def _section(section: Section) -> list[str]:
    blocks = [f"## {_inline(section.title)}"]
    if section.lead:
        blocks.append(_inline(section.lead))
    return blocks + [_part(part) for part in section.parts]


def _part(part: Part) -> str:
    if isinstance(part, Table):
        head = [[column.label for column in part.columns]]
        rule = [["---:" if column.kind == "number" else "---" for column in part.columns]]
        rows = head + rule + [[_field(cell, column.kind) for cell, column in _paired(part, row)] for row in part.rows]
        note = f"\n\n{_inline(part.note)}" if part.note else ""
        return f"{_inline(part.caption)}:\n\n{_rows(rows)}{note}"
    if isinstance(part, Picture):
        return f"![{part.name}](figures/{part.name}.svg)\n\n*{_inline(part.caption)}*"
    if isinstance(part, Facts):
        rows = [["", ""], ["---", "---:"]]
        return _rows(rows + [[label, _inline(value)] for label, value, _ in part.items])
    return _inline(part.text)


def _paired(table: Table, row: list[Cell]) -> list[tuple[Cell, Any]]:
    return list(zip(row, table.columns, strict=True))


def _field(cell: Cell, kind: str) -> str:
    shown = _inline(cell.text)
    return f"`{cell.text}`" if kind == "code" and re.fullmatch(r"[\w.:/+\[\], ()=-]+", cell.text) else shown


def _rows(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _inline(value: Any) -> str:
    """Return text escaped for Markdown; backticks keep their meaning, but HTML cannot get in."""
    flat = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    parts = re.split(r"(`[^`]+`)", flat)  # every second part is code, in which only a table's bar is special
    parts[::2] = [re.sub(r"([\\*\[\]|$])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [part.replace("|", r"\|") for part in parts[1::2]]
    return "".join(parts)


# --- the terminal ------------------------------------------------------------------------------------


def terminal(doc: dict[str, Any]) -> str:
    """Return 20 to 40 lines of at most 110 columns: the verdict, the mean step as bars, each section's finding."""
    doc = clean(doc)
    verdict = dict_of(doc.get("verdict"))
    lines = _wrapped("", _opening(doc), 2) + [""]
    lines += _wrapped("Verdict  ", str(verdict.get("line") or NO_VERDICT), 3)
    lines += _wrapped("         ", str(verdict["why"]), 3) if verdict.get("why") else []
    lines += _wrapped("Next     ", str(verdict["next"]), 3) if verdict.get("next") else []
    lines += ["", *_bars(doc)]
    if found := tiles(doc):
        lines += [*_wrapped("", "; ".join(f"{name} {value}" for name, value, _ in found) + ".", 2), ""]
    lines += _top_collectives(doc)
    problems = [str(problem) for problem in list_of(doc.get("problems"))]
    for problem in problems[:3]:
        lines += _wrapped("Problem  ", problem, 2)
    lines += [f"         and {units.count_of(len(problems) - 3, 'more problem')}"] if len(problems) > 3 else []
    lines += _findings(doc, MOST_LINES - len(lines) - 2)
    cost = _wrapped("Cost of profiling  ", profiling_cost(doc), 2)
    return "\n".join(line.rstrip() for line in (lines + cost)[:MOST_LINES]) + "\n"


def _opening(doc: dict[str, Any]) -> str:
    found = [section for section in sections(doc) if section.id == "identity"]
    return found[0].lead or short(doc.get("name") or "run", 80)


def _bars(doc: dict[str, Any], most: int = 8) -> list[str]:
    """Return the largest parts of the mean step as lines with bars."""
    shares = sorted(budget_shares(doc), key=lambda part: -part[2])
    if not shares:
        return _wrapped("Budget  ", "not known: splitting a step needs a profiling window and all event files.", 2) + [
            ""
        ]
    lines = _wrapped("", summary(doc), 2)
    for key, seconds, share in shares[:most]:
        bar = "█" * max(round(share * 56), 1)
        lines.append(
            f"  {short(palette.label(key), 24):24} {units.seconds(seconds):>9} {units.percent(share):>7}  {bar}"
        )
    return [*lines, ""]


def _top_collectives(doc: dict[str, Any]) -> list[str]:
    rows = sorted(rows_of(doc.get("collectives")), key=lambda row: -exposed_s(row))[:4]
    if not rows:
        return []
    lines = [f"  {'most exposed collectives':34} {'calls':>7} {'p50':>9} {'busbw':>10} {'transfer':>9} {'waiting':>9}"]
    for row in rows:
        name = f"{short(row.get('axis'), 8)} {short(row.get('op'), 16)} {units.size(row.get('payload_bytes'))}"
        lines.append(
            f"  {short(name, 34):34} {units.plain(row.get('calls')):>7} {units.seconds(row.get('time_s_p50')):>9} "
            f"{units.rate(row.get('busbw_bytes_per_s')):>10} {units.seconds(row.get('exposed_s')):>9} "
            f"{units.seconds(row.get('wait_s')):>9}"
        )
    return [*lines, ""]


def _findings(doc: dict[str, Any], room: int) -> list[str]:
    """Return the lead of each section, or else its first note, as far as there is room."""
    wanted = ("stragglers", "pipeline", "memory", "predicted", "accounting", "overlap", "critical-path")
    found = {section.id: section for section in sections(doc)}
    lines: list[str] = []
    for name in wanted:
        section = found[name]
        said = section.lead or next((part.text for part in section.parts if isinstance(part, Note)), "")
        more = _wrapped(f"{section.title.split(' ')[0]:13}", said.replace("`", ""), 2)
        if said and len(lines) + len(more) <= room:
            lines += more
    return lines


def _wrapped(head: str, text: str, most: int) -> list[str]:
    """Return `text` after `head`, wrapped to at most `most` lines."""
    flat = units.glued(" ".join(text.split()))
    wrapper = textwrap.TextWrapper(
        WIDTH, initial_indent=head, subsequent_indent=" " * len(head), max_lines=most, placeholder=" …"
    )
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in wrapper.wrap(flat)] or [head.rstrip()]
