"""Write the report section by section, for the page and for report.md alike.

This module holds the opening of the report and the sections about the run as a whole. Communication is in
sections_comm.py, cost against prediction in sections_cost.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dist_gpt.report import units
from dist_gpt.report.render import palette
from dist_gpt.report.render.elements import (
    WINDOW,
    Cell,
    Facts,
    Note,
    Part,
    Picture,
    Section,
    Table,
    columns,
    dict_of,
    figure,
    list_of,
    listing,
    missing,
    rows_of,
    sentence,
    short,
    text,
)  # fmt: skip
from dist_gpt.report.render.sections_comm import collectives, overlap, pipeline, stragglers
from dist_gpt.report.render.sections_cost import (
    accounting,
    critical_path,
    device_samples,
    memory,
    predicted,
    roofline,
    torch_kernels,
)  # fmt: skip
from dist_gpt.report.units import amount, number

MOST_ROWS = 64
"""Most rows of a table over ranks; all are in report.json."""


# --- the opening -------------------------------------------------------------------------------------


def budget_shares(doc: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return (category, seconds, share) of the mean step in drawing order; empty if unknown."""
    budget = {key: max(amount(value), 0.0) for key, value in dict_of(doc.get("budget_s")).items()}
    total = sum(budget.values())
    return [(key, budget[key], budget[key] / total) for key in palette.ordered(budget) if budget[key] > 0]


def summary(doc: dict[str, Any]) -> str:
    """Return one sentence on how the mean step was spent; empty if unknown."""
    shares = budget_shares(doc)
    if not shares:
        return ""
    groups: dict[str, float] = {}
    for key, _, share in shares:
        groups[palette.group_of(key)] = groups.get(palette.group_of(key), 0.0) + share
    total = sum(seconds for _, seconds, _ in shares)
    order = sorted(groups.items(), key=lambda item: (item[0] == "other", -item[1]))
    words = {"computing": "computing", "pipeline bubble": "idle in the pipeline bubble", "other": "everything else"}
    spent = [f"{units.percent(share)} {words.get(group, group)}" for group, share in order]
    return f"A step takes {units.seconds(total)}: {listing(spent)}."


def profiling_cost(doc: dict[str, Any]) -> str:
    """Return sentences on the cost of the measurement itself."""
    cost = dict_of(dict_of(doc.get("verdict")).get("profiling"))
    records, one, share = (number(cost.get(key)) for key in ("records_per_step", "record_s", "share"))
    inside, outside, ratio = (number(cost.get(key)) for key in ("step_s_inside", "step_s_outside", "ratio"))
    isolated = ""
    if records is not None and one is not None:
        isolated = f"{units.plain(round(records, 1))} records per step at {units.seconds(one)} each"
        isolated += f": {units.percent(share)} of the step." if share is not None else "."
    elif share is not None:
        isolated = f"{units.percent(share)} of the step."
    compared = ""
    if inside is not None and outside is not None:
        compared = f"Steps take {units.seconds(inside)} inside the window, {units.seconds(outside)} outside"
        compared += f" ({units.percent(ratio - 1)} longer inside)." if ratio is not None and ratio > 1 else "."
    return sentence(isolated, compared) or "Not known: this needs a profiling window and steps outside it."


