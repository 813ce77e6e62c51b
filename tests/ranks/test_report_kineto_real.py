"""A trace that torch.profiler itself has written, read by the report: the format is what it takes it for."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dist_gpt.report.analysis.clocks import align
from dist_gpt.report.read.kineto import FIRST_LANE, read, read_file
from dist_gpt.report.read.load import load
from tests.unit.synthetic import small, write

STEPS, PRODUCTS = (3, 4), 5


def profiled(path: Path) -> list[list[int]]:
    """Two annotated steps of products; returns when each began: [step, ns of the monotonic clock]."""
    x = torch.randn(96, 96)
    weight = torch.randn(96, 96, requires_grad=True)
    anchors = []
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.tanh(x)  # outside of the steps
        for step in STEPS:
            with record_function(f"dist_gpt step {step}"):
                anchors.append([step, time.perf_counter_ns()])
                with record_function("forward 0F0 block 1"):
                    with record_function("data"):
                        torch.sin(x)
                    y = x
                    for _ in range(PRODUCTS):
                        y = y @ weight
                with record_function("backward 0B0 block 1"):
                    y.sum().backward()
                with record_function("update STEP"):
                    torch.exp(x)
    profiler.export_chrome_trace(str(path))
    return anchors


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    path = tmp_path_factory.mktemp("torch") / "torch.rank0.json.gz"
    return path, profiled(path)


def test_operators_are_found_under_their_actions(traced: tuple[Path, list[list[int]]]) -> None:
    trace = read_file(traced[0])
    assert trace.problems == []
    assert tuple(step for step, _, _ in trace.steps) == STEPS
    calls = {(row["action"], row["name"]): row["calls"] for row in trace.top()}
    assert calls["forward", "aten::mm"] == PRODUCTS
    assert calls["backward", "aten::mm"] >= PRODUCTS
    assert calls["data", "aten::sin"] == calls["optimizer", "aten::exp"] == 1
    assert "aten::tanh" not in {name for _, name in calls}
    assert all(row["s"] >= 0 for row in trace.top())


def test_self_times_of_a_step_are_less_than_the_step(traced: tuple[Path, list[list[int]]]) -> None:
    trace = read_file(traced[0])
    steps = sum(end - start for _, start, end in trace.steps) / len(trace.steps) / 1e6
    assert 0 < sum(row["s"] for row in trace.top()) <= steps


def test_its_clock_is_tied_to_the_runs(traced: tuple[Path, list[list[int]]]) -> None:
    """Every operator lies in its step as the monotonic clock saw it; the anchors are taken inside of the annotation."""
    path, anchors = traced
    trace = read_file(path)
    to_run = trace.to_run(anchors)
    assert to_run is not None
    first, second = (at for _, at in anchors)
    starts = to_run(np.array([event.start for event in trace.events if event.name == "aten::mm"]))
    assert first <= starts.min() and starts.min() < second < starts.max()
    spread = [at - 1000 * start for (_, at), (_, start, _) in zip(anchors, trace.steps, strict=True)]
    assert abs(spread[0] - spread[1]) < 20_000_000  # one offset but for what lies between annotation and anchor


def test_a_run_directory_with_such_a_trace_is_read(tmp_path: Path, traced: tuple[Path, list[list[int]]]) -> None:
    path, anchors = traced
    write(tmp_path / "run", small("parallel.tp=2"))
    (tmp_path / "run" / path.name).write_bytes(path.read_bytes())
    run = load(tmp_path / "run")
    base = run.ranks[0].header["base_ns"]
    run.ranks[0].torch_traces = [{"file": path.name, "anchors": [[step, at - base] for step, at in anchors]}]
    found = read(run, align(run))
    assert found.problems == []
    assert {row["rank"] for row in found.kernels} == {0}
    assert {event["tid"] for event in found.lanes} == {FIRST_LANE}
    assert {event["name"] for event in found.lanes} >= {"aten::mm", "aten::exp", "thread_name"}


def test_one_that_was_cut_off_is_told(tmp_path: Path, traced: tuple[Path, list[list[int]]]) -> None:
    text = gzip.decompress(traced[0].read_bytes())
    (tmp_path / "cut.json").write_bytes(text[: len(text) // 2])
    trace = read_file(tmp_path / "cut.json")
    assert "the file is truncated" in trace.problems[0]
    assert trace.events
