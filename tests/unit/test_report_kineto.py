"""torch.profiler's traces: what belongs to which action, on our time line; and files that cannot be trusted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gpt.report.analysis.clocks import Clocks, align
from dist_gpt.report.read import kineto
from dist_gpt.report.read.kineto import FIRST_LANE, TorchProfile, read, read_file
from dist_gpt.report.read.load import Run, load
from tests.unit.synthetic import small, write

EPOCH = 4_641_219_073_000.0
"""Microseconds on the trace's clock at which the hand-made traces begin."""
MAIN, AUTOGRAD = 100, 200


def event(cat: str, name: str, ts: float, dur: float, tid: Any = MAIN, **args: Any) -> dict[str, Any]:
    place = {"pid": 7, "tid": tid, "ts": EPOCH + ts, "dur": dur}
    return {"ph": "X", "cat": cat, "name": name, **place, "args": {"External id": 1, **args}}


def note(name: str, ts: float, dur: float) -> dict[str, Any]:
    return event("user_annotation", name, ts, dur)


STEPS = [
    note("dist_gpt step 3", 0, 1000),
    note("forward 0F0 block 1", 10, 400),
    note("data", 10, 90),
    note("backward 0B0 block 1", 500, 300),
    note("update STEP", 850, 100),
    note("dist_gpt step 4", 2000, 1000),
    note("forward 0F0 block 1", 2010, 400),
]
CPU = [
    event("cpu_op", "aten::linear", 100, 200),
    event("cpu_op", "aten::addmm", 120, 150),
    event("cpu_op", "aten::copy_", 130, 20),
    event("cpu_op", "aten::item", 20, 30),
    event("cpu_op", "aten::mm", 520, 100, tid=AUTOGRAD),  # autograd has a thread of its own on a GPU
    event("cpu_op", "aten::_fused_adamw_", 860, 80),
    event("cpu_op", "aten::isnan", 960, 10),  # in a step, in no entry
    event("cpu_op", "aten::warmup", 1500, 10),  # between steps
    event("cpu_op", "aten::addmm", 2100, 50),
]
GPU = [
    event("cuda_runtime", "cudaLaunchKernel", 130, 5, correlation=1),
    event("cuda_driver", "cuLaunchKernel", 530, 5, tid=AUTOGRAD, correlation=2),
    event("kernel", "sm90_gemm", 700, 250, tid=7, correlation=1),  # runs when backward is under way on the host
    event("kernel", "sm90_gemm", 960, 100, tid=7, correlation=2),
    event("gpu_memcpy", "Memcpy HtoD", 30, 10, tid=7, correlation=99),  # launched unseen
    event("gpu_user_annotation", "forward 0F0 block 1", 700, 250, tid=7),
]


def save(path: Path, events: list[Any], packed: bool = True, indent: int | None = None) -> Path:
    head = {"schemaVersion": 1, "deviceProperties": [], "traceName": str(path)}
    text = json.dumps({**head, "traceEvents": events}, indent=indent)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def top(path: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """(action, name) -> (microseconds, calls), both of the two steps together."""
    return {(r["action"], r["name"]): (round(2e6 * r["s"], 6), 2 * r["calls"]) for r in read_file(path).top()}


# --- what belongs to what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_operators_count_by_self_time_in_the_entry_under_way(tmp_path: Path, packed: bool, indent: int | None) -> None:
    """Per step: the window has two."""
    assert top(save(tmp_path / "t.json", STEPS + CPU, packed, indent)) == {
        ("forward", "aten::linear"): (50, 1),
        ("forward", "aten::addmm"): (130 + 50, 2),
        ("forward", "aten::copy_"): (20, 1),
        ("data", "aten::item"): (30, 1),
        ("backward", "aten::mm"): (100, 1),
        ("optimizer", "aten::_fused_adamw_"): (80, 1),
        ("other", "aten::isnan"): (10, 1),
    }


def test_kernels_count_where_they_were_launched(tmp_path: Path) -> None:
    """Not where the host is while they run; and where there are kernels, operators are not listed."""
    assert top(save(tmp_path / "t.json.gz", STEPS + CPU + GPU)) == {
        ("forward", "sm90_gemm"): (250, 1),
        ("backward", "sm90_gemm"): (100, 1),
        ("data", "Memcpy HtoD"): (10, 1),
    }


def test_the_longest_of_each_action_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kineto, "TOP", 2)
    rows = read_file(save(tmp_path / "t.json.gz", STEPS + CPU)).top()
    assert [row["name"] for row in rows if row["action"] == "forward"] == ["aten::addmm", "aten::linear"]
    assert [row["s"] for row in rows] == sorted((row["s"] for row in rows), reverse=True)


