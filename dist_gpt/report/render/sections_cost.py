"""Write the sections on cost and prediction: memory, predictions, roofline, critical path, kernels, accounting."""

from __future__ import annotations

from typing import Any

from dist_gpt.report import units
from dist_gpt.report.render import palette
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
    list_of,
    missing,
    rows_of,
    sentence,
    short,
    text,
)  # fmt: skip
from dist_gpt.report.units import amount, number

MOST_ROWS = 64


def memory(doc: dict[str, Any]) -> Section:
    """Return the section on memory: predicted parts beside the measured peak."""
    ranks = rows_of(doc.get("memory_bytes"))
    if not ranks:
        why = "Not known: the peak is measured in the first profiled step, or in the first step if none is profiled."
        return missing("memory", "Memory", why)
    parts: list[Part] = []
    if any(dict_of(row.get(kind)) for row in ranks for kind in ("predicted", "measured")):
        which = "for each of the 16 ranks with the highest peaks" if len(ranks) > 16 else "per rank"
        caption = f"Two bars {which}, split by part: the faint upper one is predicted, the lower one measured."
        parts.append(Picture("memory", caption))
    rows = []
    for row in sorted(ranks, key=lambda row: -_peak(row, "measured") or -_peak(row, "predicted"))[:MOST_ROWS]:
        predicted, measured = _peak(row, "predicted"), _peak(row, "measured")
        error = measured / predicted - 1 if predicted > 0 and measured > 0 else None
        rows.append(
            [
                figure(f"rank {short(row.get('rank'), 8)}", row.get("rank")),
                figure(units.size(predicted or None), predicted),
                figure(units.size(measured or None), measured),
                figure(_signed(error), error),
                figure(units.size(row.get("allocated_peak")), row.get("allocated_peak")),
                figure(units.size(row.get("rss")), row.get("rss")),
                text(row.get("source"), "muted"),
            ]
        )
    heads = columns("=rank", "predicted peak", "measured peak", "difference", "allocator's peak|of the whole process",
                    "resident|RSS of the process, libraries included", "=measured by")  # fmt: skip
    note = f"The {MOST_ROWS} highest of {units.plain(len(ranks))} ranks." if len(ranks) > MOST_ROWS else ""
    parts.append(Table("Peak of every rank, highest first", heads, rows, note, folded=len(rows) > 16))
    return Section("memory", "Memory", _memory_lead(ranks), parts)


def _peak(row: dict[str, Any], kind: str) -> float:
    parts = dict_of(row.get(kind))
    peak = amount(parts.get("peak")) or sum(amount(parts.get(name)) for name in palette.MEMORY)
    return peak or (amount(row.get("allocated_peak")) if kind == "measured" else 0.0)


def _memory_lead(ranks: list[dict[str, Any]]) -> str:
    worst = max(ranks, key=lambda row: (_peak(row, "measured"), _peak(row, "predicted")))
    predicted, measured = _peak(worst, "predicted"), _peak(worst, "measured")
    if measured <= 0:
        most = units.size(max(_peak(r, "predicted") for r in ranks))
        return f"Not measured: this needs {WINDOW}. The plan predicts at most {most} per rank."
    beside = f"; the prediction was {units.size(predicted)}" if predicted > 0 else ""
    where = f"on rank {short(worst.get('rank'), 8)}"
    lead = f"The highest peak of the counted memory is {units.size(measured)} {where}{beside}."
    if (whole := amount(worst.get("allocated_peak"))) > measured:
        lead += f" The allocator's own peak there is {units.size(whole)}: it includes temporaries inside a block."
    return lead


def _signed(error: float | None) -> str:
    return ("+" if error is not None and error > 0 else "") + units.percent(error)


