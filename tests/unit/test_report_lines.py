"""Lines of an event file that cannot be used: they are left out, with what they make doubtful, and told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dist_gpt.events import CALL, SPAN
from dist_gpt.report.analysis.clocks import align
from dist_gpt.report.analysis.match import match
from dist_gpt.report.read.event_schema import FACTS, Each, fits
from dist_gpt.report.read.load import Run, RunError, load
from tests.unit.synthetic import edit, places, small, write

MIXED = ("parallel.tp=2", "parallel.dp=2", "parallel.pp=2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    write(folder, small(*MIXED))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A run directory to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def only(run: Run) -> str:
    """The one problem of a run."""
    (problem,) = run.problems
    return problem


def steps_of(run: Run, rank: int) -> list[int]:
    log = run.ranks[rank]
    return sorted({*log.calls[:, 0].tolist(), *log.spans[:, 0].tolist()})


# --- rows -----------------------------------------------------------------------------------------------------------

BROKEN = {
    "cut": lambda line: line[:-5],
    "without a bracket": lambda line: line[1:],
    "one number fewer": lambda line: line.rpartition(",")[0] + "]",
    "too long": lambda line: line[:-1] + ",7]",
    "a fraction": lambda line: line[:-1].rpartition(",")[0] + ",0.5]",
    "a text": lambda line: line[:-1].rpartition(",")[0] + ',"0"]',
    "null": lambda line: line[:-1].rpartition(",")[0] + ",null]",
    "a list": lambda line: line[:-1].rpartition(",")[0] + ",[0]]",
    "not a number": lambda line: line[:-1].rpartition(",")[0] + ",NaN]",
    "beyond int64": lambda line: line[:-1].rpartition(",")[0] + f",{1 << 70}]",
    "nearly beyond int64": lambda line: line[:-1].rpartition(",")[0] + f",{(1 << 63) - 1}]",
    "thousands of digits": lambda line: line[:-1].rpartition(",")[0] + f",{'9' * 5000}]",
    "a negative step": lambda line: line.replace("[1,3,", "[1,-3,"),
    "an unknown kind": lambda line: line.replace("[1,", "[9,", 1),
    "an entry behind the list": lambda line: ",".join([*line.split(",")[:2], "999", *line.split(",")[3:]]),
    "an unknown channel": lambda line: ",".join([*line.split(",")[:3], "99", *line.split(",")[4:]]),
    "an unknown operation": lambda line: ",".join([*line.split(",")[:4], "8", *line.split(",")[5:]]),
    "zero bytes": lambda line: "\0" * len(line),
    "text": lambda line: "Traceback (most recent call last):",
    "a number": lambda line: "3",
    "nothing": lambda line: "null",
    "two values": lambda line: f"{line},{line}",
    "too deep": lambda line: "[" * 100_000,
    "too large": lambda line: "[1,3," + "0" * 1_000_001 + "]",
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_row_takes_its_step_with_it(how: str, folder: Path) -> None:
    """Behind a row that is missing, the count of calls is wrong: nothing of its step may be matched."""

    def damage(lines: list[str]) -> list[str]:
        at = places(lines, CALL, 3)[10]
        return [*lines[:at], BROKEN[how](lines[at]), *lines[at + 1 :]]

    before = load(folder).ranks[1]
    edit(folder, 1, damage)
    run = load(folder)
    assert "rank 1: unreadable lines of the event file are left out (rank 1: 1 line" in only(run)
    assert "rows of step 3 are left out too" in only(run)
    log = run.ranks[1]
    assert np.array_equal(log.calls, before.calls[before.calls[:, 0] != 3])
    assert np.array_equal(log.spans, before.spans[before.spans[:, 0] != 3])
    assert steps_of(run, 0) == [2, 3, 4] and log.end is not None


def test_a_row_between_two_steps_may_be_of_both(folder: Path) -> None:
    edit(folder, 1, lambda lines: [*lines[: (at := places(lines, CALL, 3)[0])], "[1,", *lines[at + 1 :]])
    run = load(folder)
    assert "rows of steps 2-3 are left out too" in only(run) and steps_of(run, 1) == [4]


def test_a_broken_span(folder: Path) -> None:
    edit(folder, 1, lambda lines: [*lines[: (at := places(lines, SPAN, 3)[4])], "[2,3,x]", *lines[at + 1 :]])
    run = load(folder)
    assert "line" in only(run) and steps_of(run, 1) == [2, 4]


def test_only_broken_rows(folder: Path) -> None:
    edit(folder, 1, lambda lines: [f"{line}]" if line.startswith("[") else line for line in lines])
    run = load(folder)
    assert len(run.ranks[1].calls) == len(run.ranks[1].spans) == 0 and len(run.ranks[1].steps) == 6


def test_blank_lines_are_nothing(folder: Path) -> None:
    before = load(folder)
    edit(folder, 1, lambda lines: [text for line in lines for text in (line, "")])
    run = load(folder)
    assert run.problems == [] and np.array_equal(run.ranks[1].calls, before.ranks[1].calls)


FACT_LINES = [
    '{"clock":{"at_ns":1}}', '{"clock":7}', '{"step":"3","phase":"train"}', '{"step":3,"phase":[1]}',
    '{"memory":{"parts":{"parameters":"many"}}}', '{"end":{"differences":3}}', '{"kernel":{"name":"x","shape":"12"}}',
    '{"ceiling":{"flops_per_s":NaN,"bytes_per_s":1,"dtype":"fp32"}}', '{"a":',
    '{"difference":{"step":12,"phase":"train"}}', '{"sample":{"at_ns":1.5}}',
]  # fmt: skip


@pytest.mark.parametrize("line", FACT_LINES)
def test_a_fact_of_another_shape_is_left_out(line: str, folder: Path) -> None:
    edit(folder, 1, lambda lines: [*lines[:2], line, *lines[2:]])
    run = load(folder)
    assert "(rank 1: 1 line, the first is line 3)" in only(run)
    assert len(run.ranks[1].steps) == 6 and len(run.ranks[1].clocks) == 2


def test_a_fact_of_an_unknown_kind_is_let_pass(folder: Path) -> None:
    edit(folder, 1, lambda lines: [*lines[:2], '{"weather":"fine"}', *lines[2:]])
    assert load(folder).problems == []


def test_facts_of_every_kind(folder: Path) -> None:
    facts = {
        "sample": {"at_ns": 5, "sm_clock_hz": 1.98e9, "power_w": 600.0, "temperature_c": 60},
        "torch_trace": {"file": "torch.rank1.json.gz", "anchors": [[2, 7], [3, 9]]},
        "difference": {"step": 3, "phase": "train", "action": "send 0SEND_F0", "axis": "pp", "op": "send",
                       "payload_bytes": 4096, "calls": -1},
    }  # fmt: skip
    more = [json.dumps({kind: value}) for kind, value in facts.items()]
    edit(folder, 1, lambda lines: [*lines[:2], *more, *lines[2:]])
    run = load(folder)
    assert run.problems == []
    assert run.ranks[1].samples == [facts["sample"]] and run.ranks[1].torch_traces == [facts["torch_trace"]]
    assert run.ranks[1].differences == [facts["difference"]]


def test_dropped_rows_are_told(folder: Path) -> None:
    edit(folder, 1, lambda lines: [line.replace('"dropped": 0', '"dropped": 12') for line in lines])
    assert only(load(folder)) == "rank 1: rows were dropped because there were too many (rank 1: 12)"


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_never_crashes(seed: int, folder: Path) -> None:
    random = np.random.default_rng(seed)
    for rank in random.choice(8, 3, replace=False):
        path = folder / f"events.rank{rank}.jsonl"
        data = bytearray(path.read_bytes())
        for _ in range(int(random.integers(1, 30))):
            at, length = int(random.integers(len(data))), int(random.integers(1, 12))
            junk = bytes(random.choice(list(b'0123456789-,.[]{}":\n\0ex\xff'), length).tolist())
            data[at : at + int(random.integers(0, 12))] = junk
        path.write_bytes(bytes(data[: int(random.integers(len(data) // 2, len(data)))]))
    try:
        run = load(folder)
    except RunError:
        return
    clocks = align(run)
    calls, meetings = match(run, clocks)
    assert run.problems and (meetings.members <= meetings.size).all()
    assert len(clocks.table) == len(run.ranks) and len(calls) == sum(len(log.calls) for log in run.ranks.values())


def test_shapes() -> None:
    assert fits({"a": 1, "more": []}, {"a": int, "b?": [str]}) and fits({"a": 1, "b": None}, {"a": int, "b?": str})
    assert not fits({"a": True}, {"a": int}) and not fits({"a": 1, "b": [1]}, {"a": int, "b?": [str]})
    assert fits([[1, 2]], [(int, int)]) and not fits([[1, 2], [3]], [(int, int)])
    assert fits({"x": {"y": 1.5}}, Each(Each(float))) and not fits([1.0, float("inf")], [float])
    assert not fits({}, FACTS["clock"]) and not fits(1 << 61, int)
