"""Write the sections about communication: collectives, overlap, stragglers, pipeline."""

from __future__ import annotations

from typing import Any

from dist_gpt.report import units
from dist_gpt.report.render.elements import (
    WINDOW,
    Cell,
    Note,
    Part,
    Picture,
    Section,
    Table,
    columns,
    dict_of,
    figure,
    grid_of,
    list_of,
    listing,
    missing,
    rows_of,
    sentence,
    short,
    text,
)  # fmt: skip
from dist_gpt.report.units import amount, number


def collectives(doc: dict[str, Any]) -> Section:
    """Return the section on the cost of each kind of collective."""
    rows = rows_of(doc.get("collectives"))
    parts: list[Part] = []
    if rows:
        step = sum(max(amount(value), 0.0) for value in dict_of(doc.get("budget_s")).values())
        parts.append(_collective_table(rows, step))
        if any(amount(row.get("payload_bytes")) > 0 and amount(row.get("busbw_bytes_per_s")) > 0 for row in rows):
            caption = (
                "Each mark is one kind of call: larger calls are further right, faster ones higher, hollow ones are "
                "emulated by the backend. Bus bandwidth is comparable between operations and group sizes."
            )
            parts.append(Picture("busbw", caption))
    traffic = dict_of(doc.get("traffic"))
    if any(any(row) for row in grid_of(traffic.get("wire_bytes"))):
        who = "blocks of neighbouring ranks" if traffic.get("grouped") else "ranks"
        caption = (
            f"Bytes on the wire in one step, between {who}: rows send, columns receive, a stronger colour is more."
        )
        parts.append(Picture("traffic", caption, half=True))
    if any(amount(b.get("calls")) > 0 for row in rows_of(doc.get("sizes")) for b in rows_of(row.get("bins"))):
        caption = "Number of calls of a rank in one step, by size: many small calls cost latency."
        parts.append(Picture("sizes", caption, half=True))
    if not parts:
        alone = "No collective was recorded: either the run has a single rank, or no rank finished a step."
        why = f"Times of individual collectives need {WINDOW}." if _counted(doc) else alone
        return missing("collectives", "Collectives", why)
    if not rows:
        parts.insert(0, Note(f"Times per collective need {WINDOW}.", "missing"))
    return Section("collectives", "Collectives", _collective_lead(rows), parts)


def _counted(doc: dict[str, Any]) -> bool:
    """Return whether any rank counted a call, which needs no window."""
    rows = rows_of(doc.get("predicted"))
    return any(", calls of all ranks" in str(row.get("what")) and amount(row.get("measured")) > 0 for row in rows)


def _name(row: dict[str, Any]) -> str:
    return f"{short(row.get('axis'), 40)} {short(row.get('op'), 40)}"


def _collective_lead(rows: list[dict[str, Any]]) -> str:
    worst = max(rows, key=exposed_s, default={})
    if exposed_s(worst) <= 0:
        return ""
    wait = amount(worst.get("wait_s"))
    waiting = f", {units.seconds(wait)} of it waiting for the last rank" if wait > 0 else ""
    calls = f"{units.plain(worst.get('calls'))} call{'' if number(worst.get('calls')) == 1 else 's'}"
    return (
        f"Most exposed: {_name(worst)} of {units.size(worst.get('payload_bytes'))}, {calls} per step, which "
        f"{'block' if calls.endswith('s') else 'blocks'} ranks for {units.seconds(exposed_s(worst))}{waiting}."
    )


def exposed_s(row: dict[str, Any]) -> float:
    """Return the seconds of a step for which these calls block a rank: transfer and waiting."""
    return amount(row.get("exposed_s")) + amount(row.get("wait_s"))