def test_annotations_of_other_threads_are_nobodys_entries(tmp_path: Path) -> None:
    """gloo's worker threads annotate their collectives; a thread of the user may say anything."""
    strange = [event("user_annotation", "backward 0B0 block 1", 100, 300, tid=5), note("gloo:all_reduce", 100, 300)]
    assert top(save(tmp_path / "a", STEPS + CPU + strange)) == top(save(tmp_path / "b", STEPS + CPU))


# --- on our time line -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Run:
    write(tmp_path / "run", small("parallel.tp=2"))
    return load(tmp_path / "run")


def told(run: Run, fact: dict[str, Any], rank: int = 1) -> tuple[TorchProfile, Clocks]:
    run.ranks[rank].torch_traces = [fact]
    clocks = align(run)
    return read(run, clocks), clocks


def test_lanes_are_shifted_by_the_steps_starts(run: Run) -> None:
    save(run.folder / "torch.rank1.json.gz", STEPS + CPU)
    drift = 2_000  # ns that the trace's clock lost from one step to the next
    anchors = [[3, 1_000_000_000], [4, 1_002_000_000 + drift], [9, 5]]
    profile, clocks = told(run, {"file": "torch.rank1.json.gz", "anchors": anchors})
    assert profile.problems == []
    spans = {e["name"]: e for e in profile.lanes if e["ph"] == "X" and e["name"] != "aten::addmm"}
    origin = clocks.to_origin(1, np.array([1_000_000_000]))[0]
    for name, after in (("aten::linear", 100), ("aten::item", 20), ("aten::_fused_adamw_", 860)):
        expected = (origin + after * 1000 + drift * after / 2000) / 1000
        assert spans[name]["ts"] == pytest.approx(expected, abs=0.002)
    assert "aten::warmup" in spans  # between the first and the last step
    assert {e["pid"] for e in profile.lanes} == {1}
    assert {e["cat"] for e in spans.values()} == {"torch cpu_op"}


def test_every_thread_and_stream_has_a_lane(run: Run) -> None:
    save(run.folder / "t.json.gz", STEPS + CPU + GPU)
    profile, _ = told(run, {"file": "t.json.gz", "anchors": [[3, 1_000_000]]})
    names = {e["tid"]: e["args"]["name"] for e in profile.lanes if e["name"] == "thread_name"}
    assert sorted(names.values()) == ["torch stream 7", f"torch thread {MAIN}", f"torch thread {AUTOGRAD}"]
    assert min(names) >= FIRST_LANE
    assert {e["tid"] for e in profile.lanes} == names.keys()


def test_only_the_longest_events_go_into_our_trace(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kineto, "MAX_LANE_EVENTS", 3)
    save(run.folder / "t.json.gz", STEPS + CPU)
    profile, _ = told(run, {"file": "t.json.gz", "anchors": [[3, 1_000_000]]})
    assert {e["name"] for e in profile.lanes if e["ph"] == "X"} == {"aten::linear", "aten::addmm", "aten::mm"}


def test_rows_name_their_rank(run: Run) -> None:
    save(run.folder / "t.json.gz", STEPS + CPU)
    profile, _ = told(run, {"file": "t.json.gz", "anchors": [[3, 1_000_000]]})
    assert profile.kernels[0] == {"rank": 1, "action": "forward", "name": "aten::addmm", "s": 90e-6, "calls": 1.0}


