"""A step as a graph: hand-made cases to the nanosecond, and planted runs against the simulator that made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from dist_gpt.events import BOUND, EMULATED, OPS
from dist_gpt.layout import Layout
from dist_gpt.report.analysis.clocks import Clocks, align
from dist_gpt.report.analysis.match import Calls, Meetings, match
from dist_gpt.report.analysis.replay import Graph, Piece, ReplayError, build, critical_path, flatten, free_axes
from dist_gpt.report.read.load import RankLog, Run, load
from tests.unit.simulated import Late, Times
from tests.unit.synthetic import MS, Clock, small, write

STEP = 7
TP, DATA, FORWARD_EDGE = 0, 1, 2
"""Channels of the hand-made ranks; the last one is the edge from rank 0 to rank 1."""
FORWARD_0, BACKWARD_0 = 0, 6
"""Entries of the hand-made ranks' step list: forward 0F0 block 0, backward 0B0 block 5."""


class Hand(NamedTuple):
    """A hand-made rank: spans (index, from, to) and calls, in ms; one step from `start` to `end`."""

    calls: list[dict[str, Any]]
    end: float
    spans: tuple[tuple[int, float, float], ...] = ()
    start: float = 0.0


def call(
    op: str = "all_reduce", channel: int = TP, step: int = STEP, flags: int = 0, cpu: float = 0.0, **ms: float
) -> Any:
    """A call; `issue`, and `issued`, `done`, `wait`, `waited` as moments where they are known."""
    return {"op": op, "channel": channel, "step": step, "flags": flags, "cpu": cpu, **ms}


def ns(ms: float) -> int:
    return round(ms * MS)


def hand_made(*hands: Hand | None) -> tuple[Run, Clocks, Calls, Meetings]:
    """A run of ranks that share a clock; None is a rank without a file."""
    config = small("parallel.tp=2")
    run = Run(Path("."), config, {}, Layout(tp=2))
    channels = [{"axis": "tp"}, {"axis": "data"}, {"axis": "pp", "ranks": [0, 1], "direction": "f"}]
    for rank, hand in enumerate(hands):
        if hand is None:
            continue
        rows = []
        for c in hand.calls:
            after = [ns(c[key]) - ns(c["issue"]) if key in c else -1 for key in ("issued", "done", "wait", "waited")]
            at = [c["step"], 0, c["channel"], OPS.index(c["op"]), 8, ns(c["issue"])]
            rows.append([*at, *after, ns(c["cpu"]), c["flags"]])
        spans = hand.spans or ((FORWARD_0, hand.start, hand.end),)
        step_s = (hand.end - hand.start) / 1e3
        run.ranks[rank] = RankLog(
            rank=rank,
            header={"base_ns": 0, "host": "n0", "channels": channels},
            attempts=1,
            steps=[{"step": STEP, "phase": "train", "step_s": step_s, "start_ns": ns(hand.start)}],
            calls=np.array(rows, dtype=np.int64).reshape(-1, 12),
            spans=np.array([[STEP, i, ns(a), ns(b) - ns(a), 0] for i, a, b in spans], dtype=np.int64),
            clocks=[{"at_ns": 0, "offset_ns": 0, "error_ns": 0}],
            memory=None,
            kernels=[],
            ceiling=None,
            samples=[],
            torch_traces=[],
            differences=[],
            end=None,
        )
    clocks = align(run)
    return run, clocks, *match(run, clocks)


def graph_of(*hands: Hand | None) -> Graph:
    return build(*hand_made(*hands), STEP)


def path_ms(graph: Graph) -> dict[tuple[int, str], float]:
    return {(part["rank"], part["what"]): round(part["s"] * 1e3, 6) for part in critical_path(graph)}


def both_wait(first: float, second: float, transfer: float, end: float) -> list[Hand]:
    """Two ranks whose all-reduces are issued at `first` and `second`; both wait at once and compute until `end`."""
    over = max(first, second) + transfer
    return [
        Hand([call(issue=t, issued=t, wait=t, done=over, waited=over)], end, ((0, 0, t), (BACKWARD_0, t, end)))
        for t in (first, second)
    ]