def _collective_table(rows: list[dict[str, Any]], step: float, most: int = 80) -> Table:
    ordered = sorted(rows, key=lambda row: -exposed_s(row))
    longest = max(exposed_s(row) for row in rows) or 1.0
    cells = []
    for row in ordered[:most]:
        key = f"transfer.{row.get('axis')}"
        total = exposed_s(row)
        cells.append(
            [
                Cell(_name(row) + (" *" if row.get("emulated") else ""), key=key),
                figure(units.size(row.get("payload_bytes")), row.get("payload_bytes")),
                figure(units.plain(row.get("ranks")), row.get("ranks")),
                figure(units.plain(row.get("calls")), row.get("calls")),
                figure(units.size(row.get("bytes_per_step")), row.get("bytes_per_step")),
                figure(units.seconds(row.get("time_s_p50")), row.get("time_s_p50")),
                figure(units.seconds(row.get("time_s_p95")), row.get("time_s_p95")),
                figure(units.rate(row.get("algbw_bytes_per_s")), row.get("algbw_bytes_per_s")),
                figure(units.rate(row.get("busbw_bytes_per_s")), row.get("busbw_bytes_per_s")),
                figure(units.seconds(row.get("exposed_s")), row.get("exposed_s")),
                figure(units.seconds(row.get("wait_s")), row.get("wait_s")),
                figure(
                    units.percent(total / step) if step else units.seconds(total), total, bar=total / longest, key=key
                ),
            ]
        )
    heads = columns(
        "=axis, operation", "payload|of one call: the full tensor", "ranks|in one group", "calls|per step",
        "bytes|payload per step", "p50|last arrival to last end", "p95", "algbw|payload over time",
        "busbw|as nccl-tests defines it", "transfer|exposed: a rank is blocked from the last arrival to its own end",
        "waiting|exposed: a rank is blocked until the last rank arrives",
        "exposed|transfer and waiting" + (", share of the step" if step else ", per step"),
    )  # fmt: skip
    notes = [f"The {most} most exposed of {len(rows)} kinds."] if len(rows) > most else []
    if any(row.get("emulated") for row in rows):
        notes.append("* The backend does not have this operation; it is emulated with another one.")
    caption = "Collectives by axis, operation and size, most exposed first; per step, mean over the ranks of the axis"
    return Table(caption, heads, cells, " ".join(notes))


def overlap(doc: dict[str, Any]) -> Section:
    """Return the section on communication that runs under compute."""
    part = dict_of(doc.get("overlap"))
    axes, buckets = rows_of(part.get("axes")), rows_of(part.get("buckets"))
    parts: list[Part] = []
    if any(max(amount(row.get("busy_s")), amount(row.get("exposed_s"))) > 0 for row in axes + buckets):
        caption = (
            "Each bar is the time in which an axis (below: a bucket of gradients or parameters) communicates in one "
            "step. Only the full colour costs time; the faint part happens while the rank computes."
        )
        parts.append(Picture("overlap", caption))
    if buckets:
        rows = [
            [
                text(bucket_name(row)),
                figure(units.size(row.get("bytes")), row.get("bytes")),
                figure(units.seconds(row.get("busy_s")), row.get("busy_s")),
                figure(units.seconds(row.get("exposed_s")), row.get("exposed_s")),
                text(row.get("under")),
            ]
            for row in buckets[:64]
        ]
        heads = columns("=bucket", "bytes", "communicating", "exposed", "=under|computing at the same time")
        parts.append(
            Table("Buckets: reductions of gradients, gathers of sharded parameters", heads, rows, folded=len(rows) > 8)
        )
    timeline = dict_of(doc.get("timeline"))
    if any(list_of(lane.get("spans")) for r in rows_of(timeline.get("ranks")) for lane in rows_of(r.get("lanes"))):
        shown = len(rows_of(timeline.get("ranks")))
        which = f" The first 8 of {shown} ranks." if shown > 8 else ""
        caption = (
            f"Step {short(timeline.get('step'), 12)}: the thick lane of a rank shows computing, or the axis that "
            "blocks the rank (stripes: until a later rank arrives). Below it is one lane per axis; faint parts happen "
            f"under compute.{which}"
        )
        parts.append(Picture("timeline", caption))
    free = rows_of(doc.get("free"))
    if any(number(row.get("step_s")) for row in free):
        error = number(doc.get("replay_error"))
        trust = f" The unchanged replay is {units.percent(error)} off." if error is not None else ""
        caption = f"The step replayed with one axis' communication taking no time: the possible gain.{trust}"
        parts.append(Picture("free", caption))
    if not parts:
        return missing("overlap", "Overlap", f"Not known: overlap is recorded only with {WINDOW}.")
    return Section("overlap", "Overlap", _overlap_lead(axes, free), parts)