def predicted(doc: dict[str, Any]) -> Section:
    """Return the section that compares the plan with what was measured."""
    rows = rows_of(doc.get("predicted"))
    if not rows:
        why = "Nothing to compare: no measured value has a prediction in plan.json."
        return missing("predicted", "Predicted vs. measured", why)
    exact = [row for row in rows if row.get("must_be_equal")]
    known = [
        row for row in exact if number(row.get("predicted")) is not None and number(row.get("measured")) is not None
    ]
    wrong = sum(row["predicted"] != row["measured"] for row in known)
    lead = ""
    if wrong:
        lead = f"{units.count_of(wrong, 'value')} that must be equal {'differs' if wrong == 1 else 'differ'}."
    elif known:
        lead = f"All values that must be equal are equal ({len(known)})."
    parts: list[Part] = []
    estimates = sorted((row for row in rows if row not in exact), key=lambda row: -abs(amount(row.get("error"))))
    parts += _tables(estimates[:12], "Estimates, largest error first", folded=False)
    parts += _tables(estimates[12:], "Other estimates", folded=True)
    parts += _tables(exact, "Must be equal", folded=len(exact) > 12 and not wrong)
    return Section("predicted", "Predicted vs. measured", lead, parts)


def _tables(rows: list[dict[str, Any]], caption: str, folded: bool, most: int = 200) -> list[Table]:
    """Return one table, or none without rows; if it is folded or of exact values, rows that differ come first."""
    heads = columns("=what", "predicted", "measured", "error", "=check")
    if folded or caption.startswith("Must"):
        rows = sorted(rows, key=lambda row: row.get("predicted") == row.get("measured"))
    note = f"{most} of {units.plain(len(rows))} rows." if len(rows) > most else ""
    return [Table(caption, heads, [_beside(row) for row in rows[:most]], note, folded)] if rows else []


def _beside(row: dict[str, Any]) -> list[Cell]:
    error = number(row.get("error"))
    known = number(row.get("predicted")) is not None and number(row.get("measured")) is not None
    if not known:
        verdict = Cell("no prediction" if number(row.get("predicted")) is None else "not measured", tone="muted")
    elif row.get("must_be_equal"):
        equal = row["predicted"] == row["measured"]
        verdict = Cell("equal" if equal else "differs", tone="good" if equal else "bad")
    else:
        verdict = Cell("estimate", tone="muted")
    return [
        text(row.get("what")),
        figure(_precise(row.get("predicted"), row), row.get("predicted")),
        figure(_precise(row.get("measured"), row), row.get("measured")),
        figure(units.percent(error), None if error is None else abs(error)),
        verdict,
    ]


def _precise(value: Any, row: dict[str, Any]) -> str:
    """Return a value rounded, but in full where two different values would read alike and must be equal."""
    pair = [row.get("predicted"), row.get("measured")]
    shown = [units.with_unit(x, row.get("unit")) for x in pair]
    if row.get("must_be_equal") and pair[0] != pair[1] and shown[0] == shown[1] and isinstance(value, int):
        return f"{value:,}"
    return units.with_unit(value, row.get("unit"))


def roofline(doc: dict[str, Any]) -> Section:
    """Return the section on matmuls and attention against the ceiling measured on the device."""
    part = dict_of(doc.get("roofline"))
    kernels, ceiling = rows_of(part.get("kernels")), dict_of(part.get("ceiling"))
    if not kernels:
        why = "Not known: matmuls and attention are measured alone, in the shapes of this run, with a profiling window."
        return missing("roofline", "Roofline", why)
    rows = []
    for row in sorted(kernels, key=lambda row: -amount(row.get("seconds")))[:MOST_ROWS]:
        share = number(row.get("share_of_ceiling"))
        rows.append(
            [
                text(row.get("name")),
                text(" × ".join(short(n, 12) for n in list_of(row.get("shape")))),
                figure(units.plain(row.get("batch")), row.get("batch")),
                figure(units.seconds(row.get("seconds")), row.get("seconds")),
                figure(units.flops(row.get("flops_per_s")), row.get("flops_per_s")),
                figure(units.percent(share), share, bar=min(max(share or 0.0, 0.0), 1.0), key="backward"),
            ]
        )
    parts: list[Part] = []
    if any(min(amount(row.get(key)) for key in ("flops", "bytes", "flops_per_s")) > 0 for row in kernels):
        caption = (
            "Each mark is one shape, measured alone: the nearer to the line, the closer to the limit of this device. "
            "The limit is memory left of the knee, and arithmetic right of it."
        )
        parts.append(Picture("roofline", caption))
    heads = columns("=kernel", "=m × k × n", "batch", "time", "speed", "of the ceiling")
    parts.append(Table("Shapes of this run, measured alone", heads, rows))
    top = number(ceiling.get("flops_per_s"))
    lead = ""
    if top is not None:
        memory = f" and {units.rate(ceiling.get('bytes_per_s'))}" if number(ceiling.get("bytes_per_s")) else ""
        source = f" ({ceiling['source']})" if ceiling.get("source") else ""
        kind = f" in {short(ceiling['dtype'], 12)}" if ceiling.get("dtype") else ""
        lead = f"Ceiling{kind}: {units.flops(top)}{memory}{source}."
    return Section("roofline", "Roofline", lead, parts)


