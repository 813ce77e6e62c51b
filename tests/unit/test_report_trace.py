"""trace.json.gz: valid, complete, in lanes that do not overlap, with what analysers of Kineto's traces look for."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gpt.events import OPS
from dist_gpt.report import trace
from dist_gpt.report.analysis.clocks import Clocks, align
from dist_gpt.report.analysis.match import Calls, Meetings, match
from dist_gpt.report.analysis.time_breakdown import blocked, budget, read_spans
from dist_gpt.report.read.load import Run, load
from dist_gpt.report.trace import BLOCKED, COMPUTE, STEPS, write_trace
from tests.unit.simulated import Late, Times
from tests.unit.synthetic import MS, Clock, small, write

SETS = ("parallel.dp=2", "parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true")
KINETO = {
    "External id", "device", "stream", "correlation", "Collective name", "dtype", "In msg nelems", "Out msg nelems",
    "In split size", "Out split size", "Group size", "Process Group Name", "Process Group Description",
    "Process Group Ranks", "Rank", "Seq", "Is asynchronized op",
}  # fmt: skip
US = 1e-3 / 2
"""Microseconds are written with three digits; sums of them may be off in the next one."""


class Planted:
    """A planted run, read, and the trace written from it."""

    def __init__(self, folder: Path, *sets: str, **kinds: Any) -> None:
        write(folder / "run", small(*(sets or SETS)), **kinds)
        self.folder = folder
        self.run: Run = load(folder / "run")
        self.clocks: Clocks = align(self.run)
        self.calls: Calls
        self.meetings: Meetings
        self.calls, self.meetings = match(self.run, self.clocks)

    def document(self, name: str = "trace.json.gz", **kinds: Any) -> dict[str, Any]:
        path = self.folder / name
        told = write_trace(path, self.run, self.clocks, self.calls, self.meetings, **kinds)
        document: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        assert told == {"events": len(document["traceEvents"]), "bytes": path.stat().st_size}
        return document


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp("trace")
    return Planted(folder, late=[Late(3, 4 * MS)], clocks={5: Clock(7_000_000)}, times=Times(jitter=0.3))


@pytest.fixture(scope="module")
def document(planted: Planted) -> dict[str, Any]:
    return planted.document()


def spans(document: dict[str, Any], *, cat: str | None = None, tid: int | None = None) -> list[dict[str, Any]]:
    return [
        e for e in document["traceEvents"] if e["ph"] == "X" and cat in (None, e["cat"]) and tid in (None, e["tid"])
    ]


def lanes(document: dict[str, Any]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    found = defaultdict(list)
    for event in spans(document):
        found[event["pid"], event["tid"]].append(event)
    return {key: sorted(events, key=lambda e: (e["ts"], -e["dur"])) for key, events in found.items()}


def names(document: dict[str, Any], kind: str) -> dict[tuple[int, int], Any]:
    key = "name" if kind.endswith("name") else "sort_index"
    return {
        (e["pid"], e["tid"]): e["args"][key] for e in document["traceEvents"] if e["ph"] == "M" and e["name"] == kind
    }


# --- form -------------------------------------------------------------------------------------------------------------


def test_every_span_has_its_fields_and_no_time_is_negative(document: dict[str, Any]) -> None:
    for event in document["traceEvents"]:
        assert {"ph", "name", "pid", "ts"} <= event.keys()
        assert event["ts"] >= 0
    for event in spans(document):
        assert {"cat", "tid", "dur", "args"} <= event.keys()
        assert event["dur"] >= 0


def test_nothing_overlaps_in_a_lane(document: dict[str, Any]) -> None:
    for (rank, tid), events in lanes(document).items():
        if tid == STEPS:
            continue
        for before, after in zip(events, events[1:], strict=False):
            assert before["ts"] + before["dur"] <= after["ts"] + US, (rank, tid, before, after)


def test_steps_entries_and_issuing_calls_nest(document: dict[str, Any]) -> None:
    for (_, tid), events in lanes(document).items():
        stack: list[float] = []
        for event in events if tid == STEPS else []:
            while stack and stack[-1] <= event["ts"] + US:
                stack.pop()
            end = event["ts"] + event["dur"]
            assert not stack or end <= stack[-1] + US, event
            stack.append(end)


def test_ranks_and_lanes_are_named_and_ordered(planted: Planted, document: dict[str, Any]) -> None:
    assert names(document, "process_name")[3, 0] == "rank 3 (pp 0, dp 1, cp 0, tp 1) on n0"
    assert names(document, "process_sort_index") == {(rank, 0): rank for rank in range(8)}
    titles = names(document, "thread_name")
    assert lanes(document).keys() <= titles.keys()
    for rank in range(8):
        mine = [titles[key] for key in sorted(titles) if key[0] == rank]
        assert mine[:3] == ["steps", "compute", "blocked"]
        assert {"tp", "data", "pp", "world"} <= set(mine[3:])
        assert len(mine) == len(set(mine))


def test_two_messages_at_the_same_time_have_two_lanes(document: dict[str, Any]) -> None:
    """Receives are posted ahead: on the pipeline's axis there is always one under way beside another."""
    titles = set(names(document, "thread_name").values())
    assert {"pp", "pp 2"} <= titles


