"""The watch with real sockets: small ranks on threads, and real processes that are stopped and killed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dist_gpt.awake import AwakeClock
from dist_gpt.train.heartbeat import STARTING
from launch.monitor import heartbeat_server as watch_module
from launch.monitor.diagnose import RankState, explain
from launch.monitor.heartbeat_server import Watch
from tests.patience import PATIENCE_S


class FakeRank:
    """One end of a connection, by hand."""

    def __init__(self, watch: Watch, rank: int, host: str = "here", token: str | None = None) -> None:
        self.rank, self.mark = rank, 0
        address, port = watch.address.rsplit(":", 1)
        self.link = socket.create_connection((address, int(port)))
        self.link.settimeout(PATIENCE_S)
        self.file = self.link.makefile("rb")
        token = watch.token if token is None else token
        self.say(hello={"token": token, "rank": rank, "world": watch.world, "local_rank": rank, "local_world": 1,
                        "node": 0, "host": host, "pid": 1, "facts": {"cores": 2}})  # fmt: skip

    def say(self, **message: Any) -> None:
        self.link.sendall(json.dumps(message).encode() + b"\n")

    def beat(self, **position: Any) -> None:
        self.say(beat={"step": 1, "state": "computing", "counts": [], "calls": 0} | position)

    def told(self) -> Any:
        line = self.file.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        self.file.close()
        self.link.close()


def until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "did not come in time"
        time.sleep(0.01)


@pytest.fixture
def make() -> Iterator[Callable[..., Watch]]:
    made: list[Watch] = []

    def build(*args: Any, **kwargs: Any) -> Watch:
        made.append(Watch("127.0.0.1", *args, **kwargs))
        return made[-1]

    yield build
    for watch in made:
        watch.close()


def test_hello_go_beat_and_bye(make: Callable[..., Watch]) -> None:
    events: list[int] = []
    watch = make(2, name="head", on_event=lambda: events.append(1))
    assert watch.name == "head" and watch.missing() == [0, 1]
    one = FakeRank(watch, 1)
    until(lambda: watch.missing() == [0])
    zero = FakeRank(watch, 0)
    until(lambda: not watch.missing())
    state = watch.states()[1]
    assert (state.host, state.pid, state.facts) == ("here", 1, {"cores": 2}) and "token" not in (state.hello or {})
    watch.go()
    assert zero.told() == one.told() == {"do": "go"}
    one.say(channels=[["tp", [0, 1], ""], ["world", "0:8:2", ""]], port=1)
    one.beat(calls=7)
    assert one.told() == {"do": "ok"}
    state = watch.states()[1]
    assert state.channels == (("tp", (0, 1), ""), ("world", (0, 2, 4, 6), ""))
    assert state.position and state.position["calls"] == 7
    watch.ask_stop()
    assert zero.told() == one.told() == {"do": "stop"}
    one.say(bye={"code": 75})
    one.close()
    until(lambda: watch.states()[1].closed)
    assert watch.states()[1].bye == 75 and not watch.states()[1].died and events
    zero.close()
    until(lambda: watch.states()[0].died)


def test_moved_is_when_the_position_changed(make: Callable[..., Watch]) -> None:
    watch = make(1)
    rank = FakeRank(watch, 0)
    rank.beat(calls=1)
    rank.told()
    before = watch.states()[0]
    time.sleep(0.05)
    rank.beat(calls=1)
    rank.told()
    after = watch.states()[0]
    assert after.moved == before.moved and (after.heard or 0) > (before.heard or 0)
    rank.beat(calls=2)
    rank.told()
    assert (watch.states()[0].moved or 0) > (after.moved or 0)
    rank.close()


def test_strangers_are_dropped(make: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "HELLO_S", 0.5)
    watch = make(2)
    stranger = FakeRank(watch, 0, token="wrong")
    assert stranger.told() is None
    address, port = watch.address.rsplit(":", 1)
    for text in (b"GET / HTTP/1.1\r\n", b'{"hello": 3}\n', b'{"beat": {}}\n', b"[" * 70000, b"\xff\n", b""):
        with socket.create_connection((address, int(port))) as link:
            link.settimeout(PATIENCE_S)
            try:
                link.sendall(text)
                assert link.recv(10) == b""  # the last one said nothing for HELLO_S
            except ConnectionError:
                pass
    assert watch.missing() == [0, 1]
    FakeRank(watch, 9).close()
    until(lambda: watch.states()[0].rivals)
    assert watch.states()[0].hello is None


def test_a_rank_that_comes_twice_is_kept_as_a_problem(make: Callable[..., Watch]) -> None:
    watch = make(2)
    first, second = FakeRank(watch, 0, "one"), FakeRank(watch, 0, "two")
    until(lambda: watch.states()[0].rivals)
    hosts = {watch.states()[0].host, watch.states()[0].rivals[0]["host"]}
    assert hosts == {"one", "two"} and watch.missing() == [1]
    second.close()
    time.sleep(0.1)
    assert watch.states()[0].closed is None
    first.close()


def test_leave_reaches_everybody_and_is_no_death(make: Callable[..., Watch]) -> None:
    watch = make(2)
    rank = FakeRank(watch, 0)
    until(lambda: watch.missing() == [1])
    watch.leave("rank 1 did not come")
    assert rank.told() == {"do": "leave", "why": "rank 1 did not come"}
    rank.close()
    until(lambda: watch.states()[0].closed)
    assert not watch.states()[0].died
    late = FakeRank(watch, 1)
    assert late.told()["do"] == "leave"
    late.close()


def test_positions_are_frozen_at_the_first_failure(make: Callable[..., Watch]) -> None:
    watch = make(2)
    ranks = [FakeRank(watch, r) for r in range(2)]
    for rank in ranks:
        rank.beat(calls=5)
        rank.told()
    ranks[0].say(failed={"error": "E: timed out", "inside": True, "position": {"calls": 6, "state": "waiting"}})
    until(lambda: watch.states()[0].failed)
    ranks[1].say(failed={"error": "E: closed", "inside": True, "position": {"calls": 9}})
    until(lambda: watch.states()[1].failed)
    zero, one = watch.states()
    assert zero.inside and zero.then and zero.then["calls"] == 6
    assert one.then and one.then["calls"] == 5 and one.position and one.position["calls"] == 9
    assert (zero.failed_at or 0) < (one.failed_at or 0)
    for rank in ranks:
        rank.close()


def test_64_ranks_quickly(make: Callable[..., Watch]) -> None:
    spent = time.process_time()
    watch = make(64)
    ranks = [FakeRank(watch, r, host=f"n{r // 8}") for r in range(64)]
    until(lambda: not watch.missing())
    watch.go()
    for rank in ranks:
        assert rank.told() == {"do": "go"}
        rank.beat()
    for rank in ranks:
        assert rank.told() == {"do": "ok"}
    assert all(s.position is not None for s in watch.states())
    assert time.process_time() - spent < 6.0
    for rank in ranks:
        rank.close()
    until(lambda: all(s.died for s in watch.states()))


def test_probe_asks_the_first_rank_of_every_host(make: Callable[..., Watch]) -> None:
    watch = make(3)
    ranks = [FakeRank(watch, r, host=host) for r, host in enumerate(("a", "a", "b"))]
    until(lambda: not watch.missing())
    assert watch.probe(0.1) == {}  # nobody can be reached yet
    for port, rank in enumerate(ranks):
        rank.say(channels=[], port=port + 1)
        rank.beat()
        rank.told()
    assert watch.probe(0.2) == {}  # nobody answered
    assert ranks[0].told() == {"do": "probe", "targets": {"b": ["127.0.0.1", 3]}}
    assert ranks[2].told() == {"do": "probe", "targets": {"a": ["127.0.0.1", 1]}}
    ranks[0].say(probe={"b": True})
    ranks[2].say(probe={"a": False})  # one way
    for rank in ranks:
        rank.close()


def test_hosts_are_asked_when_the_job_stands_still(make: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Later, when all have run into their time-outs, nobody would be left to ask."""
    monkeypatch.setattr(watch_module, "STILL_S", 1.2)
    monkeypatch.setattr(watch_module, "ASK_S", 0.1)
    watch = make(2)
    ranks = [FakeRank(watch, r, host=host) for r, host in enumerate("ab")]
    for rank in ranks:
        rank.say(channels=[], port=1)
    for n in range(3):
        for rank in ranks:
            rank.beat(calls=7)
            assert rank.told() == {"do": "ok"}, n  # not asked yet
        time.sleep(0.2)
    begun = time.monotonic()
    while (word := ranks[0].told()) == {"do": "ok"}:
        assert time.monotonic() - begun < PATIENCE_S
    assert word == {"do": "probe", "targets": {"b": ["127.0.0.1", 1]}}
    ranks[0].say(probe={"b": False})
    for rank in ranks:
        rank.say(failed={"error": "E: timed out", "inside": True, "position": None})
        rank.close()
    until(lambda: all(s.closed for s in watch.states()))
    assert watch.probe() == {("a", "b"): False}