def bucket_name(row: dict[str, Any]) -> str:
    """Return a name such as `reduce bucket 1`, with the stage, and the calls in a step if not one."""
    stage = f"stage {short(row.get('stage'), 6)}, " if row.get("stage") is not None else ""
    often = f" x {short(row.get('calls'), 6)}" if row.get("calls") not in (None, 1) else ""
    return f"{stage}{short(row.get('op') or 'reduce', 8)} bucket {short(row.get('bucket'), 6)}{often}"


def _overlap_lead(axes: list[dict[str, Any]], free: list[dict[str, Any]]) -> str:
    hidden = [
        f"{short(row.get('axis'), 20)} {units.percent(row.get('overlapped'))}"
        for row in axes
        if number(row.get("overlapped")) is not None
    ]
    first = f"Communication that overlaps with compute: {listing(hidden)}." if hidden else ""
    best = max(free, key=lambda row: amount(row.get("saving")), default={})
    gain = amount(best.get("saving"))
    second = (
        f"If {short(best.get('axis'), 20)} communication were free, a step would be {units.percent(gain)} shorter."
        if gain > 0
        else ""
    )
    return sentence(first, second)


def stragglers(doc: dict[str, Any]) -> Section:
    """Return the section on which ranks waited for which."""
    part = dict_of(doc.get("stragglers"))
    culprits, slow = rows_of(part.get("culprits")), rows_of(part.get("slow_compute"))
    parts: list[Part] = []
    if culprits:
        parts.append(_culprit_table(culprits))
    heat = grid_of(dict_of(part.get("heat")).get("compute_s"))
    if slow:
        names = [f"rank {short(r.get('rank'), 8)} ({units.plain(r.get('ratio'))} times the median)" for r in slow]
        parts.append(Note(f"Slow at computing: {listing(names)}.", "warn"))
    elif any(any(row) for row in heat):
        parts.append(Note("No rank is clearly slower at computing than the others."))
    if any(any(row) for row in grid_of(part.get("matrix_s"))):
        caption = (
            "Waiting time in one step: the rank of a row came last, the rank of a column waited for it. A full row is "
            "a straggler."
        )
        parts.append(Picture("culprits", caption, half=True))
    if any(any(row) for row in heat):
        caption = (
            "Computing time of each rank in each profiled step; a stronger colour is slower. A bright row is a slow "
            "rank, a bright column a slow step."
        )
        parts.append(Picture("heat", caption, half=True))
    if not parts:
        why = "No rank waited for another" if part else f"Not known: arrivals are recorded only with {WINDOW}"
        return missing("stragglers", "Stragglers", f"{why}.")
    return Section("stragglers", "Stragglers", _straggler_lead(culprits), parts)


def _straggler_lead(culprits: list[dict[str, Any]]) -> str:
    worst = max(culprits, key=lambda row: amount(row.get("caused_s")), default={})
    if amount(worst.get("caused_s")) <= 0:
        return "No rank stands out as the one that others wait for."
    share = number(worst.get("last_share"))
    often = f"; it comes last for {units.percent(share)} of all waiting" if share is not None and share >= 0.01 else ""
    kind = f" ({worst['kind']})" if worst.get("kind") else ""
    who, caused = short(worst.get("rank"), 8), units.seconds(worst.get("caused_s"))
    return f"Rank {who} makes other ranks wait {caused} per step in total{often}{kind}."


def _culprit_table(culprits: list[dict[str, Any]]) -> Table:
    longest = max(amount(row.get("caused_s")) for row in culprits) or 1.0
    rows = []
    for row in sorted(culprits, key=lambda row: -amount(row.get("caused_s")))[:24]:
        axes = sorted(dict_of(row.get("axes")).items(), key=lambda item: -amount(item[1]))
        caused = amount(row.get("caused_s"))
        rows.append(
            [
                figure(f"rank {short(row.get('rank'), 8)}", row.get("rank")),
                figure(units.seconds(caused), caused, bar=caused / longest, key="wait.tp"),
                figure(units.percent(row.get("last_share")), row.get("last_share")),
                text(row.get("kind"), "bad" if row.get("kind") == "persistent" else ""),
                text(", ".join(f"{short(axis, 12)} {units.seconds(value)}" for axis, value in axes)),
            ]
        )
    heads = columns("=came last", "made others wait|per step, all ranks together", "came last for|share of all waiting",
                    "=kind|persistent: the same rank step after step", "=by axis")  # fmt: skip
    return Table("Ranks that others wait for", heads, rows)