def test_the_same_run_gives_the_same_bytes(planted: Planted) -> None:
    planted.document("a.json.gz")
    planted.document("b.json.gz")
    assert (planted.folder / "a.json.gz").read_bytes() == (planted.folder / "b.json.gz").read_bytes()


# --- content ----------------------------------------------------------------------------------------------------------


def test_computing_and_blocked_times_fill_the_entries(document: dict[str, Any]) -> None:
    by_lane = lanes(document)
    for rank in range(8):
        entries = [e for e in by_lane[rank, STEPS] if e["cat"] == "cpu_op"]
        ends = [e["ts"] + e["dur"] for e in entries]
        outside = sum(  # behind the last entry of a step, for sends
            e["dur"]
            for e in by_lane[rank, BLOCKED]
            if not any(a["ts"] - US <= e["ts"] < b - US for a, b in zip(entries, ends, strict=True))
        )
        # Data are read inside of nothing here, so entries do not nest and their sum is the time in them.
        inside = sum(e["dur"] for lane in (COMPUTE, BLOCKED) for e in by_lane[rank, lane]) - outside
        assert inside == pytest.approx(sum(e["dur"] for e in entries), abs=0.1)


def test_blocked_times_are_named_as_the_budget_has_them(planted: Planted, document: dict[str, Any]) -> None:
    """Rank by rank, the same sums (but for the bubble of a pipeline's drain, which the budget finds in collectives)."""
    read = read_spans(planted.run, planted.clocks)
    stood = blocked(planted.run, planted.calls, planted.meetings, read)
    told = budget(planted.run, planted.calls, read, stood)
    seen: dict[tuple[int, str], float] = defaultdict(float)
    for event in spans(document, tid=BLOCKED):
        seen[event["pid"], event["name"]] += event["dur"] / 1e6 / len(told.steps)
    for rank in range(8):
        row = told.of_rank_s(rank)
        for axis in planted.calls.axes:
            assert seen[rank, f"transfer.{axis}"] == pytest.approx(row[f"transfer.{axis}"], abs=2e-5), (rank, axis)
        waiting = sum(
            s for (r, what), s in seen.items() if r == rank and (what == "bubble" or what.startswith("wait."))
        )
        assert waiting == pytest.approx(
            row["bubble"] + sum(row[f"wait.{axis}"] for axis in planted.calls.axes), abs=2e-5
        )


def test_who_came_last_is_told(document: dict[str, Any]) -> None:
    """Rank 3 slept 4 ms before its forward: its tp partner, rank 2, waits for it that long."""
    waits = [e for e in spans(document, tid=BLOCKED) if e["pid"] == 2 and e["name"] == "wait.tp" and e["dur"] > 3500]
    assert len(waits) == 3  # one a step
    assert {e["args"]["came last"] for e in waits} == {3}


def test_every_call_is_there(planted: Planted, document: dict[str, Any]) -> None:
    collectives = [e for e in spans(document, cat="kernel") if "Collective name" in e["args"]]
    assert len(collectives) == len(planted.calls)
    seen = Counter((e["pid"], e["args"]["Collective name"]) for e in collectives)
    kineto = {"all_gather": "_allgather_base", "reduce_scatter": "_reduce_scatter_base", "all_reduce": "allreduce"}
    ops = [kineto.get(OPS[op], OPS[op]) for op in planted.calls.op.tolist()]
    assert seen == Counter(zip(planted.calls.rank.tolist(), ops, strict=True))


