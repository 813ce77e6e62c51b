"""Heartbeats of a rank, and where the ledger says that it is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

from dist_gpt.comm.ledger import Ledger
from dist_gpt.config.errors import ConfigError
from dist_gpt.train.heartbeat import Pulse, reach, short
from dist_gpt.train.preemption import Stop
from tests.patience import PATIENCE_S


def some_ledger() -> Ledger:
    ledger = Ledger({"tp": 2, "pp": 2})
    assert ledger.channel("tp", (0, 1)) == 0 and ledger.channel("pp", (0, 2), "f") == 1
    return ledger


def test_the_ledger_numbers_calls_by_group_and_tells_where_it_is() -> None:
    ledger = some_ledger()
    assert ledger.position()["state"] == "computing" and not ledger.in_collective
    ledger.begin(3)
    with ledger.step("train", "forward block 1", {("tp", "all_reduce", 8): 2, ("pp", "send", 4): 1}, 0):
        first = ledger.issue("tp", "all_reduce", 8, 0)
        assert ledger.position()["state"] == "issuing"
        ledger.issued(first, None, emulated=False)
        assert ledger.position()["state"] == "computing" and not ledger.in_collective
        ledger.issued(ledger.issue("pp", "send", 4, 1), None, emulated=False)
        second = ledger.issue("tp", "all_reduce", 8, 0)
        ledger.issued(second, None, emulated=False)
        assert (first.seq, second.seq) == (1, 2)
        ledger.waits(first)
        assert ledger.position() == {"step": 3, "phase": "train", "action": "forward block 1", "axis": "tp",
                                     "op": "all_reduce", "seq": 1, "channel": 0, "state": "waiting",
                                     "counts": [2, 1], "calls": 3}  # fmt: skip
        assert ledger.in_collective
        ledger.woken(first)
        ledger.waited(first)
    assert ledger.exact
    ledger.end()
    here = ledger.position()
    assert (here["step"], here["phase"], here["action"], here["state"]) == (3, "control", "", "computing")
    rows = [tuple(row.values()) for row in ledger.by_channel()]
    assert rows == [(0, "train", "all_reduce", 2, 16), (1, "train", "send", 1, 4)]
    assert ledger.counts("train").as_dict() == ledger.counts("train").copy().as_dict()


def test_an_error_leaves_the_place_where_it_happened() -> None:
    ledger = some_ledger()
    with pytest.raises(RuntimeError), ledger.step("train", "backward", {}), ledger.step("train", "inner", {}):
        record = ledger.issue("tp", "all_reduce", 8, 0)
        ledger.issued(record, None, emulated=False)
        ledger.waits(record)
        raise RuntimeError("timed out")
    assert ledger.position()["action"] == "inner" and ledger.in_collective


def test_position_may_be_asked_while_another_thread_issues() -> None:
    ledger, over = Ledger({"tp": 2}), threading.Event()

    def issue() -> None:
        n = 0
        while not over.is_set():
            n += 1
            channel = ledger.channel("tp", (0, n)) if n < 500 else n % 500
            with ledger.step("train", n, {}):
                record = ledger.issue("tp", "all_reduce", 8, channel)
                ledger.issued(record, None, emulated=False)
                ledger.waits(record)
                ledger.waited(record)

    thread = threading.Thread(target=issue)
    thread.start()
    try:
        for _ in range(2000):
            here = ledger.position()
            assert "not known" not in here["action"] and here["calls"] == sum(here["counts"])
    finally:
        over.set()
        thread.join()


def test_position_survives_a_name_that_cannot_be_written() -> None:
    class Bad:
        def __str__(self) -> str:
            raise ValueError

    ledger = some_ledger()
    with ledger.step("train", Bad(), {}):
        assert "not known" in ledger.position()["action"]


# --- the pulse ---------------------------------------------------------------------------------------------------


class Launcher:
    """The other end, by hand."""

    def __init__(self) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        self.rank_end = socket.create_connection(server.getsockname())
        self.link, _ = server.accept()
        server.close()
        self.link.settimeout(PATIENCE_S)
        self.file = self.link.makefile("rb")

    def next(self, key: str) -> Any:
        while True:
            message = json.loads(self.file.readline())
            if key in message:
                return message[key]

    def tell(self, **word: Any) -> None:
        self.link.sendall(json.dumps(word).encode() + b"\n")

    def close(self) -> None:
        self.file.close()
        self.link.close()


def test_without_a_watch_nothing_happens() -> None:
    pulse = Pulse.from_environ(Stop(), {})
    pulse.follow(some_ledger())
    pulse.failed(ValueError("x"))
    pulse.bye(0)
    pulse.close()
    Pulse.from_environ(Stop(), {"DIST_GPT_WATCH_FD": "nonsense"}).close()


def test_it_says_channels_beats_obeys_and_takes_its_leave() -> None:
    launcher, stop, ledger = Launcher(), Stop(), some_ledger()
    environ = {"DIST_GPT_WATCH_FD": str(launcher.rank_end.detach())}
    pulse = Pulse.from_environ(stop, environ)
    assert not environ
    assert json.loads(launcher.file.readline())["beat"]["phase"] == "starting"  # before there are groups
    pulse.follow(ledger)
    first = json.loads(launcher.file.readline())
    assert first["channels"] == [["tp", [0, 1], ""], ["pp", [0, 2], "f"]]
    assert reach({"a": ["127.0.0.1", first["port"]]}) == {"a": True}
    assert [launcher.next("beat")["calls"] for _ in range(3)] == [0, 0, 0]
    launcher.tell(do="probe", targets={"here": ["127.0.0.1", first["port"]], "odd": ["no address", 1]})
    assert launcher.next("probe") == {"here": True, "odd": False}
    launcher.link.sendall(b"nonsense\n[]\n{}\n")
    launcher.tell(do="stop")
    for _ in range(50):
        if stop.requested:
            break
        time.sleep(0.05)
    assert stop.requested == "asked by the launcher"
    pulse.failed(type("RendezvousError", (RuntimeError,), {})("others did not come"))
    assert launcher.next("failed")["inside"]
    pulse.failed(ValueError("x" * 100_000))
    failed = launcher.next("failed")
    assert not failed["inside"] and len(failed["error"]) < 10_000 and failed["code"] == 1
    pulse.failed(ConfigError(["optim.lr: got -1"]))
    assert launcher.next("failed")["code"] == 2  # whoever started the ranks may know only that they failed
    ledger.issue("tp", "all_reduce", 8, 0)
    pulse.failed(RuntimeError("timed out"))
    failed = launcher.next("failed")
    assert failed["error"] == "RuntimeError: timed out" and failed["inside"]
    assert (failed["position"]["seq"], failed["position"]["state"]) == (1, "issuing")
    pulse.bye(75)
    assert launcher.next("bye") == {"code": 75}
    pulse.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", first["port"]), timeout=1.0)
    assert launcher.file.readline() == b""
    launcher.close()


RANK = """
    import os, sys, time
    from dist_gpt.train.heartbeat import Pulse
    from dist_gpt.train.preemption import Stop
    pulse = Pulse.from_environ(Stop())
    time.sleep(60)