def tiles(doc: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the figures beside the verdict: (label, value, note)."""
    head = dict_of(doc.get("headline"))
    p95 = number(head.get("step_s_p95"))
    found = [
        ("step time, p50", units.seconds(head.get("step_s_p50")), f"p95 {units.seconds(p95)}" if p95 else ""),
        ("tokens per second", units.plain(_rounded(head.get("tokens_per_s"))), "whole job"),
        ("MFU", units.percent(head.get("mfu")), "model FLOPs / peak"),
        ("goodput", units.percent(head.get("goodput")), "training time / wall time"),
    ]
    exposed = sum(share for key, _, share in budget_shares(doc) if key.startswith(("transfer.", "wait.")))
    if budget_shares(doc):
        found.insert(2, ("exposed", units.percent(exposed), "blocked on communication"))
    return [tile for tile in found if tile[1] != units.NONE]


def _rounded(value: Any) -> float | None:
    x = number(value)
    return None if x is None else float(round(x)) if abs(x) >= 100 else x


def compared(compare: dict[str, Any]) -> Section:
    """Return the section that compares this run with another one."""
    other = dict_of(compare.get("other"))
    name = short(other.get("name") or "another run", 80)
    where = short(other.get("run_dir") or name, 120)
    rows = rows_of(compare.get("rows"))
    told = [row for i, row in enumerate(rows) if i < 3 or row.get("verdict") not in ("same", None)]
    alike = [row for row in rows if row not in told]
    changes = [
        [text(row.get("key")), text(row.get("this")), text(row.get("other"))]
        for row in rows_of(compare.get("config_changes"))
    ]
    parts: list[Part] = []
    if told:
        parts.append(Table(f"This run vs. {where}", COMPARED, [_compared_row(row) for row in told]))
    if alike:
        parts.append(Table("No difference beyond the noise", COMPARED, [_compared_row(r) for r in alike], folded=True))
    parts.append(
        Table("Settings that differ", columns("#setting", "#this run", "#other run"), changes)
        if changes
        else Note("Both runs have the same configuration.")
    )
    return Section("compare", f"Compared with {name}", str(compare.get("verdict") or ""), parts)


COMPARED = columns("=what", "this run", "other run", "change|this run relative to the other",
                   "noise|expected difference between two runs of one configuration", "=verdict")  # fmt: skip


def _compared_row(row: dict[str, Any]) -> list[Cell]:
    tones = {"better": "good", "worse": "bad", "changed": "warn", "unknown": "muted"}
    what, noise = str(row.get("what", "")), number(row.get("noise"))
    key = what.removeprefix("budget: ") if what.startswith("budget: ") else ""
    return [
        Cell(palette.label(key), key=key) if key else text(what),
        figure(units.with_unit(row.get("this"), row.get("unit")), row.get("this")),
        figure(units.with_unit(row.get("other"), row.get("unit")), row.get("other")),
        figure(_signed(row.get("change")), row.get("change")),
        figure("± " + units.percent(noise) if noise is not None else units.NONE, noise),
        text(row.get("verdict"), tones.get(str(row.get("verdict")), "")),
    ]


def _signed(change: Any) -> str:
    x = number(change)
    return ("+" if x is not None and x > 0 else "") + units.percent(x)


# --- the run as a whole ------------------------------------------------------------------------------


def identity(doc: dict[str, Any]) -> Section:
    """Return the section on what ran where: configuration, versions, ranks and clocks."""
    part = dict_of(doc.get("identity"))
    if not part:
        return missing("identity", "Identity", "Not known: this needs plan.json and the headers of the event files.")
    parts: list[Part] = []
    changed = [
        [text(row.get("key")), text(row.get("value")), text(row.get("default"), "muted")]
        for row in rows_of(part.get("changed"))
    ]
    if changed:
        heads = columns("#setting", "#value", "#default")
        parts.append(Table("Settings that differ from their defaults", heads, changed, half=True))
    else:
        parts.append(Note("No setting differs from its default."))
    entries = [
        [text(name), text(value)]
        for key in ("versions", "environment")
        for name, value in dict_of(part.get(key)).items()
    ]
    if entries:
        parts.append(Table("Versions and environment", columns("#name", "#value"), entries[:100], half=True))
    ranks = rows_of(part.get("ranks"))
    parts += [_rank_table(ranks)] if ranks else [Note("Hosts and devices are not known: no event file was readable.")]
    if clock := _clock_parts(rows_of(part.get("clocks"))):
        parts += clock
    else:
        parts.append(Note("Clocks were not compared, so times of different ranks are not comparable."))
    return Section("identity", "Identity", _identity_lead(doc, part, ranks), parts)


def _identity_lead(doc: dict[str, Any], part: dict[str, Any], ranks: list[dict[str, Any]]) -> str:
    layout = dict_of(part.get("layout"))
    mesh = " × ".join(f"{axis} {layout[axis]}" for axis in ("pp", "dp", "cp", "tp") if amount(layout.get(axis)) > 1)
    hosts = {str(row["host"]) for row in ranks if row.get("host")}
    where = f" on {units.count_of(len(hosts), 'host')}" if hosts else ""
    world = units.count_of(int(amount(part.get("world"))), "rank")
    ran = f"Run {short(doc.get('name') or 'without a name', 80)}: {world}{f' ({mesh})' if mesh else ''}{where}"
    ran += f", backend {short(part['backend'], 20)}" if part.get("backend") else ""
    ran += ", single-copy transfers within nodes." if part.get("single_copy") else "."
    window, total = list_of(part.get("window")), int(amount(part.get("steps_total")))
    profiled = (
        f"Steps {window[0]} to {window[-1]} of {units.plain(total)} were profiled."
        if window
        else f"No step was profiled; the always-on counters cover {units.count_of(total, 'step')}."
    )
    attempts = int(amount(part.get("attempts")))
    again = f"The run was started {attempts} times; the report covers the last attempt." if attempts > 1 else ""
    return sentence(ran, profiled, again)


def _rank_table(ranks: list[dict[str, Any]]) -> Table:
    keys = ("rank", "pp", "dp", "cp", "tp", "host", "device", "pid")
    rows = [[_value(row.get(key)) for key in keys] for row in ranks[:MOST_ROWS]]
    heads = columns(*(("=" if key in ("host", "device") else "") + key for key in keys))
    note = f"The first {MOST_ROWS} of {units.plain(len(ranks))} ranks; all are in report.json." * (
        len(ranks) > MOST_ROWS
    )
    return Table("All ranks", heads, rows, note, folded=True)


def _value(value: Any) -> Cell:
    return figure(str(int(value)), value) if number(value) is not None else text(value)


def _clock_parts(clocks: list[dict[str, Any]]) -> list[Part]:
    if not clocks:
        return []
    rows = []
    for row in clocks[:MOST_ROWS]:
        error, drift = number(row.get("error_s")), number(row.get("drift_ppm"))
        rows.append(
            [
                _value(row.get("rank")),
                figure(units.seconds(row.get("offset_s")), row.get("offset_s")),
                figure("± " + units.seconds(error) if error is not None else units.NONE, error),
                figure(f"{units.plain(round(drift, 2))} ppm" if drift is not None else units.NONE, drift),
                figure(units.seconds(row.get("repaired_s")), row.get("repaired_s")),
            ]
        )
    heads = columns("rank", "offset|rank 0's clock minus this rank's", "error|half the best round trip", "drift",
                    "repair|shift after which no message arrives before it is sent")  # fmt: skip
    note = f"The first {MOST_ROWS} of {units.plain(len(clocks))} ranks." if len(clocks) > MOST_ROWS else ""
    table = Table("Clocks against rank 0", heads, rows, note, folded=True)
    known = sum(number(row.get("offset_s")) is not None for row in clocks)
    caption = (
        "Left: the offset of each rank's clock from rank 0's, with error bars; right: the errors alone. Times of two "
        "ranks are comparable to within the sum of their errors."
    )
    return [Picture("clocks", caption), table] if known > 1 else [table]


def headline(doc: dict[str, Any]) -> Section:
    """Return the section on the run's speed and on the wall time of the job."""
    head = dict_of(doc.get("headline"))
    if not head:
        return missing("headline", "Headline", "Not known: no rank has recorded a finished training step.")
    peak = dict_of(head.get("peak"))
    flops = number(head.get("tflops_per_gpu"))
    items = [
        ("step time, p50", units.seconds(head.get("step_s_p50")), "half of the steps are faster"),
        ("step time, p95", units.seconds(head.get("step_s_p95")), "one step in twenty is slower"),
        ("tokens per second", units.plain(_rounded(head.get("tokens_per_s"))), "whole job"),
        ("tokens per second and rank", units.plain(_rounded(head.get("tokens_per_s_per_gpu"))), ""),
        ("model FLOPs per rank", units.flops(flops * 1e12 if flops is not None else None), "without recomputation"),
        ("MFU", units.percent(head.get("mfu")), "model FLOPs / peak"),
        ("MFU, causal", units.percent(head.get("mfu_causal")), "with half of the attention scores"),
        ("HFU", units.percent(head.get("hfu")), "executed FLOPs / peak"),
        ("goodput", units.percent(head.get("goodput")), "time in training steps / wall time"),
        ("loss", f"{units.plain(head.get('loss_first'))} → {units.plain(head.get('loss_last'))}", "first to last step"),
    ]
    known = [item for item in items if units.NONE not in item[1]]
    parts: list[Part] = [Facts(known)] if known else []
    if head.get("formula"):
        parts.append(Note(str(head["formula"])))
    if number(peak.get("flops_per_s")) is not None:
        parts.append(Note(f"Peak: {units.flops(peak['flops_per_s'])} ({peak.get('source') or 'source unknown'})."))
    elif number(head.get("mfu")) is None:
        parts.append(Note("MFU and HFU need the peak FLOP/s, which a profiling window measures on the devices."))
    wall = {key: amount(value) for key, value in dict_of(head.get("wall_s")).items() if amount(value) > 0}
    if wall:
        total = sum(wall.values())
        names = {"train": "training steps", "eval": "validation", "start": "start", "between": "between steps"}
        rows = [
            [text(names.get(key, key)), figure(units.seconds(s), s), figure(units.percent(s / total), s, bar=s / total)]
            for key, s in sorted(wall.items(), key=lambda item: -item[1])
        ]
        parts.append(Table("Wall time of the job", columns("=part", "time", "share"), rows))
    return Section("headline", "Headline", "", parts or [Note("No headline figure could be computed.", "missing")])


def budget(doc: dict[str, Any]) -> Section:
    """Return the section on how a step's time was spent."""
    shares = budget_shares(doc)
    by_rank = rows_of(doc.get("budget_by_rank"))
    if not shares and not by_rank:
        return missing("budget", "Step-time budget", f"Not known: splitting a step needs {WINDOW}.")
    parts: list[Part] = []
    blocks = len(by_rank) > 40
    if shares or by_rank:
        who = "one bar per block of neighbouring ranks (their mean)" if blocks else "one bar per rank"
        caption = f"{who[0].upper()}{who[1:]}, the mean on top. The parts of a bar add up to the wall time of a step."
        parts.append(Picture("budget", caption))
    if shares:
        parts.append(_budget_table(shares, by_rank))
    if len([row for row in rows_of(doc.get("waterfall")) if number(row.get("s")) is not None]) > 1:
        caption = (
            "The top row is the step if every rank computed at the ceiling without a pause. Each row below adds one "
            "loss, down to the measured step."
        )
        parts.append(Picture("waterfall", caption))
    return Section("budget", "Step-time budget", _budget_lead(by_rank) or summary(doc), parts)


def _budget_lead(by_rank: list[dict[str, Any]]) -> str:
    """Return a sentence on the category in which ranks differ most; empty for fewer than two ranks."""
    keys = {key for row in by_rank for key in row} - {"rank", "wall_s"}
    if len(by_rank) < 2 or not keys:
        return ""
    mean = {key: sum(amount(row.get(key)) for row in by_rank) / len(by_rank) for key in keys}
    most = {key: max(by_rank, key=lambda row, key=key: amount(row.get(key))) for key in keys}  # type: ignore[misc]
    spread = {key: amount(most[key].get(key)) - mean[key] for key in sorted(keys)}
    key = max(spread, key=lambda key: spread[key])
    if spread[key] < 0.03 * sum(mean.values()):
        return "All ranks spend the step alike: no category differs by more than 3 % of the step."
    return (
        f"Ranks differ most in {palette.label(key)}: {units.seconds(most[key].get(key))} on rank "
        f"{short(most[key].get('rank'), 8)}, {units.seconds(mean[key])} on average."
    )


def _budget_table(shares: list[tuple[str, float, float]], by_rank: list[dict[str, Any]]) -> Table:
    rows = []
    for key, seconds, share in sorted(shares, key=lambda item: -item[1]):
        over = [(amount(row.get(key)), row.get("rank")) for row in by_rank]
        least, most = (min(over, key=lambda o: o[0]), max(over, key=lambda o: o[0])) if over else (None, None)
        rows.append(
            [
                Cell(palette.label(key), key=key),
                figure(units.seconds(seconds), seconds),
                figure(units.percent(share), share, bar=share, key=key),
                figure(f"{units.seconds(least[0])} (rank {short(least[1], 8)})", least[0]) if least else text(None),
                figure(f"{units.seconds(most[0])} (rank {short(most[1], 8)})", most[0]) if most else text(None),
            ]
        )
    heads = columns("=spent on", "mean", "share", "least", "most")
    return Table("The mean step, largest part first", heads, rows)


# --- the appendix ------------------------------------------------------------------------------------


def appendix(doc: dict[str, Any]) -> Section:
    """Return the section of definitions, method and files."""
    pairs = [row for row in list_of(doc.get("definitions")) if isinstance(row, (list, tuple)) and len(row) >= 2]
    parts: list[Part] = []
    if pairs:
        rows = [[text(row[0]), text(row[1])] for row in pairs]
        parts.append(Table("Definitions", columns("=word", "=meaning"), rows))
    parts.append(Note(METHOD))
    files = [[text(name)] for name in list_of(doc.get("files"))]
    if files:
        note = f"The first 100 of {units.plain(len(files))} files." if len(files) > 100 else ""
        parts.append(Table("Source files of this report", columns("#file"), files[:100], note, len(files) > 24))
    else:
        parts.append(Note("The source files of this report are not listed."))
    return Section("appendix", "Appendix: definitions, method, files", "", parts)


METHOD = (
    "Method: counts, bytes and host timestamps of every collective are recorded in every step, completion times only "
    "inside the profiling window, without a device synchronisation per operation. The duration of a collective is from "
    "its last arrival to its last end; the time before that is waiting and is charged to the rank that arrives last. "
    "Clocks are aligned by the fastest ping at the start and at the end, then shifted no further than causality "
    "requires. The categories of the budget are disjoint by construction; the remainder is called unexplained and is "
    "never negative. 1 kB is 1000 bytes."
)

SECTIONS: tuple[Callable[[dict[str, Any]], Section | None], ...] = (
    identity, headline, budget, collectives, overlap, stragglers, pipeline, memory, predicted, roofline, critical_path,
    torch_kernels, device_samples, accounting, appendix,
)  # fmt: skip


def sections(doc: dict[str, Any], compare: dict[str, Any] | None = None) -> list[Section]:
    """Return every section in order; `doc` and `compare` must have passed through `parts.clean`."""
    first = [compared(compare)] if compare else []
    return first + [made for make in SECTIONS if (made := make(doc)) is not None]