RANK = """
    import os, socket, sys, time
    from dist_gpt.comm.ledger import Ledger
    from dist_gpt.train.heartbeat import Pulse
    from dist_gpt.train.preemption import Stop
    import json
    address, port, token, rank, host = sys.argv[1:]
    link = socket.create_connection((address, int(port)))
    hello = {"token": token, "rank": int(rank), "world": 2, "host": host, "pid": os.getpid(), "facts": {}}
    link.sendall(json.dumps({"hello": hello}).encode() + b"\\n")
    assert json.loads(link.makefile("rb", buffering=0).readline()) == {"do": "go"}
    ledger = Ledger({"world": 2})
    ledger.channel("world", (0, 1))
    with ledger.step("train", "forward", {}):
        if rank == "0":
            record = ledger.issue("world", "all_reduce", 4, 0)
            ledger.issued(record, None, emulated=False)
            ledger.waits(record)
        pulse = Pulse(Stop(), link, 30.0)
        pulse.follow(ledger)
        time.sleep(60)
"""


@pytest.fixture
def processes(make: Callable[..., Watch]) -> Iterator[tuple[Watch, list[subprocess.Popen[bytes]]]]:
    """Two real ranks that beat; rank 0 waits for rank 1."""
    watch = make(2, silence_s=2.5, name="here")
    address, port = watch.address.rsplit(":", 1)
    command = [sys.executable, "-c", textwrap.dedent(RANK), address, port, watch.token]
    started = [subprocess.Popen([*command, str(rank), f"h{rank}"]) for rank in range(2)]
    try:
        until(lambda: not watch.missing())
        watch.go()
        until(lambda: all(s.channels and s.position and s.position["phase"] == "train" for s in watch.states()))
        yield watch, started
    finally:
        for process in started:
            process.kill()
            process.wait()


