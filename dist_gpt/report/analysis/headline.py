"""Headline numbers of a report, and the waterfall from an ideal step to the measured one."""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_gpt.events import TRAIN
from dist_gpt.plan.flops import flops_document
from dist_gpt.plan.peaks import published_peak
from dist_gpt.report.analysis.time_breakdown import COMPUTE, Budget
from dist_gpt.report.read.load import Run
from dist_gpt.skips import Skipped

SETTLING = 3
"""First steps that the headline leaves out if there are many more: the first one allocates, and caches fill."""
FORMULA = (
    "MFU = model FLOPs of a step / (ranks x step time x peak). Model FLOPs are those of the matmuls, once in the "
    "forward and twice in the backward, with attention over all T x T scores and without recomputation (PaLM, "
    "arXiv:2204.02311, appendix B). HFU includes recomputation."
)


def step_times(run: Run) -> dict[int, float]:
    """Return {step: seconds} of every training step, as its slowest rank measured it."""
    longest: dict[int, float] = {}
    for log in run.ranks.values():
        for fact in log.steps:
            if fact["phase"] == TRAIN:
                longest[fact["step"]] = max(longest.get(fact["step"], 0.0), fact["step_s"])
    return dict(sorted(longest.items()))


def settled(times: dict[int, float]) -> list[float]:
    """Return the step times without the first SETTLING ones, if more than twice as many are left."""
    values = list(times.values())
    return values[SETTLING:] if len(values) > 3 * SETTLING else values


def peak_of(run: Run) -> dict[str, Any] | None:
    """Return {flops_per_s, source} of one rank: its device's published peak, else the measured one; None without."""
    log = next(iter(run.ranks.values()))
    published = published_peak(log.header.get("device") or "")
    dtype = run.config.train.dtype
    if published is not None and dtype in published.flops_per_s:
        return {"flops_per_s": published.flops_per_s[dtype], "source": f"{published.name}, {dtype}: {published.source}"}
    ceiling = next((log.ceiling for log in run.ranks.values() if log.ceiling), None)
    if ceiling is None:
        return None
    speed, source = ceiling["flops_per_s"], "a large matmul measured on rank 0's device with all other ranks idle"
    share = _share_of_cores(run)
    if share < 1:
        source += f"; times {share:.3g}, the cores per rank and thread of its host"
    return {"flops_per_s": speed * share, "source": source}


def _share_of_cores(run: Run) -> float:
    """Return the cores per rank and thread, at most 1 (eight ranks on two cores have a quarter each); 1 on a GPU."""
    logs = list(run.ranks.values())
    if any((log.header.get("device") or "cpu") != "cpu" for log in logs):
        return 1.0
    here = logs[0].header
    together = sum(log.header.get("host") == here.get("host") for log in logs) * int(here.get("threads") or 1)
    cores = here.get("cores")
    return min(1.0, cores / together) if isinstance(cores, int) and cores > 0 else 1.0


def headline(run: Run, budget: Budget | None) -> dict[str, Any]:
    """Return the `headline` section of a report."""
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
    """Return the share of wall time, from the start of rank 0's process, spent in training steps, and its parts."""
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
    """Return rows from the least time for the model's FLOPs to the measured step: each adds, the last is the sum."""
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
            ("slower matmuls, other work in blocks", model - ideal),
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