# --- pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], []),
        ([(5, 9, "a")], [(5, 9, "a")]),
        ([(-9, -2, "a"), (-2, 3, "b")], [(-9, -2, "a"), (-2, 3, "b")]),
        ([(0, 10, "a"), (2, 4, "b"), (6, 6, "c")], [(0, 2, "a"), (2, 4, "b"), (4, 6, "a"), (6, 10, "a")]),
        ([(0, 10, "a"), (0, 3, "b"), (1, 2, "c")], [(0, 1, "b"), (1, 2, "c"), (2, 3, "b"), (3, 10, "a")]),
        ([(0, 4, "a"), (2, 8, "b"), (3, 5, "c")], [(0, 2, "a"), (2, 3, "b"), (3, 5, "c"), (5, 8, "b")]),
    ],
)
def test_nested_spans_become_pieces(spans: list[Any], expected: list[Any]) -> None:
    assert flatten(spans) == [Piece(*piece) for piece in expected]


# --- hand-made, exact -------------------------------------------------------------------------------------------------


def test_a_collective_ends_a_transfer_after_its_last_member() -> None:
    graph = graph_of(*both_wait(10, 30, transfer=5, end=45))
    replayed = graph.replay()
    assert replayed.step_s == graph.measured_s == 0.045
    assert replayed.end_s == {0: 0.045, 1: 0.045}
    assert graph.replay_error == 0
    assert graph.replay(frozenset({"tp"})).step_s == 0.040
    assert free_axes(graph) == [{"axis": "tp", "step_s": 0.040, "saving": pytest.approx(5 / 45)}]
    assert path_ms(graph) == {(1, "forward"): 30.0, (0, "transfer.tp"): 5.0, (0, "backward"): 10.0}


def test_shares_of_the_critical_path_are_of_the_step() -> None:
    parts = critical_path(graph_of(*both_wait(10, 30, transfer=5, end=45)))
    assert sum(part["s"] for part in parts) == pytest.approx(0.045)
    assert [part["share"] for part in parts] == pytest.approx([30 / 45, 10 / 45, 5 / 45])


def test_what_computing_hides_costs_nothing() -> None:
    hidden = [
        Hand([call(issue=t, issued=t, done=20, wait=30, waited=30)], 40, ((0, 0, 30), (BACKWARD_0, 30, 40)))
        for t in (10, 12)
    ]
    graph = graph_of(*hidden)
    assert graph.replay().step_s == 0.040
    assert free_axes(graph)[0]["saving"] == 0
    assert path_ms(graph) == {(0, "forward"): 30.0, (0, "backward"): 10.0}


def test_the_issuing_call_and_the_local_part_belong_to_the_transfer() -> None:
    """5 ms in the issuing call, 3 ms of summing after the end, then 1 ms until the rank went on."""
    slow = call(issue=10, issued=15, wait=15, done=20, waited=24, flags=EMULATED, cpu=3)
    graph = graph_of(Hand([slow], 30), Hand([call(issue=12, issued=12, wait=12, done=20, waited=20)], 21))
    assert graph.replay_error == 0
    assert path_ms(graph) == {
        (0, "transfer.tp"): 3.0 + 8.0,
        (0, "woken late"): 1.0,
        (1, "forward"): 12.0,
        (0, "forward"): 6.0,
    }
    assert graph.replay(frozenset({"tp"})).step_s == 0.030 - (8 + 3) / 1e3


def test_being_woken_late_is_no_transfer() -> None:
    late = [call(issue=t, issued=t, wait=t, done=20, waited=w) for t, w in ((10, 20), (9, 26))]
    graph = graph_of(Hand([late[0]], 21), Hand([late[1]], 30))
    assert path_ms(graph) == {
        (0, "forward"): 10.0,
        (1, "transfer.tp"): 10.0,
        (1, "woken late"): 6.0,
        (1, "forward"): 4.0,
    }
    assert graph.replay(frozenset({"tp"})).step_s == 0.020