def critical_path(doc: dict[str, Any]) -> Section:
    """Return the section on the critical path: the work and messages that decided when the step ended."""
    part = dict_of(doc.get("critical_path"))
    steps = sorted(rows_of(part.get("parts")), key=lambda row: -amount(row.get("s")))
    steps = [row for row in steps if amount(row.get("s")) > 0]
    if not steps:
        why = "Not known: tracing it backwards needs a profiled step of all ranks and aligned clocks."
        return missing("critical-path", "Critical path", why)
    total = amount(part.get("step_s")) or sum(amount(row.get("s")) for row in steps)
    rows = []
    for row in steps[:16]:
        what, share = str(row.get("what", "")), number(row.get("share"))
        share = amount(row.get("s")) / total if share is None else share
        rows.append(
            [
                figure(f"rank {short(row.get('rank'), 8)}", row.get("rank")),
                Cell(palette.label(what), key=what),
                figure(units.seconds(row.get("s")), row.get("s")),
                figure(units.percent(share), share, bar=min(max(share, 0.0), 1.0), key=what),
            ]
        )
    note = f"The 16 longest of {len(steps)}." if len(steps) > 16 else ""
    caption = (
        "The chain of work and messages that decides when the step ends, by the rank it runs through. Only these parts "
        "can make the step shorter."
    )
    first = steps[0]
    lead = (
        f"Rank {short(first.get('rank'), 8)} dominates the critical path: {palette.label(str(first.get('what')))} "
        f"takes {units.seconds(first.get('s'))} of {units.seconds(total)}."
    )
    table = Table("Longest parts of the critical path", columns("=rank", "=what", "time", "share"), rows, note)
    return Section("critical-path", "Critical path", lead, [Picture("critical", caption), table])


def torch_kernels(doc: dict[str, Any]) -> Section:
    """Return the section on the top operators of torch.profiler."""
    kernels = rows_of(doc.get("torch_kernels"))
    if not kernels:
        why = "Not recorded: `--set profile.torch=true` runs torch.profiler on chosen ranks in the profiling window."
        return missing("torch-kernels", "Torch kernels", why)
    rows = [
        [
            figure(f"rank {short(row.get('rank'), 8)}", row.get("rank")),
            Cell(short(row.get("action"), 40), key=str(row.get("action", ""))),
            text(short(row.get("name"), 120)),
            figure(units.seconds(row.get("s")), row.get("s")),
            figure(units.plain(row.get("calls")), row.get("calls")),
        ]
        for row in sorted(kernels, key=lambda row: -amount(row.get("s")))[:MOST_ROWS]
    ]
    heads = columns("=rank", "=action", "#kernel", "time", "calls")
    note = f"The {MOST_ROWS} longest of {len(kernels)}." if len(kernels) > MOST_ROWS else ""
    caption = "Top kernels by action, from torch.profiler"
    return Section("torch-kernels", "Torch kernels", "", [Table(caption, heads, rows, note)])


