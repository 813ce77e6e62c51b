"""The numbers on top of a report, and the way from an ideal step to the measured one."""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_gpt.events import TRAIN
from dist_gpt.plan.flops import flops_document
from dist_gpt.plan.peaks import published_peak
from dist_gpt.report.budget import COMPUTE, Budget
from dist_gpt.report.load import Run
from dist_gpt.skips import Skipped

SETTLING = 3
"""First steps that the headline leaves out where there are many more: the first one allocates, caches fill."""
FORMULA = (
    "MFU = model FLOPs of a step / (ranks x step time x peak); model FLOPs are those of the matmuls, forward once and "
    "backward twice, attention over all T x T scores, nothing recomputed (PaLM, arXiv:2204.02311, appendix B). HFU "
    "adds what is recomputed."
)


def step_times(run: Run) -> dict[int, float]:
    """Seconds of every training step: of the rank that took longest."""
    longest: dict[int, float] = {}
    for log in run.ranks.values():
        for fact in log.steps:
            if fact["phase"] == TRAIN:
                longest[fact["step"]] = max(longest.get(fact["step"], 0.0), fact["step_s"])
    return dict(sorted(longest.items()))


def settled(times: dict[int, float]) -> list[float]:
    """Without the first steps, where enough are left."""
    values = list(times.values())
    return values[SETTLING:] if len(values) > 3 * SETTLING else values


def peak_of(run: Run) -> dict[str, Any] | None:
    """{flops_per_s, source} of one rank: the published one of its device, else what was measured on it."""
    log = next(iter(run.ranks.values()))
    published = published_peak(log.header.get("device") or "")
    dtype = run.config.train.dtype
    if published is not None and dtype in published.flops_per_s:
        return {"flops_per_s": published.flops_per_s[dtype], "source": f"{published.name}, {dtype}: {published.source}"}
    ceiling = next((log.ceiling for log in run.ranks.values() if log.ceiling), None)
    if ceiling is None:
        return None
    speed, source = ceiling["flops_per_s"], "a large matmul measured on rank 0's device, all others idle"
    share = _share_of_cores(run)
    if share < 1:
        source += f"; times {share:.3g}, since the ranks of a host have that many cores each"
    return {"flops_per_s": speed * share, "source": source}


def _share_of_cores(run: Run) -> float:
    """Cores per rank and thread, at most 1: eight ranks on two cores have a quarter each. 1 on a GPU."""
    logs = list(run.ranks.values())
    if any((log.header.get("device") or "cpu") != "cpu" for log in logs):
        return 1.0
    here = logs[0].header
    together = sum(log.header.get("host") == here.get("host") for log in logs) * int(here.get("threads") or 1)
    cores = here.get("cores")
    return min(1.0, cores / together) if isinstance(cores, int) and cores > 0 else 1.0


def headline(run: Run, budget: Budget | None) -> dict[str, Any]:
    """The `headline` of a report."""
    times = step_times(run)
    p50, p95 = (float(np.percentile(settled(times), q)) for q in (50, 95)) if times else (None, None)
    world, config = run.layout.world, run.config
    tokens = config.train.global_batch * config.model.seq_len
    flops = flops_document(config)
    per_gpu = flops["model_flops_per_token"] * tokens / world / p50 if p50 else None
    hardware = flops["hardware_flops_per_token"] / flops["model_flops_per_token"]
    peak = peak_of(run)
    mfu = per_gpu / peak["flops_per_s"] if per_gpu and peak and peak["flops_per_s"] > 0 else None
    losses = [row["loss"] for row in run.metrics if isinstance(row.get("loss"), float)]
    skipped = Skipped.of(run.metrics)
    inside = set(budget.steps) if budget is not None else set()
    return {
        "step_s_p50": p50,
        "step_s_p95": p95,
        "tokens_per_s": tokens / p50 if p50 else None,
        "tokens_per_s_per_gpu": tokens / p50 / world if p50 else None,
        "tflops_per_gpu": per_gpu / 1e12 if per_gpu else None,
        "mfu": mfu,
        "hfu": mfu * hardware if mfu else None,
        "mfu_causal": mfu * flops["published"]["causal"] / flops["model_flops_per_token"] if mfu else None,
        **_goodput(run),
        "steps": skipped.steps,
        "steps_skipped": skipped.count,
        "skipped": skipped.text() or None,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "formula": FORMULA,
        "peak": peak,
        "step_s_samples": [seconds for step, seconds in times.items() if step in inside],
    }


def _goodput(run: Run) -> dict[str, Any]:
    """Share of the wall time, from the start of rank 0's process, in which steps were trained."""
    log = next(iter(run.ranks.values()))
    train = sum(fact["step_s"] for fact in log.steps if fact["phase"] == TRAIN)
    other = sum(fact["step_s"] for fact in log.steps if fact["phase"] != TRAIN)
    start = float(log.header.get("start_s") or 0.0)
    if log.end is None:
        return {"goodput": None, "wall_s": {"train": train, "eval": other, "start": start, "between": None}}
    wall = start + log.end["wall_s"]
    between = max(0.0, log.end["wall_s"] - train - other)
    return {
        "goodput": train / wall if wall > 0 else None,
        "wall_s": {"train": train, "eval": other, "start": start, "between": between},
    }


def waterfall(run: Run, parts: dict[str, float]) -> list[dict[str, Any]]:
    """From the least time the model's FLOPs take to the measured step: each row adds, the last one is the sum."""
    total = sum(parts.values())
    compute = {name: parts.get(name, 0.0) for name in COMPUTE}
    model = compute["forward"] + compute["backward"] + compute["weight"]
    ceiling = next((log.ceiling for log in run.ranks.values() if log.ceiling), None)
    rows = []
    if ceiling is not None and model and ceiling["flops_per_s"] > 0:
        tokens = run.config.train.global_batch * run.config.model.seq_len
        flops = flops_document(run.config)["model_flops_per_token"] * tokens / run.layout.world
        ideal = min(model, flops / ceiling["flops_per_s"])
        rows += [
            ("model FLOPs at the measured ceiling", ideal),
            ("slower matmuls, and all else in blocks", model - ideal),
        ]
    else:
        rows.append(("forward and backward", model))
    rows += [("recompute", compute["recompute"]), ("optimizer", compute["optimizer"])]
    rows += [(name, seconds) for name, seconds in parts.items() if name not in COMPUTE]
    found = [{"what": what, "s": seconds} for what, seconds in rows if seconds > 1e-4 * total]
    rest = total - sum(row["s"] for row in found)
    if rest > 0:
        found.append({"what": "all smaller parts", "s": rest})
    return [*found, {"what": "measured step", "s": total}]