@pytest.mark.parametrize(("gone", "step_ms"), [(12, 15), (35, 40)], ids=["there was room for it", "rendezvous"])
def test_a_send_waits_for_the_receiver_only_where_it_did(gone: float, step_ms: float) -> None:
    """The receiver is there at 30; without anything else the sender ends at 15, or 5 ms after the receiver took it."""
    sent = call("send", FORWARD_EDGE, issue=10, issued=10, wait=10, done=gone, waited=gone)
    taken = call("recv", FORWARD_EDGE, issue=30, issued=30, wait=30, done=35, waited=35, flags=BOUND)
    graph = graph_of(Hand([sent], step_ms), Hand([taken], 36))
    replayed = graph.replay()
    assert replayed.end_s == {0: step_ms / 1e3, 1: 0.036}
    at_once = graph.replay(frozenset({"pp"})).end_s
    assert at_once[0] == pytest.approx((30 if gone == 35 else 10) / 1e3 + (step_ms - gone) / 1e3)


def test_a_receiver_never_runs_ahead_of_its_sender() -> None:
    sent = call("send", FORWARD_EDGE, issue=20, issued=20, done=24)
    taken = call("recv", FORWARD_EDGE, issue=1, issued=1, wait=2, done=25, waited=25, flags=BOUND)
    graph = graph_of(Hand([sent], 22), Hand([taken], 30))
    assert graph.replay(frozenset({"pp"})).step_s == 0.026
    assert path_ms(graph) == {
        (0, "forward"): 20.0,
        (1, "transfer.pp"): 4.0,
        (1, "woken late"): 1.0,
        (1, "forward"): 5.0,
    }


def test_a_call_of_the_step_before_is_waited_for_as_it_was() -> None:
    early = call(step=STEP - 1, issue=-30, issued=-30, wait=5, done=8, waited=8)
    graph = graph_of(Hand([early], 10), Hand([early], 10))
    assert graph.replay().step_s == 0.010
    assert path_ms(graph) == {(0, "transfer.tp"): 8.0, (0, "forward"): 2.0}


def test_ranks_that_begin_later_are_told() -> None:
    """Rank 1 begins 4 ms after rank 0."""
    hands = both_wait(10, 30, transfer=5, end=45)
    graph = graph_of(hands[0], hands[1]._replace(start=4.0, spans=((0, 4, 30), (BACKWARD_0, 30, 45))))
    assert graph.replay_error == 0
    assert path_ms(graph)[1, "previous step"] == 4.0
    assert sum(path_ms(graph).values()) == pytest.approx(45)


def test_data_are_read_inside_an_entry_and_the_rest_is_unexplained() -> None:
    graph = graph_of(Hand([], 10, ((0, 1, 6), (-1, 2, 4), (BACKWARD_0, 6, 9))))
    assert path_ms(graph) == {(0, "unexplained"): 2.0, (0, "forward"): 3.0, (0, "data"): 2.0, (0, "backward"): 3.0}


def test_where_a_rank_is_missing_the_others_meet() -> None:
    graph = graph_of(both_wait(10, 30, transfer=5, end=45)[0], None)
    assert graph.ranks == [0]
    assert graph.replay().step_s == 0.045
    assert path_ms(graph) == {(0, "forward"): 10.0, (0, "transfer.tp"): 25.0, (0, "backward"): 10.0}


# --- damaged ----------------------------------------------------------------------------------------------------------


def test_records_that_contradict_each_other_end_with_an_error() -> None:
    """Each rank waits for one collective before it issues what the other one waits for."""
    first = [call(issue=20, issued=20), call("all_gather", DATA, issue=1, issued=1, wait=2, waited=10)]
    second = [call(issue=1, issued=1, wait=2, waited=10), call("all_gather", DATA, issue=20, issued=20)]
    run, clocks, calls, meetings = hand_made(Hand(first, 30), Hand(second, 30))
    calls.meeting[:] = [1, 0, 0, 1]  # as no order of calls on a channel could bring about
    with pytest.raises(ReplayError, match=r"step 7: .* rank 0 waits for its data all_gather, which ranks \[1\] issue"):
        build(run, clocks, calls, meetings, STEP).replay()


def test_a_step_that_nobody_recorded_is_an_error() -> None:
    run, clocks, calls, meetings = hand_made(*both_wait(10, 30, transfer=5, end=45))
    with pytest.raises(ReplayError, match="no rank recorded step 8"):
        build(run, clocks, calls, meetings, STEP + 1)


