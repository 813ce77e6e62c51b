"""Explanations of deaths and hangs, on tables of what ranks said last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from dist_gpt.layout import Layout
from launch.monitor.diagnose import Explanation, RankState, explain, where_it_was
from launch.monitor.wait_graph import Channel, Waiting

LAYOUT = Layout(pp=2, dp=2, cp=1, tp=2)
NOW = 1000.0
AXES = ("world", "dp", "tp")


def name(rank: int) -> str:
    return f"rank {rank} ({LAYOUT.coords(rank)})"


def channels(rank: int, layout: Layout = LAYOUT) -> tuple[Channel, ...]:
    """The groups of `rank` and its pipeline edges, in the order of the mesh."""
    found: list[Channel] = [(axis, layout.group(axis, rank), "") for axis in AXES]
    pair = layout.group("pp", rank)
    found += [("pp", pair, "f"), ("pp", pair[::-1], "b")]
    return tuple(found)


def position(
    rank: int, axis: str, seq: int, state: str = "waiting", op: str = "all_reduce", way: str = "", full: int = 10
) -> dict[str, Any]:
    """Everybody issued `full` calls on all groups, but `seq` on this one."""
    channel = AXES.index(axis) if axis in AXES else len(AXES) + (way == "b")
    counts = [full] * (len(AXES) + 2)
    counts[channel] = seq
    return {"step": 7, "phase": "train", "action": "forward block 1", "axis": axis, "op": op, "seq": seq,
            "channel": channel, "state": state, "counts": counts, "calls": sum(counts)}  # fmt: skip


class Table:
    """8 ranks on 2 hosts; all wait well in tp call 10, and beat."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        for rank in range(LAYOUT.world):
            hello = {"host": f"node{rank // 4}", "pid": 100 + rank, "node": rank // 4, "local_rank": rank % 4}
            self.rows[rank] = {"rank": rank, "hello": hello, "joined": 1.0, "heard": NOW - 0.1, "moved": NOW - 0.3,
                               "channels": channels(rank), "position": position(rank, "tp", 10, "computing"),
                               "unacknowledged": False}  # fmt: skip

    def set(self, *ranks: int, **values: Any) -> Table:
        for rank in ranks:
            self.rows[rank] |= values
        return self

    def at(self, rank: int, *args: Any, **kwargs: Any) -> Table:
        return self.set(rank, position=position(rank, *args, **kwargs))

    def fail(self, rank: int, when: float, inside: bool, text: str = "RuntimeError: closed by peer") -> Table:
        here = self.rows[rank]["position"]
        return self.set(rank, failed={"error": text, "inside": inside, "position": here}, failed_at=when)

    def states(self) -> list[RankState]:
        return [RankState(**row) for row in self.rows.values()]

    def explain(self, **more: Any) -> Explanation | None:
        return explain(self.states(), NOW, name, watch_host="node0", **more)

    def found(self, **more: Any) -> Explanation:
        found = self.explain(**more)
        assert found is not None
        return found


def hung_on(victim: int, state: str = "computing") -> Table:
    """All ranks wait, directly or not, for `victim`, which issued one call less on all its groups."""
    table = Table()
    partner, mate = LAYOUT.group("tp", victim), LAYOUT.group("pp", victim)
    for rank in range(LAYOUT.world):
        if rank == victim:
            counts = [9] * 5
            table.at(rank, "tp", 9, state)
            table.rows[rank]["position"]["counts"] = counts
        elif rank in partner:
            table.at(rank, "tp", 10)
        elif rank in mate:
            table.at(rank, "pp", 10, op="recv", way="f" if mate.index(rank) else "b")
        else:
            table.at(rank, "dp" if rank in LAYOUT.group("dp", victim) else "world", 11)
    return table


def test_nothing_wrong() -> None:
    assert Table().explain() is None
    assert explain([RankState(0), RankState(1)], NOW, name) is None
    assert Table().set(*range(8), bye=0, closed=NOW - 1.0).explain() is None


def test_an_error_of_several_lines_is_told_whole() -> None:
    """As that of memory that ran out, whose last lines say what would fit."""
    lines = ["MemoryError: no room", "  would fit:", *(f"  --set a={i}: {i} GB" for i in range(4))]
    found = Table().fail(3, NOW - 0.5, inside=False, text="\n".join(lines)).found()
    assert "failed: MemoryError: no room" in found.text
    for line in lines[1:]:
        assert f"\n    {line.strip()}" in found.text


@pytest.mark.parametrize("victim", range(8))
def test_a_death_beats_the_errors_of_its_peers(victim: int) -> None:
    table = hung_on(victim).set(victim, closed=NOW - 0.5)
    for rank in set(range(8)) - {victim}:
        table.fail(rank, NOW - 0.6 if rank % 2 else NOW - 0.4, inside=True)  # some even before it was seen
    found = table.found(exits={victim: "killed by SIGKILL"})
    assert (found.kind, found.culprits) == ("died", [victim])
    assert name(victim) in found.text and f"pid {100 + victim}" in found.text and "killed by SIGKILL" in found.text
    assert "in step 7, train, forward block 1" in found.text
    waiter = next(r for r in LAYOUT.group("tp", victim) if r != victim)
    assert f"rank {waiter} in tp all_reduce number 10" in found.text
    assert "failed because of it: ranks " in found.text


def test_an_error_of_its_own_beats_consequences_and_later_deaths() -> None:
    table = hung_on(5).fail(5, NOW - 0.5, inside=False, text="ValueError: bad\nshape")
    table.fail(4, NOW - 0.7, inside=True).set(6, closed=NOW - 0.1)
    found = table.found()
    assert (found.kind, found.culprits) == ("failed", [5])
    assert "ValueError: bad shape" in found.text and "failed because of it: ranks 4, 6" in found.text


def test_leaving_when_told_is_no_death() -> None:
    assert Table().set(*range(8), dismissed=True, closed=NOW).explain() is None


@pytest.mark.parametrize("victim", range(8))
def test_a_stopped_rank_is_named_whoever_times_out_first(victim: int) -> None:
    silent = hung_on(victim, "waiting").set(victim, heard=NOW - 31.0, silent=True)
    found = silent.found()
    assert (found.kind, found.culprits) == ("stopped", [victim])
    assert "no heartbeat for 31 s" in found.text and "SIGSTOP" in found.text
    early = hung_on(victim).set(victim, heard=NOW - 5.0)
    assert early.explain() is None  # not yet silent
    early.fail((victim + 1) % 8, NOW - 0.1, inside=True)
    found = early.found()
    assert (found.kind, found.culprits) == ("stopped", [victim])


def test_stopped_in_the_middle_of_a_collective_that_all_have_issued() -> None:
    table = Table()
    for rank in range(8):
        table.at(rank, "world", 11)
    table.set(3, heard=NOW - 6.0).fail(0, NOW - 0.1, inside=True)
    found = table.found()
    assert (found.kind, found.culprits) == ("stopped", [3])
    assert "rank 0 in world all_reduce number 11" in found.text


def test_a_stopped_rank_that_others_waited_for_at_the_store() -> None:
    table = Table().set(3, heard=NOW - 6.0).fail(0, NOW - 0.1, inside=True, text="RendezvousError: rank 3 did not")
    assert (table.found().kind, table.found().culprits) == ("stopped", [3])
    found = Table().set(3, position=None).fail(0, NOW, inside=True, text="RendezvousError: rank 3 did not").found()
    assert (found.kind, found.culprits) == ("stopped", [3])
    assert "no heartbeat since it connected 999 s ago" in found.text
    assert Table().set(3, position=None).explain() is None
    well = Table().fail(0, NOW - 0.1, inside=True, text="RendezvousError: rank 3 did not")
    assert (well.found().kind, well.found().culprits) == ("failed", [0])


def test_a_cut_host_is_a_link_and_no_rank() -> None:
    table = Table()
    for rank in range(8):
        table.at(rank, "world", 11)
    table.set(4, 5, 6, 7, heard=NOW - 31.0, silent=True, unacknowledged=True)
    found = table.found()
    assert (found.kind, found.culprits, found.pairs) == ("link", [], [("node0", "node1")])
    assert "node0 and node1 cannot reach each other" in found.text and "ranks 4, 5, 6, 7 on node1" in found.text
    assert "stopped" not in found.text and "died" not in found.text
    table.set(4, 5, 6, 7, silent=False, heard=NOW - 8.0).fail(0, NOW - 0.2, inside=True)  # time-outs come first
    assert table.found().kind == "link"
    table.set(4, 5, 6, 7, unacknowledged=False)  # all stopped, and their kernels answer
    found = table.found()
    assert (found.kind, found.culprits) == ("stopped", [4, 5, 6, 7])


def test_a_link_between_two_hosts_that_both_reach_the_launcher() -> None:
    table = Table()
    for rank in range(8):
        table.at(rank, "world", 11)
    table.set(*range(8), moved=NOW - 400.0)
    broken = {("node0", "node1"): True, ("node1", "node2"): False}
    found = table.found(pairs=broken)
    assert (found.kind, found.pairs) == ("link", [("node1", "node2")])
    table.set(*range(8), moved=NOW - 3.0)
    assert table.explain(pairs=broken) is None  # all is well as long as they come on
    table.fail(0, NOW, inside=True)
    assert table.found(pairs=broken).kind == "link"


@pytest.mark.parametrize("victim", range(8))
def test_stuck_names_the_root_of_the_waiting_graph(victim: int) -> None:
    table = hung_on(victim).set(*range(8), moved=NOW - 301.0)
    found = table.found()
    assert (found.kind, found.culprits) == ("stuck", [victim])
    assert "is stuck for 301 s: it is computing but making no progress" in found.text
    assert table.set(victim, moved=NOW - 1.0).explain() is None  # it comes on
    assert table.set(victim, moved=NOW - 61.0).explain(stuck_s=60.0) is not None


@pytest.mark.parametrize("victim", range(8))
def test_time_outs_alone_lead_to_who_is_behind(victim: int) -> None:
    table = hung_on(victim)
    for rank in set(range(8)) - {victim}:
        table.set(rank, then=table.rows[rank]["position"]).fail(rank, NOW - 1.0 + rank / 10, inside=True)
    table.set(victim, then=table.rows[victim]["position"])
    table.at(victim, "tp", 10).fail(victim, NOW, inside=True)  # it came at last, and found the others gone
    found = table.found()
    assert (found.kind, found.culprits) == ("stuck", [victim])


def test_an_error_of_the_collective_itself_is_the_first_ones() -> None:
    table = Table()
    for rank in range(8):
        table.at(rank, "world", 11)
    table.fail(2, NOW - 1.0, inside=True, text="RuntimeError: sizes differ").fail(1, NOW - 0.5, inside=True)
    found = table.found()
    assert (found.kind, found.culprits) == ("failed", [2]) and "sizes differ" in found.text


def test_a_circle_names_its_ranks() -> None:
    """Two ranks that issued their groups in different orders."""
    keys: tuple[Channel, ...] = (("tp", (0, 1), ""), ("dp", (0, 1), ""))
    here: dict[str, Any] = {"state": "waiting", "channel": 0, "seq": 1, "counts": [1, 0], "axis": "tp", "op": "x"}
    waiting = Waiting({0: keys, 1: keys}, {0: here, 1: here | {"channel": 1, "counts": [0, 1]}}, ())
    assert waiting.roots() == [0, 1]


def test_many_waiters_are_counted() -> None:
    layout = Layout(dp=64)
    keys = (("world", layout.group("world", 0), ""),)
    states = []
    for rank in range(64):
        done = 4 if rank == 9 else 5
        here = {"step": 1, "phase": "train", "action": "a", "axis": "world", "op": "all_reduce", "seq": done,
                "channel": 0, "state": "computing" if rank == 9 else "waiting", "counts": [done]}  # fmt: skip
        states.append(RankState(rank, {"host": "h", "pid": 1}, (), 0.0, NOW, here, None, NOW - 400, keys))
    found = explain(states, NOW, lambda rank: f"rank {rank}")
    assert found is not None and found.culprits == [9] and "; 55 more" in found.text


BIG = Layout(pp=8, dp=32, cp=1, tp=8)


def crowd(trouble: str) -> list[RankState]:
    """2048 ranks, as the watch tells of them: those of a group share its list. `trouble`: "", "died", "stuck",
    "circle" (half of them wait in the world's call, half in the dp groups', for each other)."""
    lists: dict[tuple[int, ...], tuple[int, ...]] = {}
    victim, states = 700, []
    for rank in range(BIG.world):
        keys = tuple((axis, lists.setdefault(ranks, ranks), way) for axis, ranks, way in channels(rank, BIG))
        here = position(rank, "world", 11) if trouble else position(rank, "tp", 10, "computing")
        if trouble == "circle" and BIG.coords(rank).dp % 2:
            here = position(rank, "dp", 11)
        if trouble and rank == victim:
            here = position(rank, "tp", 10, "computing") if trouble != "circle" else here
        hello = {"host": f"node{rank // 8}", "pid": rank}
        closed = NOW - 0.5 if trouble == "died" and rank == victim else None
        moved = NOW - (400.0 if trouble in ("stuck", "circle") else 0.3)
        states.append(RankState(rank, hello, (), 1.0, NOW - 0.1, here, None, moved, keys, closed=closed))
    return states


@pytest.mark.parametrize(("trouble", "culprits"), [("died", [700]), ("stuck", [700]), ("circle", range(2048))])
def test_thousands_of_ranks_are_explained_in_time(trouble: str, culprits: Sequence[int]) -> None:
    states = crowd(trouble)
    begun = time.process_time()
    found = explain(states, NOW, lambda rank: f"rank {rank}")
    took = time.process_time() - begun  # well under 1 s; a quadratic search would take minutes
    assert found is not None and found.culprits == [*culprits] and took < 20.0, (found, took)


def test_nothing_is_worked_out_where_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked five times a second."""
    monkeypatch.setattr("launch.monitor.diagnose.Waiting", None)
    assert explain(crowd(""), NOW, lambda rank: f"rank {rank}") is None


def test_where_it_was() -> None:
    assert where_it_was(None) == "before its first heartbeat"
    assert where_it_was(position(0, "tp", 3, "issuing")).endswith("issuing tp all_reduce number 3")
    nothing = {"step": None, "phase": "control", "action": "", "axis": "", "op": "", "state": "computing"}
    assert where_it_was(nothing) == "before the first step, control: no collective so far"