"""


def start(launcher: Launcher, silence_s: float = 30.0, code: str = RANK, *argv: str) -> subprocess.Popen[str]:
    number = launcher.rank_end.fileno()
    os.set_inheritable(number, True)
    env = os.environ | {"DIST_GPT_WATCH_FD": str(number), "DIST_GPT_SILENCE_S": str(silence_s)}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *argv], env=env, pass_fds=[number],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    launcher.rank_end.close()
    return process


@pytest.mark.parametrize("way", ["leave", "hang up", "silence", "stopped"])
def test_a_rank_leaves_with_its_launcher(way: str) -> None:
    launcher = Launcher()
    process = start(launcher, silence_s=1.5 if way in ("silence", "stopped") else 30.0)
    try:
        launcher.next("beat")
        if way == "leave":
            launcher.tell(do="leave", why="rank 3 died")
        elif way == "hang up":
            launcher.close()
        elif way == "stopped":  # a process that was stopped itself must not blame the launcher
            process.send_signal(signal.SIGSTOP)
            time.sleep(3.5)
            process.send_signal(signal.SIGCONT)
            for _ in range(4):
                launcher.next("beat")
                launcher.tell(do="ok")
            assert process.poll() is None
            launcher.tell(do="leave", why="rank 3 died")
        _, err = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    expected = {"leave": "rank 3 died", "stopped": "rank 3 died", "hang up": "launcher has died", "silence": "has died"}
    assert expected[way] in err
    if way in ("hang up", "silence"):
        assert "no contact with the launcher at 127.0.0.1:" in err and socket.gethostname() in err


SAVES = """
    import sys, time
    from dist_gpt.train.heartbeat import Pulse
    from dist_gpt.train.preemption import Stop
    stop = Stop()
    pulse = Pulse.from_environ(stop)
    pulse.can_save(float(sys.argv[1]))
    print("can save", flush=True)
    while not stop.requested:
        time.sleep(0.05)
    print(stop.requested, flush=True)
    time.sleep(float(sys.argv[2]))  # to the step boundary, and saves
    pulse.bye(75)
    pulse.close()
    sys.exit(75)
"""


@pytest.mark.parametrize("way", ["hang up", "silence", "back", "never saved"])
def test_a_rank_that_can_save_does_so_without_its_launcher(way: str) -> None:
    launcher = Launcher()
    grace_s, takes_s = {"back": (4.0, 6.0), "never saved": (0.5, 60.0)}.get(way, (60.0, 0.5))
    process = start(launcher, 1.0, SAVES, str(grace_s), str(takes_s))
    try:
        launcher.next("beat")
        assert process.stdout is not None and process.stdout.readline() == "can save\n"
        if way == "hang up":
            launcher.close()
        assert "no contact with the launcher at 127.0.0.1:" in process.stdout.readline()
        while way == "back" and process.poll() is None:  # it is heard again, and sees to the rest
            with suppress(OSError):  # the rank may have just left
                launcher.tell(do="ok")
            time.sleep(0.05)
        _, err = process.communicate(timeout=PATIENCE_S)
        if way == "never saved":
            assert "no checkpoint within 0 s of losing the launcher" in launcher.next("failed")["error"]
        elif way != "hang up":
            assert launcher.next("bye") == {"code": 75}
    finally:
        process.kill()
        process.wait()
    assert process.returncode == (1 if way == "never saved" else 75), err
    assert "the ranks save at the next step boundary and exit" in err


def test_long_groups_are_written_short() -> None:
    assert short([0, 1]) == [0, 1]
    assert short(range(0, 4096, 2)) == "0:4095:2"
    odd = [*range(100), 500]
    assert short(odd) == odd
