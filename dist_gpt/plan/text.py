"""Plan and FLOPs of a model as text tables; units of bytes are powers of ten (MB = 1e6)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any

from dist_gpt.config.schema import Config
from dist_gpt.layout import BASE_AXES, Layout
from dist_gpt.plan.timeline import timeline
from dist_gpt.schedule.draw import draw_text

DRAWN_RANKS, DRAWN_MICRO_BATCHES = 8, 16
_GRID_WIDTH = 84  # 110 columns with the rank in front and the idle share behind
_HOLDS = {
    "parameters": "of the stages held here, or this rank's shard",
    "gradients": "of the same, or this rank's shard",
    "optimizer": "masters and moments of the parameters updated here",
    "activations": "kept for the backward, at their maximum",
    "buffers": "messages, gathered parameters, gradients in transit",
    "peak": "the sum; temporaries inside a block are not counted",
    "host": "in host memory: state that the optimizer updates there",
}


def plan_text(doc: dict[str, Any], config: Config) -> str:
    """Return `plan_document` as text, at most 110 columns wide."""
    rank = doc["rank"]
    sections = [
        [f"{doc['name']}: plan for {_many(doc['layout']['world'], 'rank')}"],
        _layout_lines(doc),
        [f"Traffic of {_place(doc['layout'], rank)}, one training step", *_traffic(doc["comm"])],
        ["Traffic of all ranks together, one training step", *_traffic(doc["total"]["comm"])],
        [
            f"Memory of {_place(doc['layout'], doc['peak_rank'])}, which needs the most",
            *_memory(doc["memory_bytes"]),
            *doc["notes"],
        ],
        _schedule_lines(doc, config),
        ["Step time, tokens/s and MFU need the speeds of a cluster and are not part of this plan."],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def flops_text(doc: dict[str, Any]) -> str:
    """Return `flops_document` as text, at most 110 columns wide."""
    rows = [("matmul", "m", "k", "n", "products", "layers", "forward", "backward", "share")]
    for r in doc["matmuls"]:
        m, k, n = r["shape"]
        rows.append((
            r["name"], f"{m:,}", f"{k:,}", f"{n:,}", str(r["batch"]), str(r["count"]),
            si(r["forward_flops"]), si(r["backward_flops"]), f"{r['share']:.1%}",
        ))  # fmt: skip
    per_token = [
        ("model FLOPs", doc["model_flops_per_token"], "forward and backward, all T x T scores"),
        ("hardware FLOPs", doc["hardware_flops_per_token"], f"executed, with recompute {doc['recompute']}"),
        ("causal", doc["published"]["causal"], "model FLOPs with the masked half of the scores left out"),
        ("6N + 12LHT", doc["published"]["6n_12lht"], f"PaLM's convention, N = {doc['published']['n']:,}"),
    ]
    return "\n".join([
        f"{doc['name']}: {doc['parameters']:,} parameters; FLOPs for one sequence of {doc['seq_len']:,} tokens:",
        "each (m, k) @ (k, n), times the products in a layer, times the layers",
        "",
        *_table(rows),
        "",
        "Training FLOPs per token",
        *_table([(name, f"{value:,}", f"  {why}") for name, value, why in per_token], right=(1,)),
    ])  # fmt: skip


def size(count: float) -> str:
    """Format a number of bytes as `1.23 GB`, in powers of ten."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:.0f} B"


def si(count: float) -> str:
    """Format a number as `1.23 T`, with two decimals and an SI prefix, to be followed by a unit."""
    for unit, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:.0f} "


def _many(count: int, what: str, plural: str = "s") -> str:
    return f"{count:,} {what}{'' if count == 1 else plural}"


def _table(rows: Iterable[Sequence[str]], right: Iterable[int] | None = None) -> list[str]:
    """Return aligned columns, two blanks before each; right-aligned are those in `right`, else all but the first."""
    rows = list(rows)
    columns = len(rows[0])
    to_right = set(range(1, columns) if right is None else right)
    widths = [max(len(row[i]) for row in rows) for i in range(columns)]
    return [
        "".join("  " + (row[i].rjust(widths[i]) if i in to_right else row[i].ljust(widths[i])) for i in range(columns))
        .rstrip()
        for row in rows
    ]  # fmt: skip


def _place(layout: dict[str, Any], rank: int) -> str:
    mesh = Layout(*(layout[axis] for axis in BASE_AXES))
    return f"rank {rank} ({mesh.coords(rank)})"


