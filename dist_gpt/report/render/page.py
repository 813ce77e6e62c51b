"""Render report.html: one file that can be read without a network and without JavaScript.

jinja2 escapes everything that comes from the run; a policy in the page forbids requests and any script but its own.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dist_gpt.report import units
from dist_gpt.report.render import palette
from dist_gpt.report.render.bars import figures
from dist_gpt.report.render.canvas import themed
from dist_gpt.report.render.elements import Section, clean, dict_of, list_of, rows_of, short
from dist_gpt.report.render.sections import budget_shares, profiling_cost, sections, summary, tiles
from dist_gpt.report.units import amount, number

HERE = Path(__file__).parent
MOST_CELLS = 128
"""Most ranks that the mesh draws one by one; more are drawn as tensor-parallel groups."""


def render(doc: dict[str, Any], compare: dict[str, Any] | None = None, drawn: Mapping[str, str] | None = None) -> str:
    """Return the HTML page of a report's document, and of its comparison with another run if there is one.

    `drawn` is the result of plots.figures for `doc`, if the caller has it already; drawing takes most of the time.
    """
    doc, compare = clean(doc), clean(compare) if compare else None
    drawn = figures(doc) if drawn is None else drawn
    template = _environment().get_template("template.html")
    style, script = (HERE / "style.css").read_text("utf-8"), (HERE / "sort.js").read_text("utf-8").strip()
    return template.render(
        place=[str(doc[key]) for key in ("run_dir", "generated") if doc.get(key)],
        title=short(doc.get("name") or "run", 80),
        verdict=_verdict(doc),
        tiles=tiles(doc),
        spent=_spent(doc),
        summary=summary(doc),
        cost=profiling_cost(doc),
        problems=[str(problem) for problem in list_of(doc.get("problems"))],
        exact=dict_of(doc.get("accounting")).get("exact"),
        sections=_drawn(sections(doc, compare), drawn),
        figures={name: Markup(themed(svg, name)) for name, svg in drawn.items()},
        mesh=_mesh(doc),
        style=Markup(style),
        script=Markup(script),
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"prose": prose, "paint": paint}
    environment.tests["number"] = lambda value: number(value) is not None
    return environment


def prose(text: Any) -> Markup:
    """Return escaped text, in which the parts between backticks become code."""
    escaped = units.glued(str(escape(text)))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped))


def paint(key: str) -> str:
    """Return the CSS background of a budget category."""
    if not key:
        return "var(--rule)"
    fill = palette.colour(key)
    return f"repeating-linear-gradient(135deg,{fill} 0 4px,var(--page) 4px 6px)" if palette.is_striped(key) else fill


def _verdict(doc: dict[str, Any]) -> dict[str, str]:
    part = dict_of(doc.get("verdict"))
    line = str(part.get("line") or "No verdict: the records of this run are not sufficient.")
    return {
        "line": line.replace(" %", "\u00a0%"),  # a figure and its % stay on one line
        "why": str(part.get("why") or ""),
        "next": str(part.get("next") or ""),
    }


def _spent(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of the mean step in drawing order, with their place by size; small ones are put together."""
    shares = budget_shares(doc)
    kept = [part for part in shares if part[2] >= 0.01]
    rest = sum(share for *_, share in shares) - sum(share for *_, share in kept)
    shown = [
        {"key": key, "label": palette.label(key), "share": share, "percent": units.percent(share), "place": -share,
         "time": units.seconds(seconds)}
        for key, seconds, share in kept
    ]  # fmt: skip
    if rest > 0.001:
        total = sum(seconds for _, seconds, _ in shares)
        shown.append({"key": "", "label": "all other", "share": rest, "percent": units.percent(rest), "place": 1.0,
                      "time": units.seconds(rest * total)})  # fmt: skip
    return shown


def _drawn(made: list[Section], drawn: Mapping[str, str]) -> list[Section]:
    """Remove from the sections the pictures that were not drawn, and return the sections."""
    for section in made:
        section.parts[:] = [part for part in section.parts if getattr(part, "name", None) in {None, *drawn}]
    return made


# --- the mesh ----------------------------------------------------------------------------------------


def _mesh(doc: dict[str, Any], most: int = 16) -> dict[str, Any] | None:
    """Return the mesh: stages down, data (and context) parallel copies across, tensor-parallel ranks within."""
    part = dict_of(doc.get("identity"))
    layout = dict_of(part.get("layout"))
    pp, dp, cp, tp = (min(max(int(amount(layout.get(axis))), 1), 1 << 16) for axis in ("pp", "dp", "cp", "tp"))
    ranks = {int(amount(row.get("rank"))): row for row in rows_of(part.get("ranks"))}
    if not layout or not ranks:
        return None
    hosts = list(dict.fromkeys(str(row.get("host") or "") for row in ranks.values()))
    culprit = number(dict_of(doc.get("verdict")).get("culprit"))
    single = pp * dp * cp * tp <= MOST_CELLS
    rows = []
    for stage in range(min(pp, most)):
        blocks = []
        for copy in range(min(dp * cp, most)):
            first = (stage * dp * cp + copy) * tp
            groups = [[first + i] for i in range(tp)] if single else [list(range(first, first + tp))]
            blocks.append([_cell(group, ranks, hosts, culprit) for group in groups])
        rows.append({"name": f"stage {stage}" if pp > 1 else "", "blocks": blocks})
    copies = range(min(dp * cp, most))
    heads = [(f"dp {i // cp}" if dp > 1 else "") + (f" cp {i % cp}" if cp > 1 else "") for i in copies]
    whole = ((pp, "stages"), (dp * cp, "copies"))
    cut = [f"{most} of {units.plain(n)} {what}" for n, what in whole if n > most]
    return {
        "rows": rows, "heads": heads, "hosts": hosts[:24], "more_hosts": max(len(hosts) - 24, 0), "cut": cut,
        "devices": sorted({short(row.get("device") or "device not known", 40) for row in ranks.values()})[:6],
        "single": single, "culprit": None if culprit is None else int(culprit), "tp": tp, "colour": _host_colour,
    }  # fmt: skip


def _cell(
    group: list[int], ranks: dict[int, dict[str, Any]], hosts: list[str], culprit: float | None
) -> dict[str, Any]:
    known = [ranks[rank] for rank in group if rank in ranks]
    names = list(dict.fromkeys(str(row.get("host") or "") for row in known))
    where = short(names[0], 18) + (f" +{len(names) - 1}" if len(names) > 1 else "") if names else "missing"
    title = "; ".join(f"rank {row.get('rank')}: host {row.get('host')}, {row.get('device')}, pid {row.get('pid')}"
                      for row in known[:8])  # fmt: skip
    return {
        "name": str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}",
        "host": where, "title": title, "missing": not known, "culprit": culprit in group,
        "colour": _host_colour(hosts.index(names[0])) if names else "transparent",
    }  # fmt: skip


def _host_colour(index: int) -> str:
    """Return a host's colour: in turn those of memory, which appear nowhere beside the mesh, and three more."""
    tones = [*palette.MEMORY.values(), "#d55e00", "#6a5fc1", "#96703f"]
    return tones[index % len(tones)]