@pytest.mark.parametrize("anchors", [None, [], "x", [[3]], [[3, 1.5]], [[8, 10]], {"3": 1}])
def test_without_an_anchor_there_are_kernels_but_no_lanes(run: Run, anchors: Any) -> None:
    save(run.folder / "t.json.gz", STEPS + CPU)
    profile, _ = told(run, {"file": "t.json.gz", "anchors": anchors})
    assert profile.kernels and not profile.lanes
    assert "no anchor relates its clock to the run's" in profile.problems[0]


# --- files that cannot be trusted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "", ".", ".."])
def test_a_file_outside_of_the_run_directory_is_not_read(run: Run, name: str) -> None:
    (run.folder.parent / "secret.json").write_text(json.dumps({"traceEvents": STEPS + CPU}))
    profile, _ = told(run, {"file": name, "anchors": [[3, 1]]})
    assert not profile.kernels and not profile.lanes
    assert len(profile.problems) >= 1


def test_a_missing_file_is_a_problem(run: Run) -> None:
    profile, _ = told(run, {"file": "torch.rank1.json.gz", "anchors": [[3, 1]]})
    assert profile.problems[0] == "rank 1: torch.rank1.json.gz: no such file"


@pytest.mark.parametrize("packed", [True, False])
def test_a_truncated_file_shows_what_came_before(tmp_path: Path, packed: bool) -> None:
    path = save(tmp_path / "t.json", STEPS + CPU * 2000, packed)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    trace = read_file(path)
    assert len(trace.problems) == 1 and "cannot be read to its end" in trace.problems[0]
    assert [step for step, _, _ in trace.steps] == [3, 4]
    assert trace.top()[0]["name"] == "aten::addmm"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no traceEvents in the file"),
        (b"{}", "no traceEvents in the file"),
        (b"\x1f\x8b\x08garbage", "cannot be read"),
        (b"\x00\xff" * 5000, "no traceEvents in the file"),
        (b'{"traceEvents": [{"ph": "X" "name"}]}', "the file is truncated"),
        (b'{"traceEvents": [' + b"[" * 100_000, "cannot be read"),
        (b'{"traceEvents": [1, null, "x", {"ph": 3}, {"ph": "X", "ts": "a", "dur": {}}, NaN]}', None),
        (b'{"traceEvents": [{"ph": "X", "ts": 1e400, "dur": 1}, {"ph": "X", "ts": 1, "dur": -1}]}', None),
        (b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": ["x"], "ts": 1, "dur": 1, "args": 3}]}', None),
    ],
)
def test_what_is_no_trace_is_a_problem_and_no_exception(tmp_path: Path, content: bytes, problem: str | None) -> None:
    (tmp_path / "t").write_bytes(content)
    trace = read_file(tmp_path / "t")
    assert not trace.steps
    assert [problem in found for found in trace.problems if problem] == [True] * bool(problem)


def test_a_folder_in_the_place_of_a_file_is_a_problem(tmp_path: Path) -> None:
    assert "cannot be read" in read_file(tmp_path).problems[0]


def test_too_many_events_and_an_event_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "t", STEPS + CPU)
    monkeypatch.setattr(kineto, "MAX_EVENTS", 8)
    assert read_file(path).problems == ["more than 8 events; the rest is not read"]
    assert len(read_file(path).events) == 1
    monkeypatch.setattr(kineto, "LONGEST_EVENT", 1000)
    (tmp_path / "u").write_text('{"traceEvents": [{"name": "' + "x" * 3_000_000)
    assert "an event without an end" in read_file(tmp_path / "u").problems[0]


def test_a_packed_file_that_unpacks_to_too_much_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kineto, "MAX_CHARACTERS", 2_000_000)
    path = save(tmp_path / "t", STEPS + CPU * 20_000)
    assert path.stat().st_size < 200_000
    trace = read_file(path)
    assert "too large" in trace.problems[0]
    assert 0 < len(trace.events) < 20_000
