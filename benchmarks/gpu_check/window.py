"""Record a few steps as in a run's profiling window, and find the longest kernels with torch.profiler."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check.cases import config_of, tiny
from benchmarks.gpu_check.section import Context
from benchmarks.gpu_check.speed import GPT2_124M, fill, random_samples, train
from dist_gpt.comm.mesh import FakeBackends
from dist_gpt.comm.rendezvous import rank_env
from dist_gpt.config.load import dump
from dist_gpt.config.schema import Config, ProfileConfig
from dist_gpt.plan.api import plan_document
from dist_gpt.profile.recorder import Recorder
from dist_gpt.replica import Rank, Samples
from dist_gpt.report.analysis.analyze import analyze
from dist_gpt.report.read.load import load

FIRST, LAST, STEPS = 3, 5, 6
TOP = 25


def window_config(small: bool) -> Config:
    """Return the configuration to train, with its profiling window."""
    train = {"global_batch": 16, "micro_batch": 8, "dtype": "bf16"}
    config = tiny("gpt2", "bf16") if small else config_of("gpt2", GPT2_124M, train)
    profiled = ProfileConfig(steps=[FIRST, LAST], torch=True)
    return config.model_copy(update={"profile": profiled, "train": config.train.model_copy(update={"steps": STEPS})})


def run(context: Context) -> None:
    """Train under the recorder, then under torch.profiler."""
    config = window_config(context.small)
    replica = Rank(config, 0, FakeBackends(), context.device.torch_device)
    try:
        fill(replica)
        batch = random_samples(config)
        context.attempt("recorder", recorded, context, config, replica, batch)
        context.attempt("kernels", kernels, context, replica, batch)
    finally:
        replica.close()


def recorded(context: Context, config: Config, replica: Rank, batch: Samples) -> None:
    """Report the window's event rows by kind, and the seconds of a step by kind of work as in a report.

    The folder OUT/window becomes a run directory that `dist-gpt report` can read.
    """
    folder = context.out / "window"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.rank0.*"):
        old.unlink()
    (folder / "config.yaml").write_text(dump(config))
    (folder / "plan.json").write_text(json.dumps(plan_document(config)))
    recorder = Recorder(config, replica, rank_env(60.0, {}), folder)
    try:
        for number in range(1, STEPS + 1):
            with recorder.step(number):
                train(replica, number, batch)
        recorder.finish(replica.mesh.ledger.differences)
    finally:
        recorder.close()
    rows = [json.loads(line) for line in (folder / "events.rank0.jsonl").read_text().splitlines()]
    context.put("rows", dict(Counter(_kind(row) for row in rows)))
    context.put("memory", next((row["memory"] for row in rows if isinstance(row, dict) and "memory" in row), None))
    context.check(any(_kind(row) == "list" for row in rows), "the window holds no spans")
    trace = folder / "torch.rank0.json.gz"
    context.check(trace.is_file() and trace.stat().st_size > 0, "torch.profiler's trace was not written")
    report = analyze(load(folder))
    (folder / "report.json").write_text(json.dumps(report))
    context.put("budget_s", report["budget_s"])
    context.put("roofline", report["roofline"])
    context.check(sum(report["budget_s"].values()) > 0, "the report has no times of the window's steps")


def _kind(row: Any) -> str:
    return "list" if isinstance(row, list) else next(iter(row), "empty")


def kernels(context: Context, replica: Rank, batch: Samples) -> None:
    """Report the number and time of kernels per step, and the kernels that took longest in two steps."""
    cuda = context.device_kind == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    train(replica, STEPS, batch)
    with profile(activities=activities) as profiler:
        for number in range(2):
            train(replica, STEPS + 1 + number, batch)
        context.device.synchronize()
    rows = top_kernels(profiler.key_averages(), cuda)
    (context.out / "kernels.json").write_text(json.dumps(rows, indent=1))
    context.put("kernel_kinds", len(rows))
    context.put("kernel_calls_per_step", sum(row["calls"] for row in rows) / 2)
    context.put("kernel_ms_per_step", sum(row["us"] for row in rows) / 2e3)
    context.put("top", [{**row, "name": row["name"][:90]} for row in rows[:TOP]])


def top_kernels(averages: Any, cuda: bool) -> list[dict[str, Any]]:
    """Return {name, calls, us} of the device's kernels (without a GPU: of operators), the longest first."""
    rows = []
    for row in averages:
        on_device = getattr(row, "device_type", None) == torch.autograd.DeviceType.CUDA
        microseconds = getattr(row, "self_device_time_total", 0.0) if cuda else row.self_cpu_time_total
        if on_device == cuda and microseconds > 0:
            rows.append({"name": row.key, "calls": row.count, "us": microseconds})
    return sorted(rows, key=lambda row: -row["us"])