class Hands:
    """Clock of a watch, set by hand in steps that are too short for a suspension."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.clock = AwakeClock(lambda: self.time, lambda: self.time)

    def pass_by(self, seconds: float) -> None:
        end = self.time + seconds
        while self.time < end:
            self.time = min(end, self.time + 0.9)
            self.clock.now()

    def suspend(self, seconds: float) -> None:
        self.time += seconds


def beat(watch: Watch, *ranks: FakeRank) -> None:
    """Send one heartbeat of each rank, and wait until the watch has read it and all that was sent before."""
    for rank in ranks:
        rank.beat()
        rank.mark += 1
        rank.say(channels=[], port=rank.mark)

    def has_read(rank: FakeRank) -> bool:
        line = watch._lines.get(rank.rank)
        return line is not None and line.port == rank.mark

    until(lambda: all(has_read(rank) for rank in ranks))


def two_that_beat(make: Callable[..., Watch], silence_s: float = 5.0) -> tuple[Watch, Hands, list[FakeRank]]:
    hands = Hands()
    watch = make(2, silence_s=silence_s, clock=hands.clock)
    ranks = [FakeRank(watch, r) for r in range(2)]
    beat(watch, *ranks)
    return watch, hands, ranks


@pytest.mark.parametrize("seconds", [3.0, 36.0, 700.0])
def test_a_suspension_is_no_silence(make: Callable[..., Watch], seconds: float) -> None:
    """Ranks may be continued later than the launcher; one that never continues is found all the same. Test it twice."""
    watch, hands, ranks = two_that_beat(make)
    for _ in range(2):
        hands.suspend(seconds)
        states = watch.states()
        assert not silent(states) and explain(states, watch.now(), told, stuck_s=60.0) is None
        hands.pass_by(min(seconds, 30.0) + 1.0)  # the others are continued only now
        assert explain(watch.states(), watch.now(), told, stuck_s=60.0) is None
        beat(watch, *ranks)
    hands.suspend(seconds)
    watch.now()
    hands.pass_by(min(seconds, 30.0) + 2.0)
    beat(watch, ranks[0])
    hands.pass_by(4.0)
    assert silent(watch.states()) == [1]
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("gap", [2.0, 40.0])
def test_a_rank_that_is_stopped_is_found_where_the_launcher_is_late_again_and_again(
    make: Callable[..., Watch], gap: float
) -> None:
    """Each time looks like a suspension, and excuses the rank anew."""
    watch, hands, ranks = two_that_beat(make)
    for _ in range(70):
        hands.suspend(gap)
        watch.now()
    beat(watch, ranks[0])
    assert silent(watch.states()) == [1]
    for rank in ranks:
        rank.close()


def test_a_rank_that_is_stopped_is_found_without_a_suspension(make: Callable[..., Watch]) -> None:
    watch, hands, ranks = two_that_beat(make)
    hands.pass_by(4.0)
    beat(watch, ranks[0])
    assert not silent(watch.states())
    hands.pass_by(2.0)
    assert silent(watch.states()) == [1]
    for rank in ranks:
        rank.close()


def test_whether_ranks_ran_on_shows_in_their_heartbeats(make: Callable[..., Watch]) -> None:
    watch, hands, ranks = two_that_beat(make)
    assert not watch.ran_on()
    for beats, ran in ((2, False), (60, True)):
        hands.suspend(36.0)
        watch.now()
        for _ in range(beats):
            ranks[0].beat()
        beat(watch, ranks[0])
        assert watch.ran_on() is ran
    for rank in ranks:
        rank.close()


def test_a_hello_that_waited_says_nothing_about_clocks(make: Callable[..., Watch]) -> None:
    hands = Hands()
    watch = make(2, clock=hands.clock)
    early = FakeRank(watch, 0)
    until(lambda: watch.missing() == [1])
    hands.suspend(36.0)
    watch.now()
    late = FakeRank(watch, 1)
    until(lambda: not watch.missing())
    assert watch.states()[0].arrived == pytest.approx(time.time(), abs=60.0) and watch.states()[1].arrived is None
    for rank in (early, late):
        rank.close()


def told(rank: int) -> str:
    return f"rank {rank}"


def silent(states: list[RankState]) -> list[int]:
    return [s.rank for s in states if s.silent]


def test_a_stopped_process_is_told_from_a_link_and_goes_on(processes: Any) -> None:
    watch, started = processes
    assert watch.probe() == {("h0", "h1"): True}
    started[1].send_signal(signal.SIGSTOP)
    until(lambda: silent(watch.states()))
    until(lambda: watch.states()[1].unacknowledged is not None)
    found = explain(watch.states(), time.monotonic(), told, watch_host="here")
    assert found is not None and (found.kind, found.culprits) == ("stopped", [1])
    assert f"pid {started[1].pid}" in found.text and "rank 0 in world all_reduce number 1" in found.text
    assert "though h1 answers" in found.text
    started[1].send_signal(signal.SIGCONT)
    until(lambda: not silent(watch.states()))
    assert explain(watch.states(), time.monotonic(), told, watch_host="here") is None


def test_one_that_is_stopped_before_it_has_groups_is_named_too(make: Callable[..., Watch]) -> None:
    watch = make(1, silence_s=1.0)
    rank = FakeRank(watch, 0)
    rank.say(beat=STARTING)
    until(lambda: silent(watch.states()))
    found = explain(watch.states(), time.monotonic(), told, watch_host="here")
    assert found is not None and (found.kind, found.culprits) == ("stopped", [0])
    assert "before the first step, starting: no collective so far" in found.text
    rank.close()


def test_a_killed_process_died(processes: Any) -> None:
    watch, started = processes
    started[1].send_signal(signal.SIGKILL)
    until(lambda: watch.states()[1].died)
    found = explain(watch.states(), time.monotonic(), told, {1: "killed by SIGKILL"}, watch_host="here")
    assert found is not None and (found.kind, found.culprits) == ("died", [1])
    assert "killed by SIGKILL" in found.text and "waited for by rank 0 in world all_reduce number 1" in found.text


def test_the_ranks_leave_when_the_watch_closes(processes: Any) -> None:
    watch, started = processes
    watch.close()
    for process in started:
        assert process.wait(5.0) == 1