def test_arrows_lead_from_every_send_to_its_receive(document: dict[str, Any]) -> None:
    arrows = {ph: {e["id"]: e for e in document["traceEvents"] if e["ph"] == ph} for ph in "sf"}
    assert arrows["s"].keys() == arrows["f"].keys()
    sends = [e for e in spans(document) if e["args"].get("Collective name") == "send"]
    assert len(arrows["s"]) == len(sends) > 0
    by_lane = lanes(document)
    for identity, start in arrows["s"].items():
        end = arrows["f"][identity]
        assert end["bp"] == "e" and end["ts"] >= start["ts"]
        for event, op in ((start, "send"), (end, "recv")):
            around = [
                e for e in by_lane[event["pid"], event["tid"]] if e["ts"] <= event["ts"] <= e["ts"] + e["dur"] + US
            ]
            assert op in {e["args"]["Collective name"] for e in around}


def test_arrows_of_collectives_are_drawn_if_asked_for(planted: Planted) -> None:
    document = planted.document("arrows.json.gz", arrows=frozenset({"tp"}))
    starts = [e for e in document["traceEvents"] if e["ph"] == "s"]
    assert {e["name"] for e in starts} == {"tp all_gather", "tp reduce_scatter", "tp all_reduce"}
    assert len({e["id"] for e in starts}) == len(starts)


def test_bytes_under_way_return_to_nothing(document: dict[str, Any]) -> None:
    levels = defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] == "C":
            levels[event["pid"], event["name"]].append(event["args"]["bytes"])
    assert {name for _, name in levels} == {"bytes under way"}
    for series in levels.values():
        assert min(series) >= 0 and series[-1] == 0 and max(series) > 0


# --- Kineto's form ----------------------------------------------------------------------------------------------------


def test_collectives_carry_kinetos_names(planted: Planted, document: dict[str, Any]) -> None:
    groups = {g["pg_name"]: g for g in document["distributedInfo"]["pg_config"]}
    kernels = [e for e in spans(document, cat="kernel") if "Collective name" in e["args"]]
    for event in kernels:
        args = event["args"]
        assert args.keys() >= KINETO
        assert re.match(r"ncclKernel_\w+\(", event["name"])
        group = groups[args["Process Group Name"]]
        assert int(args["Process Group Name"]) >= 0
        assert json.loads(args["Process Group Ranks"]) == group["ranks"]
        assert args["Group size"] == len(group["ranks"]) == group["pg_size"]
        assert group["ranks"][args["Rank"]] == event["pid"]
        assert args["Process Group Description"] == group["pg_desc"]
    assert document["distributedInfo"]["backend"] == "gloo"
    assert document["distributedInfo"]["world_size"] == 8
    assert document["displayTimeUnit"] == "ms"


def test_elements_and_types_give_the_bytes(planted: Planted, document: dict[str, Any]) -> None:
    """The larger of in and out is the whole tensor; a receive says what was sent."""
    size = {"Float": 4, "Double": 8, "Byte": 1}
    for event in spans(document, cat="kernel"):
        if (args := event["args"]).get("Collective name") is None:
            continue
        row = args["correlation"] - 1
        payload = planted.meetings.payload[planted.calls.meeting[row]]
        assert max(args["In msg nelems"], args["Out msg nelems"]) * size[args["dtype"]] == payload > 0
        scatter, gather = "_reduce_scatter_base", "_allgather_base"
        if args["Collective name"] in (scatter, gather):
            small_side = "Out" if args["Collective name"] == scatter else "In"
            whole_side = "In" if small_side == "Out" else "Out"
            assert args[f"{small_side} msg nelems"] * args["Group size"] == args[f"{whole_side} msg nelems"]


