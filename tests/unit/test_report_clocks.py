"""Clocks: planted offsets and drifts are recovered within the printed error, and what contradicts causality is repaired
by the smallest shifts within it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gpt.events import CALL_COLUMNS, SPAN_COLUMNS
from dist_gpt.report.analysis.clocks import UNKNOWN_DRIFT, WANDER, Clocks, Heard, align, repair
from dist_gpt.report.analysis.match import RECV, SEND, Calls, Meetings, match
from dist_gpt.report.read.load import Run, load
from tests.unit.synthetic import SECOND, Clock, Times, Truth, edit, small, write

ISSUE, START = CALL_COLUMNS.index("issue"), SPAN_COLUMNS.index("start")
FAR = small("parallel.dp=4", "parallel.pp=2")


def errors_ns(run: Run, clocks: Clocks, truth: Truth, rank: int) -> np.ndarray:
    """Aligned minus true time of everything that a rank recorded."""
    log = run.ranks[rank]
    calls = clocks.to_origin(rank, log.calls[:, ISSUE]) + clocks.origin - truth.calls[rank][:, ISSUE]
    spans = clocks.to_origin(rank, log.spans[:, START]) + clocks.origin - truth.spans[rank][:, START]
    return np.concatenate([calls, spans])


def row(clocks: Clocks, rank: int) -> dict[str, Any]:
    return next(one for one in clocks.table if one["rank"] == rank)


# --- offset and drift -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [(0, 0), (20_000, 20_000), (-20_000, 20_000), (20_000, -20_000), (-7_000, 3_000)])
@pytest.mark.parametrize("drift", [0.0, 40.0, -300.0])
def test_three_seconds_and_a_drift_are_recovered_within_the_printed_error(
    drift: float, wrong: tuple[int, int], tmp_path: Path
) -> None:
    truth = write(tmp_path, FAR, clocks={3: Clock(3 * SECOND, drift, 20_000, wrong)}, ranks_per_host=1)
    run = load(tmp_path)
    clocks = align(run)
    found = row(clocks, 3)
    # the readings are a second before the first step and behind the last
    assert run.problems == [] and 0 < found["error_s"] <= 20e-6 + 1.1 * WANDER
    assert np.abs(errors_ns(run, clocks, truth, 3)).max() <= found["error_s"] * 1e9 + 1
    apart = truth.clocks[3].raw(truth.calls[3][0, ISSUE]) - truth.calls[3][0, ISSUE]
    assert found["offset_s"] == pytest.approx(-apart / 1e9, abs=found["error_s"] + 1e-7)
    between = 1 + (max(truth.starts.values()) - truth.starts[1]) / SECOND + 1  # s from one reading to the other
    assert found["drift_ppm"] == pytest.approx(-drift, abs=0.05 * abs(drift) / 40 + 2 * 20e-6 / between * 1e6 + 0.01)
    assert np.abs(errors_ns(run, clocks, truth, 4)).max() <= 1


def test_right_clocks_are_exact_and_nothing_is_shifted(tmp_path: Path) -> None:
    truth = write(tmp_path, FAR, clocks={rank: Clock(rank * SECOND, 2.5 * rank) for rank in range(1, 8)})
    run = load(tmp_path)
    clocks = align(run)
    match(run, clocks)
    assert clocks.largest_repair_s == 0.0 and run.problems == []
    for rank in range(8):
        assert np.abs(errors_ns(run, clocks, truth, rank)).max() <= 2  # readings and rows are whole ns


def test_all_times_lie_behind_the_origin(tmp_path: Path) -> None:
    write(tmp_path, FAR, clocks={3: Clock(-3 * SECOND)})
    run = load(tmp_path)
    clocks = align(run)
    earliest = min(int(clocks.to_origin(rank, log.calls[:, ISSUE]).min()) for rank, log in run.ranks.items())
    assert 20_000 < earliest < SECOND


def test_one_reading_is_a_constant_whose_error_grows(tmp_path: Path) -> None:
    truth = write(tmp_path, FAR, clocks={3: Clock(3 * SECOND, 30.0, readings=1)})
    run = load(tmp_path)
    clocks = align(run)
    found = row(clocks, 3)
    passed = (truth.spans[3][-1, START] - truth.starts[1] + SECOND) / 1e9
    assert found["drift_ppm"] is None
    assert found["error_s"] == pytest.approx(20e-6 + UNKNOWN_DRIFT * passed, rel=0.01)
    assert np.abs(errors_ns(run, clocks, truth, 3)).max() <= found["error_s"] * 1e9


def test_no_reading_but_a_neighbour_on_the_same_host(tmp_path: Path) -> None:
    """Ranks 4 to 7 share a host and its clock."""
    planted = {rank: Clock(9 * SECOND, 20.0, readings=0 if rank == 6 else 2) for rank in range(4, 8)}
    truth = write(tmp_path, FAR, clocks=planted, ranks_per_host=4)
    run = load(tmp_path)
    clocks = align(run)
    assert clocks.usable(6) and run.problems == []
    assert np.abs(errors_ns(run, clocks, truth, 6)).max() <= 1 and row(clocks, 6)["drift_ppm"] == pytest.approx(
        -20, 0.01
    )


def test_no_reading_on_the_host_of_rank_0(tmp_path: Path) -> None:
    truth = write(tmp_path, FAR, clocks={rank: Clock(readings=0) for rank in range(8)})
    run = load(tmp_path)
    clocks = align(run)
    assert all(clocks.usable(rank) for rank in range(8))
    assert max(np.abs(errors_ns(run, clocks, truth, rank)).max() for rank in range(8)) == 0


def test_no_reading_at_all_is_not_usable(tmp_path: Path) -> None:
    write(tmp_path, FAR, clocks={rank: Clock(9 * SECOND, readings=0) for rank in (5, 6)}, ranks_per_host=1)
    run = load(tmp_path)
    clocks = align(run)
    assert [rank for rank in run.ranks if not clocks.usable(rank)] == [5, 6]
    assert run.problems == ["ranks 5-6: no clock reading; the time that other ranks waited for them is not known"]
    assert row(clocks, 5) == {"rank": 5, "offset_s": None, "drift_ppm": None, "error_s": None, "repaired_s": None}
    assert int(clocks.to_origin(5, run.ranks[5].spans[:, START]).min()) == 0
    calls, meetings = match(run, clocks)
    assert (calls.meeting[calls.of(5)] == -1).all() and (calls.meeting[calls.of(4)] >= 0).all()
    world = meetings.size == 8
    assert world.any() and not meetings.complete[world].any() and (meetings.members[world] == 6).all()


def test_readings_that_contradict_each_other(tmp_path: Path) -> None:
    write(tmp_path, FAR, clocks={3: Clock(wrong_ns=(0, 50_000_000))})
    run = load(tmp_path)
    clocks = align(run)
    assert run.problems == ["rank 3: its two clock readings contradict each other; only the first is used"]
    assert row(clocks, 3)["drift_ppm"] is None and clocks.usable(3)


@pytest.mark.parametrize("error", [-1, 11 * SECOND])
def test_a_reading_of_no_use_is_none(error: int, tmp_path: Path) -> None:
    write(tmp_path, FAR, clocks={3: Clock(error_ns=error)}, ranks_per_host=1)
    run = load(tmp_path)
    assert not align(run).usable(3)


def test_a_rank_without_rows_has_a_clock(tmp_path: Path) -> None:
    write(tmp_path, small("parallel.dp=2", window=None))
    run = load(tmp_path)
    clocks = align(run)
    calls, meetings = match(run, clocks)
    assert len(calls) == len(meetings) == 0 and row(clocks, 1)["offset_s"] == 0.0
    first = clocks.to_origin(1, np.array([run.ranks[1].steps[0]["start_ns"]]))
    assert 0 < int(first[0]) < SECOND


def test_rank_0_may_be_missing(tmp_path: Path) -> None:
    truth = write(tmp_path, FAR, clocks={rank: Clock(rank * SECOND) for rank in range(8)})
    (tmp_path / "events.rank0.jsonl").unlink()
    run = load(tmp_path)
    clocks = align(run)
    assert np.abs(errors_ns(run, clocks, truth, 5)).max() <= 1


# --- causality ------------------------------------------------------------------------------------------------------


def impossible(calls: Calls, meetings: Meetings) -> int:
    """Calls that know of an end before the message was sent, or before the last one had come."""
    sent = np.full(len(meetings), np.iinfo(np.int64).min)
    cause = (calls.op != RECV) & (calls.meeting >= 0)
    np.maximum.at(sent, calls.meeting[cause], calls.issue[cause])
    seen = (calls.op != SEND) & (calls.done >= 0) & (calls.meeting >= 0)
    return int((calls.done[seen] < sent[calls.meeting[seen]]).sum())


def unrepaired(run: Run, clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> int:
    """Impossible calls where nothing is repaired."""
    with monkeypatch.context() as patched:
        patched.setattr("dist_gpt.report.analysis.match.repair", lambda heard, errors: np.zeros(len(errors), np.int64))
        patched.setattr("dist_gpt.report.analysis.match._clamp", lambda *_: None)
        return impossible(*match(run, clocks))


SKEWS = {
    "one rank ahead": {3: Clock(3 * SECOND, 10.0, wrong_ns=(15_000, 15_000))},
    "one rank behind": {3: Clock(3 * SECOND, 10.0, wrong_ns=(-15_000, -15_000))},
    "two against each other": {2: Clock(wrong_ns=(12_000, 12_000)), 5: Clock(wrong_ns=(-14_000, -14_000))},
    "growing": {3: Clock(SECOND, -40.0, wrong_ns=(-2_000, 18_000))},
    "everybody": {rank: Clock(wrong_ns=(2_500 * rank, 2_500 * rank)) for rank in range(1, 8)},
}


@pytest.mark.parametrize("name", SKEWS)
def test_small_errors_are_repaired_within_the_readings_errors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, FAR, Times(latency=1_000, ns_per_byte=0.1, jitter=0.3), clocks=SKEWS[name])
    run = load(tmp_path)
    assert unrepaired(run, align(run), monkeypatch) > 0
    clocks = align(run)
    calls, meetings = match(run, clocks)
    assert run.problems == [] and impossible(calls, meetings) == 0
    assert 0 < clocks.largest_repair_s <= 20e-6
    assert all(abs(one["repaired_s"]) <= one["error_s"] for one in clocks.table)
    assert row(clocks, 0)["repaired_s"] == 0.0
    assert np.array_equal(calls.issue[calls.of(3)], clocks.to_origin(3, np.sort(run.ranks[3].calls[:, ISSUE])))


def test_what_the_errors_do_not_explain_is_clamped_and_told(tmp_path: Path) -> None:
    wrong = Clock(error_ns=5_000, wrong_ns=(90_000, 90_000))
    write(tmp_path, FAR, Times(latency=1_000, ns_per_byte=0.1), clocks={3: wrong})
    run = load(tmp_path)
    clocks = align(run)
    calls, meetings = match(run, clocks)
    assert impossible(calls, meetings) == 0 and abs(row(clocks, 3)["repaired_s"]) <= 5e-6
    (problem,) = run.problems
    assert "more than the errors of the clocks explain" in problem


def heard(*meetings: list[tuple[int, int, int, str]]) -> Heard:
    """Meetings of (clock, issue, complete, what): c for a cause, e for an effect, ce for both."""
    rows = [(number, *one) for number, meeting in enumerate(meetings) for one in meeting]
    meeting, clock, issue, complete = (np.array([one[i] for one in rows], dtype=np.int64) for i in range(4))
    cause, effect = (np.array([letter in one[4] for one in rows], dtype=bool) for letter in "ce")
    return Heard(np.flatnonzero(np.diff(meeting, prepend=-1)), meeting, clock, issue, complete, cause, effect)


def message(sender: int, sent: int, receiver: int, received: int) -> list[tuple[int, int, int, str]]:
    return [(sender, sent, -1, "c"), (receiver, 0, received, "e")]


def shifts(*meetings: list[tuple[int, int, int, str]], errors: tuple[int, ...]) -> list[int]:
    return repair(heard(*meetings), np.array(errors, dtype=np.int64)).tolist()


def test_nothing_wrong_nothing_shifted() -> None:
    assert shifts(message(0, 100, 1, 100), message(1, 50, 0, 120), errors=(9, 9)) == [0, 0]
    assert repair(heard(), np.array([5, 5])).tolist() == [0, 0]


def test_a_clock_without_error_does_not_move() -> None:
    assert shifts(message(0, 100, 1, 80), errors=(0, 50)) == [0, 21]
    assert shifts(message(1, 100, 0, 80), errors=(0, 50)) == [0, -21]
    assert shifts(message(0, 100, 1, 80), errors=(0, 0)) == [0, 0]


def test_the_less_certain_clock_moves_more() -> None:
    """Least sum of (shift / error)^2: shares as the squares of the errors, 4 to 1."""
    assert shifts(message(0, 100, 1, 51), errors=(100, 50)) == [-40, 10]


def test_no_shift_is_beyond_its_error_and_the_others_make_up_for_it() -> None:
    assert shifts(message(0, 100, 1, 1), errors=(95, 20)) == [-95, 5]
    assert shifts(message(0, 100, 1, 1), errors=(30, 20)) == [0, 0]  # no matter of clocks


def test_a_chain_of_messages() -> None:
    found = shifts(message(0, 100, 1, 90), message(1, 200, 2, 190), message(2, 300, 3, 290), errors=(0, 99, 99, 99))
    assert found == [0, 11, 22, 33]


def test_a_shift_may_ask_for_another_one() -> None:
    assert shifts(message(0, 100, 1, 80), message(1, 200, 2, 205), errors=(0, 99, 99)) == [0, 21, 17]
    assert shifts(message(0, 100, 1, 80), message(1, 200, 2, 225), errors=(0, 99, 99)) == [0, 21, 0]


def test_messages_both_ways_leave_room_or_none() -> None:
    assert shifts(message(0, 100, 1, 90), message(1, 200, 0, 230), errors=(0, 99)) == [0, 11]
    both = shifts(message(0, 100, 1, 90), message(1, 200, 0, 190), errors=(10, 10))  # no shift helps
    assert max(map(abs, both)) <= 10


def test_a_collective_ends_for_nobody_before_its_last_one_came() -> None:
    together = [(0, 10, 205, "ce"), (1, 200, 210, "ce"), (2, 20, 195, "ce")]
    found = shifts(together, errors=(0, 40, 40))
    assert found == [0, -3, 3]
    moved = [(clock, issue + found[clock], end + found[clock]) for clock, issue, end, _ in together]
    assert min(end for _, _, end in moved) >= max(issue for _, issue, _ in moved)


def test_another_one_may_be_the_last_after_a_shift() -> None:
    together = [(0, 0, 180, "ce"), (1, 200, 300, "ce"), (2, 195, 300, "ce")]
    found = np.array(shifts(together, errors=(0, 40, 40)))
    assert found.tolist() == [0, -21, -16]


def test_damaged_rows_do_not_move_clocks_far(tmp_path: Path) -> None:
    write(tmp_path, FAR)

    def late(lines: list[str]) -> list[str]:
        at = next(i for i, line in enumerate(lines) if line.startswith("[1,3,"))
        parts = lines[at].split(",")
        return [*lines[:at], ",".join([*parts[:6], str(int(parts[6]) + 10**15), *parts[7:]]), *lines[at + 1 :]]

    edit(tmp_path, 3, late)
    run = load(tmp_path)
    clocks = align(run)
    match(run, clocks)
    assert all(abs(one["repaired_s"]) <= one["error_s"] for one in clocks.table) and run.problems
