"""The watch when many come, some of them strangers, some of them late."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import pytest

from launch.monitor import heartbeat_server as watch_module
from launch.monitor.heartbeat_server import Watch
from launch.rank import worker
from tests.patience import PATIENCE_S
from tests.unit.test_watch import FakeRank, make, until

__all__ = ["make"]


def test_a_rank_that_looks_at_its_node_for_long_is_no_stranger(
    make: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drivers and name services may take longer to answer than the watch waits for a hello."""
    monkeypatch.setattr(watch_module, "HELLO_S", 0.2)

    answered = []

    def slow(environ: object) -> dict[str, object]:
        time.sleep(1.5)
        answered.append(time.time())
        return {"cores": [0], "time": 0.0}

    monkeypatch.setattr("launch.rank.node_info.facts", slow)
    watch = make(1)
    environ = {"DIST_GPT_WATCH": watch.address, "DIST_GPT_WATCH_TOKEN": watch.token}
    thread = threading.Thread(target=worker.greet, args=(environ,))
    thread.start()
    until(lambda: not watch.missing())
    watch.go()
    thread.join(PATIENCE_S)
    with socket.socket(fileno=int(environ["DIST_GPT_WATCH_FD"])):
        state = watch.states()[0]
        assert state.facts["cores"] == [0] and state.closed is None
        assert answered[0] <= state.facts["time"] <= time.time(), "its clock is read when the hello goes out"


STUFFED = """
    import os, resource, socket, sys, time
    from tests.unit.test_watch import FakeRank, until
    from launch.monitor.heartbeat_server import Watch
    watch = Watch("127.0.0.1", 2)
    address, port = watch.address.rsplit(":", 1)
    there = os.listdir("/proc/self/fd")
    limit = max(map(int, there)) + {room}
    first = FakeRank(watch, 0)  # its file() and both ends are here: 3 of the numbers
    until(lambda: watch.missing() == [1])
    waiting = [socket.socket() for _ in range({strangers})]
    fillers = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        while True:
            fillers.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for _ in range({free}):
        os.close(fillers.pop())
    for link in waiting:
        link.connect((address, int(port)))
    began, spent = time.monotonic(), time.process_time()
    time.sleep(1.0)
    spent = time.process_time() - spent
    assert spent < 0.5, f"{{spent}} s of a processor in 1 s"
    first.beat()
    assert first.told() == {{"do": "ok"}}, "the rank that is there is heard"
    for fd in fillers:
        os.close(fd)
    second = FakeRank(watch, 1)
    until(lambda: not watch.missing())
    watch.close()
    os._exit(0)
"""


@pytest.mark.parametrize("free", [0, 3], ids=["nothing to give up", "strangers to give up"])
def test_without_file_descriptors_it_neither_spins_nor_goes_deaf(free: int) -> None:
    code = textwrap.dedent(STUFFED).format(room=120, strangers=40, free=free)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_strangers_are_counted(make: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "STRANGERS", 3)
    watch = make(2)
    address, port = watch.address.rsplit(":", 1)
    silent_ones = [socket.create_connection((address, int(port))) for _ in range(8)]
    until(lambda: len(watch._all) == 5)
    for link in silent_ones[:3]:
        link.settimeout(5.0)
        assert link.recv(1) == b"", "the oldest go first"
    rank = FakeRank(watch, 0)
    until(lambda: watch.missing() == [1])
    for link in (*silent_ones, rank):
        link.close()


def test_ranks_of_a_group_share_its_list(make: Callable[..., Watch]) -> None:
    watch = make(2)
    ranks = [FakeRank(watch, rank) for rank in range(2)]
    for rank in ranks:
        rank.say(channels=[["world", "0:2:1", ""]], port=1)
    until(lambda: all(state.channels for state in watch.states()))
    first, second = (state.channels[0][1] for state in watch.states())
    assert first is second
    for rank in ranks:
        rank.close()