def test_kernels_are_launched_within_a_step(document: dict[str, Any]) -> None:
    """HTA drops a kernel that nothing on the host launched inside of a ProfilerStep."""
    host = [e for e in spans(document, tid=STEPS) if "correlation" in e["args"]]
    launched = {(e["pid"], e["args"]["correlation"]): e for e in host}
    assert len(launched) == len(host)
    steps = [e for e in spans(document, tid=STEPS) if e["name"].startswith("ProfilerStep#")]
    assert {e["name"] for e in steps} == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}
    for event in spans(document, cat="kernel"):
        launch = launched[event["pid"], event["args"]["correlation"]]
        assert "stream" in event["args"] and "stream" not in launch["args"]
        step = next(
            s for s in steps if s["pid"] == event["pid"] and s["name"] == f"ProfilerStep#{event['args']['step']}"
        )
        assert step["ts"] - US <= launch["ts"] <= step["ts"] + step["dur"] + US


def test_a_file_of_one_rank_says_whose_it_is(planted: Planted) -> None:
    document = planted.document("one.json.gz", ranks=[6])
    assert document["distributedInfo"]["rank"] == 6
    assert {e["pid"] for e in document["traceEvents"]} == {6}
    head = gzip.decompress((planted.folder / "one.json.gz").read_bytes()).split(b"\n", 1)[0]
    assert re.search(rb'"rank":\s+6', head)  # how HTA finds it


# --- what is left out, what is added ----------------------------------------------------------------------------------


def test_what_is_left_out_is_told(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MAX_RANKS", 4)
    monkeypatch.setattr(trace, "MAX_ROWS", 1000)
    document = planted.document("capped.json.gz")
    assert {e["pid"] for e in spans(document)} == {0, 1, 4, 5}  # one whole replica: both stages of it
    assert document["otherData"]["left out"] == "4 of 8 ranks; steps 3, 4"
    assert document["otherData"]["steps"] == "2"
    monkeypatch.undo()
    assert planted.document()["otherData"]["left out"] == "nothing"


def test_a_rank_without_a_clock_and_a_missing_one_are_no_obstacle(tmp_path: Path) -> None:
    found = Planted(tmp_path, clocks={2: Clock(readings=0)}, ranks_per_host=1)
    (tmp_path / "run" / "events.rank1.jsonl").unlink()
    found.run = load(tmp_path / "run")
    found.clocks = align(found.run)
    found.calls, found.meetings = match(found.run, found.clocks)
    document = found.document()
    assert {e["pid"] for e in spans(document)} == {0, 2, 3, 4, 5, 6, 7}
    assert all(e["ts"] >= 0 for e in document["traceEvents"])


def test_a_run_without_a_window_gives_an_empty_trace(tmp_path: Path) -> None:
    write(tmp_path / "run", small(*SETS, window=None))
    run = load(tmp_path / "run")
    clocks = align(run)
    write_trace(tmp_path / "t.json.gz", run, clocks, *match(run, clocks))
    document = json.loads(gzip.decompress((tmp_path / "t.json.gz").read_bytes()))
    assert not spans(document)


def test_extra_events_are_moved_with_the_others(planted: Planted) -> None:
    lowest = min(e["ts"] for e in spans(planted.document()))
    place = {"ph": "X", "cat": "torch cpu_op", "pid": 0, "tid": 1000, "dur": 1.0, "args": {}}
    extra = [{**place, "name": "aten::mm \u2713", "ts": 1234.5678}, {**place, "name": "before the trace", "ts": -9e9}]
    document = planted.document("extra.json.gz", extra=extra)
    found = spans(document, cat="torch cpu_op")
    assert [(e["name"], e["ts"]) for e in found] == [("aten::mm \u2713", 1234.568)]
    assert lowest >= 0


def test_times_are_those_of_the_calls(planted: Planted, document: dict[str, Any]) -> None:
    """Nothing lies before the origin here, so the trace's zero is the origin."""
    by_id = {e["args"]["correlation"]: e for e in spans(document, cat="kernel") if "Collective name" in e["args"]}
    issue = np.array([by_id[row + 1]["ts"] for row in range(len(planted.calls))])
    assert np.abs(issue * 1000 - planted.calls.issue).max() < 1
    unix = document["baseTimeNanoseconds"]
    header = planted.run.ranks[0].header
    assert unix == round(header["unix_s"] * 1e9) + planted.clocks.origin - header["base_ns"]