def pipeline(doc: dict[str, Any]) -> Section | None:
    """Return the section on the bubble and its parts; without a pipeline it holds only a note."""
    part = dict_of(doc.get("pipeline"))
    if not part:
        stages = number(dict_of(dict_of(doc.get("identity")).get("layout")).get("pp"))
        if stages == 1:
            return missing("pipeline", "Pipeline", "This layout has one stage, so there is no pipeline and no bubble.")
        return missing("pipeline", "Pipeline", f"Not known: the chart of the stages needs {WINDOW}.")
    bubble = dict_of(part.get("bubble"))
    parts: list[Part] = []
    if any(list_of(stage) for key in ("measured", "ideal") for stage in list_of(part.get(key))):
        caption = (
            "One row per stage; boxes show the number of their micro-batch where there is room. Top: as measured; "
            "bottom: the same actions in the ideal case, in the same colours and on the same axis. Gaps are bubble."
        )
        parts.append(Picture("pipeline", caption))
    if number(bubble.get("measured")) is not None:
        caption = (
            "The measured bubble by cause: structural comes from the schedule, imbalance from unequal stages, transfer "
            "from messages in flight. Below it: the bubble simulated from these costs and the planned one."
        )
        parts.append(Picture("bubble", caption))
    if table := rows_of(part.get("stages")):
        parts.append(_stage_table(table))
    if part.get("advice"):
        parts.append(Note(str(part["advice"]), "good"))
    if not parts:
        return missing("pipeline", "Pipeline", f"Not known: the chart of the stages needs {WINDOW}.")
    return Section("pipeline", "Pipeline", _pipeline_lead(part, bubble), parts)


def _pipeline_lead(part: dict[str, Any], bubble: dict[str, Any]) -> str:
    schedule = f"Schedule {short(part.get('schedule'), 20)}, {units.plain(part.get('micro_batches'))} micro-batch"
    schedule += "" if number(part.get("micro_batches")) == 1 else "es"
    if number(bubble.get("measured")) is None:
        return f"{schedule}."
    causes = (("structural", "from the schedule"), ("imbalance", "from imbalance"), ("transfer", "from transfer"))
    pieces = [f"{units.percent(bubble.get(key))} {word}" for key, word in causes if number(bubble.get(key)) is not None]
    split = f": {listing(pieces)}" if pieces else ""
    simulated = number(bubble.get("simulated"))
    beside = f" The simulated bubble is {units.percent(simulated)}." if simulated is not None else ""
    idle = units.percent(bubble["measured"])
    return f"{schedule}; a stage is idle for {idle} of the pipelined part of a step{split}.{beside}"


def _stage_table(stages: list[dict[str, Any]]) -> Table:
    rows = []
    for row in stages[:64]:
        cells = [figure(f"stage {short(row.get('stage'), 8)}", row.get("stage"))]
        for key in ("forward_s", "backward_s", "weight_s"):
            cells.append(figure(units.seconds(row.get(key)), row.get(key)))
        busy = number(row.get("busy"))
        cells.append(figure(units.percent(busy), busy, bar=min(max(busy or 0.0, 0.0), 1.0), key="forward"))
        rows.append(cells)
    if all(row[3].text == units.NONE for row in rows):
        rows = [row[:3] + row[4:] for row in rows]
        return Table(
            "Stages",
            columns(
                "=stage",
                "one forward",
                "one backward",
                "busy|share of the time from the first action of any stage to the last",
            ),
            rows,
        )
    heads = columns(
        "=stage",
        "one forward",
        "one backward",
        "one weight gradient",
        "busy|share of the time from the first action of any stage to the last",
    )
    return Table("Stages", heads, rows)