def device_samples(doc: dict[str, Any]) -> Section:
    """Return the section on clocks, power and temperature of the devices."""
    samples = rows_of(doc.get("device_samples"))
    if not samples:
        why = "None: clocks, power and temperature are sampled on GPUs only."
        return missing("device-samples", "Device samples", why)
    kinds = (("sm_clock_hz", "SM clock", "Hz"), ("power_w", "power", "W"), ("temperature_c", "temperature", "°C"))
    by_rank: dict[str, list[dict[str, Any]]] = {}
    for row in samples:
        by_rank.setdefault(short(row.get("rank"), 8), []).append(row)
    rows = []
    for rank, own in list(by_rank.items())[:MOST_ROWS]:
        cells = [figure(f"rank {rank}", own[0].get("rank")), figure(units.plain(len(own)), len(own))]
        for key, _, unit in kinds:
            values = [x for x in (number(row.get(key)) for row in own) if x is not None]
            low, high = (min(values), max(values)) if values else (None, None)
            shown = f"{units.scaled(low, unit)} to {units.scaled(high, unit)}" if values else units.NONE
            cells.append(figure(shown, low))
        rows.append(cells)
    parts: list[Part] = []
    measured = any(number(row.get(key)) is not None for row in samples for key, _, _ in kinds)
    if measured and any(sample_time(row) is not None for row in samples):
        caption = "Each line is one device over the run: a falling clock at steady power means throttling."
        parts.append(Picture("samples", caption))
    note = f"The first {MOST_ROWS} of {units.plain(len(by_rank))} ranks." if len(by_rank) > MOST_ROWS else ""
    heads = columns("=rank", "samples", *(name for _, name, _ in kinds))
    parts.append(Table("Lowest to highest value of each device", heads, rows, note, folded=len(rows) > 16))
    return Section("device-samples", "Device samples", "", parts)


def sample_time(row: dict[str, Any]) -> float | None:
    """Return the seconds since the run began on the sample's rank, or None."""
    ns = number(row.get("at_ns"))
    return number(row.get("at_s")) if ns is None else ns / 1e9


def accounting(doc: dict[str, Any]) -> Section:
    """Return the section on whether the issued calls match the plan."""
    part = dict_of(doc.get("accounting"))
    if not part:
        why = "Not known: the event files end without the ledger's verdict, so the run may still be in progress."
        return missing("accounting", "Accounting", why)
    differences = rows_of(part.get("differences"))
    parts: list[Part] = []
    if differences:
        rows = [
            [
                figure(f"rank {short(row.get('rank'), 8)}", row.get("rank")),
                figure(units.plain(row.get("step")), row.get("step")),
                text(row.get("action")),
                Cell(short(row.get("axis"), 40), key=f"transfer.{row.get('axis')}"),
                text(row.get("op")),
                figure(units.size(row.get("payload_bytes")), row.get("payload_bytes")),
                figure(("+" if amount(row.get("calls")) > 0 else "") + units.plain(row.get("calls")), row.get("calls")),
            ]
            for row in differences[:MOST_ROWS]
        ]
        heads = columns("=rank", "step", "=inside", "=axis", "=operation", "payload", "calls|issued minus declared")
        note = f"The first {MOST_ROWS} of {len(differences)}." if len(differences) > MOST_ROWS else ""
        caption = "Calls issued but not declared (+), or declared but not issued (-)"
        parts.append(Table(caption, heads, rows, note))
    lines = [str(line) for line in list_of(part.get("lines"))]
    parts += [Note(line, "bad" if part.get("exact") is not True else "plain") for line in lines[:MOST_ROWS]]
    if part.get("exact") is True:
        exact = "Every issued call and byte is declared in the plan, and vice versa."
        parts.insert(0, Note(exact, "good"))
        return Section("accounting", "Accounting", "", parts)
    if not parts:
        unknown = "Not known: the run has not ended on all ranks, or the files of some ranks were not read."
        known = "The differences were not recorded."
        parts.append(Note(known if part.get("exact") is False else unknown, "missing"))
    lead = sentence("The issued calls differ from those that the plan declares." if part.get("exact") is False else "")
    return Section("accounting", "Accounting", lead, parts)
