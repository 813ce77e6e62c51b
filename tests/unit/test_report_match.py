"""Meetings: every call meets the calls it met in truth, and arrival, end and culprit are those that were planted."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dist_gpt.config.schema import Config
from dist_gpt.events import CALL, CALL_COLUMNS, EMULATED, OPS
from dist_gpt.report.analysis.clocks import Clocks, align
from dist_gpt.report.analysis.match import RECV, SEND, Calls, Meetings, match
from dist_gpt.report.read.load import Run, load
from dist_gpt.schedule.expand import BACKWARD, FORWARD
from tests.unit.synthetic import MS, SECOND, Clock, Late, Times, edit, places, small, write

SP = "parallel.sequence_parallel=true"
LAYOUTS = {
    "tp": small("parallel.tp=2"),
    "data": small("parallel.dp=4", "optim.sharding=none"),
    "pipeline": small("parallel.pp=4"),
    "all axes": small("parallel.pp=2", "parallel.dp=2", "parallel.tp=2", SP),
    "interleaved": small(
        "parallel.pp=2", "parallel.dp=2", "parallel.schedule=interleaved", "parallel.virtual_stages=2"
    ),
    "gpipe": small("parallel.pp=2", "parallel.tp=2", "parallel.schedule=gpipe"),
}
SKEWED = {rank: Clock(rank * SECOND, 10.0 * rank) for rank in range(8)}


def matched(folder: Path) -> tuple[Run, Clocks, Calls, Meetings]:
    run = load(folder)
    clocks = align(run)
    return run, clocks, *match(run, clocks)


@pytest.mark.parametrize("config", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_call_meets_those_it_met(config: Config, tmp_path: Path) -> None:
    """Against the rule, written out in dictionaries."""
    truth = write(tmp_path, config, Times(jitter=0.5), clocks=SKEWED)
    run, clocks, calls, meetings = matched(tmp_path)
    assert run.problems == [] and meetings.complete.all() and (meetings.members == meetings.size).all()
    expected: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    for rank, log in run.ranks.items():
        seen: dict[tuple[object, ...], int] = {}
        for row in truth.calls[rank].tolist():
            channel = log.header["channels"][row[2]]
            ranks = tuple(channel.get("ranks") or run.layout.group(channel["axis"], rank))
            name = row[0], channel["axis"], ranks, channel.get("direction") or ""
            seen[name] = seen.get(name, 0) + 1
            expected.setdefault((*name, seen[name]), []).append((rank, row[CALL_COLUMNS.index("issue")]))
    found = {}
    for number in range(len(meetings)):
        rows = np.flatnonzero(calls.meeting == number) if len(meetings) < 50 else members(calls, meetings, number)
        axis, ranks, direction = calls.channels[meetings.gid[number]]
        assert calls.axes[meetings.axis[number]] == axis
        k = sum(key[:4] == (int(meetings.step[number]), axis, ranks, direction) for key in found) + 1
        issues = (calls.issue[rows] + clocks.origin).tolist()
        found[int(meetings.step[number]), axis, ranks, direction, k] = list(
            zip(calls.rank[rows].tolist(), issues, strict=True)
        )
    assert found.keys() == expected.keys()
    for key, them in expected.items():
        assert [rank for rank, _ in found[key]] == [rank for rank, _ in them]
        assert all(abs(a - b) <= 2 for (_, a), (_, b) in zip(found[key], them, strict=True))


def members(calls: Calls, meetings: Meetings, number: int) -> np.ndarray:
    first = meetings.first[number]
    return calls.order[first : first + meetings.members[number]]


def test_columns_are_those_of_the_file(tmp_path: Path) -> None:
    truth = write(tmp_path, LAYOUTS["all axes"], clocks=SKEWED)
    run, clocks, calls, meetings = matched(tmp_path)
    assert len(calls) == sum(len(rows) for rows in truth.calls.values()) == len(calls.meeting)
    for rank, rows in truth.calls.items():
        here = calls.of(rank)
        assert (calls.rank[here] == rank).all()
        columns = dict(zip(CALL_COLUMNS, rows.T, strict=True))
        for name in ("step", "index", "op", "payload", "cpu", "flags"):
            assert np.array_equal(getattr(calls, name)[here], columns[name])
        for name in ("issued", "done", "wait", "waited"):
            after = getattr(calls, name)[here] - calls.issue[here]
            assert np.abs(after - columns[name]).max() <= 4  # all are rounded to whole ns
        axes = [run.ranks[rank].header["channels"][channel]["axis"] for channel in columns["channel"]]
        assert [calls.axes[i] for i in calls.axis[here]] == axes
        assert (np.diff(calls.step[here]) >= 0).all()
    assert calls.of(99) == slice(0, 0)
    scattered = meetings.op == OPS.index("reduce_scatter")
    assert scattered.any() and (calls.flags[calls.meeting == np.flatnonzero(scattered)[0]] == EMULATED).all()


def test_rows_may_stand_in_any_order_in_a_step(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS["all axes"])
    _, _, before, meetings_before = matched(tmp_path)

    def shuffle(lines: list[str]) -> list[str]:
        at = places(lines, CALL, 3)
        order = np.random.default_rng(1).permutation(len(at)).tolist()
        mixed = {place: lines[at[other]] for place, other in zip(at, order, strict=True)}
        return [mixed.get(i, line) for i, line in enumerate(lines)]

    edit(tmp_path, 5, shuffle)
    _, _, calls, meetings = matched(tmp_path)
    assert np.array_equal(calls.issue, before.issue) and np.array_equal(calls.meeting, before.meeting)
    assert np.array_equal(meetings.end, meetings_before.end)


# --- who was late ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FORWARD, BACKWARD])
def test_a_late_rank_is_the_culprit_of_the_meeting_it_was_late_for(kind: str, tmp_path: Path) -> None:
    late = Late(rank=2, ns=40 * MS, kind=kind, steps=frozenset({3}))
    truth = write(tmp_path, small("parallel.tp=4"), late=[late], clocks=SKEWED)
    _, clocks, calls, meetings = matched(tmp_path)
    waits = meetings.arrival - np.minimum.reduceat(calls.issue[calls.order], meetings.first)
    (slow,) = np.flatnonzero(waits > 30 * MS)
    assert (meetings.culprit[slow], meetings.step[slow], calls.axes[meetings.axis[slow]]) == (2, 3, "tp")
    issue, payload, done = (CALL_COLUMNS.index(name) for name in ("issue", "payload", "done"))
    (row,) = truth.calls[2][np.abs(truth.calls[2][:, issue] - clocks.origin - meetings.arrival[slow]) <= 2]
    assert abs(meetings.end[slow] - (row[issue] + row[done] - clocks.origin)) <= 2
    assert meetings.payload[slow] == row[payload] and waits[slow] == pytest.approx(40 * MS, abs=MS)
    mine = members(calls, meetings, int(slow))
    assert calls.rank[mine].tolist() == [0, 1, 2, 3] and (calls.waited[mine] >= meetings.end[slow]).all()


def test_a_rank_that_computes_longer_is_late_for_every_meeting_inside(tmp_path: Path) -> None:
    late = Late(rank=2, ns=40 * MS, steps=frozenset({3}), asleep=False)
    write(tmp_path, small("parallel.tp=4"), late=[late], clocks=SKEWED)
    run, _, calls, meetings = matched(tmp_path)
    waits = meetings.arrival - np.minimum.reduceat(calls.issue[calls.order], meetings.first)
    slow = waits > 5 * MS
    assert slow.sum() == 2 and (meetings.culprit[slow] == 2).all()  # the embedding's one all-reduce halves its entry
    assert waits[slow].tolist() == pytest.approx([20 * MS] * 2, abs=MS)


def test_arrival_and_end_are_the_simulated_ones(tmp_path: Path) -> None:
    """A transfer takes 20 us and half a ns a byte from the last arrival on; nothing else does."""
    write(tmp_path, LAYOUTS["all axes"], Times(latency=20_000, ns_per_byte=0.5, jitter=0.4), clocks=SKEWED)
    _, _, calls, meetings = matched(tmp_path)
    took = meetings.end - meetings.arrival
    assert np.abs(took - (20_000 + meetings.payload / 2)).max() <= 5
    last = np.zeros(len(meetings), dtype=np.int64)
    np.maximum.at(last, calls.meeting, calls.issue)
    assert np.array_equal(last, meetings.arrival)
    culprits = calls.issue == meetings.arrival[calls.meeting]
    assert set(zip(calls.meeting[culprits], calls.rank[culprits], strict=True)) >= set(enumerate(meetings.culprit))


# --- messages -------------------------------------------------------------------------------------------------------


def test_messages_both_ways_between_two_ranks(tmp_path: Path) -> None:
    write(tmp_path, small("parallel.pp=2"), clocks=SKEWED)
    run, _, calls, meetings = matched(tmp_path)
    messages = meetings.op == SEND
    assert run.problems == [] and not (meetings.op == RECV).any()
    by_channel = {
        calls.channels[gid]: int((meetings.gid[messages] == gid).sum()) for gid in set(meetings.gid[messages])
    }
    assert by_channel == {("pp", (0, 1), "f"): 8 * 3, ("pp", (1, 0), "b"): 8 * 3}  # micro-batches x steps
    for number in np.flatnonzero(messages).tolist():
        _, (source, destination), _ = calls.channels[meetings.gid[number]]
        rows = members(calls, meetings, number)
        ops = dict(zip(calls.rank[rows].tolist(), calls.op[rows].tolist(), strict=True))
        assert ops == {source: SEND, destination: RECV}
        sent = rows[calls.op[rows] == SEND][0]
        assert meetings.payload[number] == calls.payload[sent] > 0
        assert meetings.end[number] == max(calls.done[sent], meetings.arrival[number])


def test_the_receivers_bound_counts_only_without_the_senders_end(tmp_path: Path) -> None:
    write(tmp_path, small("parallel.pp=2"))
    _, _, before, meetings_before = matched(tmp_path)

    def forget(lines: list[str]) -> list[str]:
        rows = [line.strip("[]").split(",") if line.startswith("[1,") else None for line in lines]
        send = str(OPS.index("send"))
        return [
            line if row is None or row[4] != send else f"[{','.join([*row[:8], '-1', '-1', '-1', *row[11:]])}]"
            for line, row in zip(lines, rows, strict=True)
        ]

    edit(tmp_path, 0, forget)
    _, _, calls, meetings = matched(tmp_path)
    forward = np.array([calls.channels[gid][2] == "f" for gid in meetings.gid])
    bound = np.full(len(meetings), -1)
    received = calls.op == RECV
    bound[calls.meeting[received]] = calls.done[received]
    assert np.array_equal(meetings.end[forward], np.maximum(bound[forward], meetings.arrival[forward]))
    assert (meetings.end[forward] > meetings_before.end[forward]).all()
    assert np.array_equal(meetings.end[~forward], meetings_before.end[~forward])


# --- what is missing ------------------------------------------------------------------------------------------------


def test_meetings_of_a_missing_rank_are_incomplete(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS["all axes"])
    _, _, _, whole = matched(tmp_path)
    (tmp_path / "events.rank3.jsonl").unlink()
    run, _, calls, meetings = matched(tmp_path)
    with_3 = np.array([3 in calls.channels[gid][1] for gid in meetings.gid])
    assert np.array_equal(meetings.complete, ~with_3) and with_3.any()
    assert np.array_equal(meetings.members[with_3], meetings.size[with_3] - 1)
    assert len(meetings) == len(whole) and run.problems == ["rank 3: no event file"]
    assert (meetings.culprit != 3).all() and (meetings.end >= meetings.arrival).all()


def test_a_rank_that_died_in_a_step_met_the_others_until_then(tmp_path: Path) -> None:
    write(tmp_path, small("parallel.tp=2"))
    edit(tmp_path, 1, lambda lines: [*lines[: places(lines, CALL, 3)[20]], ""])
    _, _, calls, meetings = matched(tmp_path)
    tp = np.array([calls.axes[axis] == "tp" for axis in meetings.axis]) & (meetings.step == 3)
    assert meetings.complete[meetings.step == 2].all() and not meetings.complete[meetings.step == 4].any()
    assert meetings.complete[tp].tolist() == [True] * 20 + [False] * (tp.sum() - 20)


def test_a_message_of_which_only_one_side_is_there(tmp_path: Path) -> None:
    write(tmp_path, small("parallel.pp=4"))
    shutil.move(tmp_path / "events.rank1.jsonl", tmp_path / "aside")
    run, _, calls, meetings = matched(tmp_path)
    alone = (meetings.members == 1) & (meetings.size == 2)
    assert alone.any() and not meetings.complete[alone].any() and (meetings.end[alone] >= 0).all()
    assert (meetings.op[alone] != RECV).all()


def test_nobody_knows_the_end(tmp_path: Path) -> None:
    write(tmp_path, small("parallel.tp=2"))
    for rank in (0, 1):
        edit(tmp_path, rank, lambda lines: [unknown(line) if line.startswith("[1,") else line for line in lines])
    _, _, calls, meetings = matched(tmp_path)
    assert (meetings.end == -1).all() and (calls.done == -1).all() and (calls.waited == -1).all()
    assert (calls.issued > calls.issue).all()


def unknown(line: str) -> str:
    """A row without done, wait and waited."""
    parts = line.strip("[]").split(",")
    return f"[{','.join([*parts[:8], '-1', '-1', '-1', *parts[11:]])}]"


def test_different_operations_do_not_meet(tmp_path: Path) -> None:
    write(tmp_path, small("parallel.tp=2"))

    def swap(lines: list[str]) -> list[str]:
        at = places(lines, CALL, 3)[4]
        parts = lines[at].split(",")
        parts[4] = str(OPS.index("broadcast"))
        return [*lines[:at], ",".join(parts), *lines[at + 1 :]]

    edit(tmp_path, 1, swap)
    run, _, _, meetings = matched(tmp_path)
    assert (~meetings.complete).sum() == 1 and "1 collective with different operations" in run.problems[0]


def test_one_process_meets_nobody(tmp_path: Path) -> None:
    write(tmp_path, small())
    _, _, calls, meetings = matched(tmp_path)
    assert len(calls) == len(meetings) == 0 and calls.channels == [] and calls.axes == []