def test_rows_that_cannot_be_true_do_not_stop_a_replay() -> None:
    """Waits inside of each other, before the issue, and longer than the step."""
    strange = [
        call(issue=5, issued=4, wait=6, waited=25),
        call(issue=8, issued=9, wait=10, waited=12),
        call(issue=30, issued=31, wait=29, waited=70),
    ]
    graph = graph_of(Hand(strange, 40), None)
    assert graph.replay().step_s >= 0.040
    assert sum(path_ms(graph).values()) == pytest.approx(graph.replay().step_s * 1e3)


# --- planted runs -----------------------------------------------------------------------------------------------------

LAYOUTS = [
    ("parallel.tp=2",),
    ("parallel.dp=2", "parallel.tp=2", "parallel.sequence_parallel=true"),
    ("parallel.pp=2", "parallel.schedule=1f1b"),
    ("parallel.pp=2", "parallel.schedule=interleaved", "parallel.virtual_stages=2", "parallel.dp=2"),
    ("parallel.dp=2", "parallel.tp=2", "parallel.pp=2"),
]


def planted(folder: Path, *sets: str, **kinds: Any) -> tuple[Run, Clocks, Calls, Meetings]:
    write(folder / "run", small(*sets), **kinds)
    run = load(folder / "run")
    clocks = align(run)
    return run, clocks, *match(run, clocks)


@pytest.mark.parametrize("sets", LAYOUTS, ids=[" ".join(s.removeprefix("parallel.") for s in sets) for sets in LAYOUTS])
def test_a_replay_gives_the_measured_step(tmp_path: Path, sets: tuple[str, ...]) -> None:
    found = planted(tmp_path, *sets, times=Times(jitter=0.5), late=[Late(1, 5 * MS)])
    for step in (2, 3, 4):
        graph = build(*found, step)
        assert graph.replay_error < 1e-6
        assert sum(part["s"] for part in critical_path(graph)) == pytest.approx(graph.measured_s)


def test_clocks_that_are_a_little_wrong_change_a_replay_little(tmp_path: Path) -> None:
    wrong = {rank: Clock(3_000_000 * rank, 20.0, 50_000, (9_000 * rank, -9_000 * rank)) for rank in range(1, 4)}
    found = planted(tmp_path, "parallel.dp=2", "parallel.tp=2", times=Times(jitter=0.2), clocks=wrong, ranks_per_host=1)
    for step in (2, 3, 4):
        assert build(*found, step).replay_error < 0.01


@pytest.mark.parametrize("sets", LAYOUTS, ids=[" ".join(s.removeprefix("parallel.") for s in sets) for sets in LAYOUTS])
def test_free_messages_are_what_the_simulator_says_without_them(tmp_path: Path, sets: tuple[str, ...]) -> None:
    """The same run with messages that take no time, simulated anew."""
    costly = build(*planted(tmp_path / "a", *sets, times=Times(latency=100_000, ns_per_byte=20.0, issue=0)), 3)
    free = build(*planted(tmp_path / "b", *sets, times=Times(latency=0, ns_per_byte=0.0, issue=0)), 3)
    assert costly.replay(frozenset(costly.axis)).step_s == pytest.approx(free.measured_s, rel=0.01)
    assert costly.measured_s > 1.05 * free.measured_s


def test_a_planted_late_rank_is_on_the_critical_path(tmp_path: Path) -> None:
    """40 ms asleep before its forward, while seven others wait."""
    found = planted(tmp_path, *LAYOUTS[-1], late=[Late(5, 40 * MS)])
    first = critical_path(build(*found, 3))[0]
    assert (first["rank"], first["what"]) == (5, "forward")
    assert first["s"] == pytest.approx(0.040, abs=0.002)


def test_a_planted_slow_axis_is_what_freeing_it_saves(tmp_path: Path) -> None:
    found = planted(tmp_path, *LAYOUTS[-1], times=Times(latency=300_000))
    saving = {row["axis"]: row["saving"] for row in free_axes(build(*found, 3))}
    assert max(saving, key=lambda axis: saving[axis]) == "tp"
    assert saving["tp"] > 0.5
    assert all(value >= 0 for value in saving.values())