def _layout_lines(doc: dict[str, Any]) -> list[str]:
    at, rank, total = doc["layout"], doc["rank"], doc["total"]
    tokens = at["global_batch"] * at["seq_len"]
    split = "sequence parallel" if at["sequence_parallel"] else "no sequence parallelism"
    mesh = " x ".join(f"{axis} {at[axis]}" for axis in BASE_AXES)
    job, own = si(total["model_flops"]), si(doc["model_flops"])
    again = doc["recompute_flops"]
    return _table(
        [
            ("layout", f"  {mesh}, {split}"),
            *_memory_settings(at),
            ("batch", f"  {at['global_batch']:,} sequences of {at['seq_len']:,} tokens = {tokens:,} tokens a step"),
            ("micro-batches", f"  {at['micro_batches']:,} of {_many(at['micro_batch'], 'sequence')} per data rank"),
            ("parameters", f"  {total['parameters']:,} in the model; rank {rank} stores {doc['parameters']:,}"),
            (
                "model FLOPs",
                f"  {job}FLOP a step in the job, {total['model_flops'] // tokens:,} per token; rank {rank}: {own}FLOP",
            ),
            *([("recomputed", f"  {si(again)}FLOP in addition on rank {rank}")] if again else []),
        ],
        right=(),
    )


def _memory_settings(at: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows of the settings that decide the memory; rarer ones appear only if set, in rows of their own."""
    rarer = [
        "by DeepSpeed" if at["engine"] == "deepspeed" else "",
        "inside nodes" if at["shard_group"] == "node" else "",
        "gathered for the step" if at["reshard"] == "step" else "",
        "state in host memory" if at["offload"] else "",
        f"loss scale {at['loss_scale']:.0f}" if at["loss_scale"] else "",
        *(f"{key.replace('_', ' ')} {at[key]}" for key in ("grad_dtype", "reduce_dtype", "state_dtype") if at[key]),
    ]
    common = f"sharding {at['sharding']}, {at['dtype']}, recompute {at['recompute']}"
    lines = [common, *wrap(", ".join(filter(None, rarer)), _GRID_WIDTH)]
    return [("" if i else "memory", f"  {line}") for i, line in enumerate(lines)]


def _traffic(comm: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    rows = [("axis", "collective", "calls", "payload", "wire")]
    for axis, ops in comm.items():
        for op, t in ops.items():
            rows.append((axis, op, f"{t['calls']:,}", size(t["payload_bytes"]), size(t["wire_bytes"])))
    return _table(rows, right=(2, 3, 4)) if len(rows) > 1 else ["  none"]


def _memory(memory: dict[str, int]) -> list[str]:
    rows = [
        (name, size(count), f"{count / max(1, memory['peak']):.1%}", f"  {_HOLDS[name]}")
        for name, count in memory.items()
        if name != "host" or count
    ]
    return _table(rows, right=(1, 2))


def _schedule_lines(doc: dict[str, Any], config: Config) -> list[str]:
    s, pp = doc["schedule"], doc["layout"]["pp"]
    lines = [
        f"Schedule {s['name']}: {_many(pp, 'pipeline rank')}, {_many(s['micro_batches'], 'micro-batch', 'es')}, "
        f"{s['simulated_bubble']:.1%} bubble (simulated, FLOPs as time)",
        *_stages(s, pp),
    ]
    if pp == 1:
        return lines
    if pp > DRAWN_RANKS or s["micro_batches"] > DRAWN_MICRO_BATCHES:
        limits = f"up to {DRAWN_RANKS} pipeline ranks and {DRAWN_MICRO_BATCHES} micro-batches"
        return [*lines, f"  The grid is drawn for {limits}; --json holds every rank's order."]
    grid = draw_text(timeline(config), _GRID_WIDTH).splitlines()
    legend = "F forward, B backward, with the micro-batch, or in lower case for odd ones; . idle"
    return [*lines, *(f"  {line}" for line in (*grid, legend))]


def _stages(schedule: dict[str, Any], pp: int) -> list[str]:
    """Return a table of the layers of each pipeline rank; neighbours with the same layers share a row."""
    held = [
        " + ".join(str(n) for chunk, n in enumerate(schedule["chunks"]) if schedule["placement"][chunk] == rank)
        for rank in range(pp)
    ]
    rows = []
    first = 0
    for rank in range(pp):
        if rank == pp - 1 or held[rank + 1] != held[rank]:
            ranks = f"pp {first}" if rank == first else f"pp {first} to {rank}"
            first = rank + 1
            layers = "layer" if held[rank] == "1" else "layers"
            rows.append((ranks, f"  {held[rank]} {layers}" + (" each" if " to " in ranks else "")))
    return _table(rows, right=())
