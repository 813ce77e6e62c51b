"""How far every rank's clock is from rank 0's, by the best of many pings.

A ping is (t0 here, t1 at rank 0, t2 here): rank 0's clock minus ours lies within RTT / 2 of t1 - (t0 + t2) / 2. The
ping with the smallest RTT says most. Measured at the start and at the end of a run, the two give offset and drift;
ranks on one machine share a clock unless a container shifts it, so they are measured too. Rank 0 serves one rank after
the other, so pings do not compete for its processor.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from dist_gpt.comm.rendezvous import RankEnv, Store

PINGS = 40
PATIENCE_S = 30.0
"""For all pings of a rank and the time it waits for its turn; a clock that cannot be measured ends no run."""
ANSWER_S = 1.0
"""Longest silence of a rank that is being served."""
_STAMP = struct.Struct("<q")
_PASSWORD = 16  # bytes


@dataclass(frozen=True)
class ClockReading:
    """Rank 0's clock minus ours, in ns, when ours showed `at_ns`; within `error_ns`."""

    at_ns: int
    offset_ns: int
    error_ns: int


def read_clock(store: Store, env: RankEnv, name: str) -> ClockReading | None:
    """To be called by all ranks together, with a `name` of its own for every call; None where it could not be measured.

    Rank 0 listens on the one interface of MASTER_ADDR (loopback on one node).
    """
    key = f"clock/{name}"
    if env.rank == 0:
        try:
            _serve(store, env, key)
        except (OSError, RuntimeError):
            with suppress(RuntimeError):
                store.set(key, "none")  # nobody waits for what will not come
        return ClockReading(time.perf_counter_ns(), 0, 0)
    try:
        store.wait([key], timedelta(seconds=PATIENCE_S))
        host, port, password = json.loads(store.get(key))
        with socket.create_connection((host, port), timeout=PATIENCE_S) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.sendall(bytes.fromhex(password))
            return _best([_ping(line) for _ in range(PINGS)])
    except (OSError, ValueError, TypeError, RuntimeError):  # torch's store raises its own kinds of the last
        return None


def _serve(store: Store, env: RankEnv, key: str) -> None:
    """Answer every other rank's pings, PATIENCE_S in all; who does not know the password is sent away."""
    if env.world == 1:
        return
    host, password, deadline = env.master_addr, secrets.token_bytes(_PASSWORD), time.monotonic() + PATIENCE_S
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((host, 0), family=family, backlog=env.world) as server:
        store.set(key, json.dumps([host, server.getsockname()[1], password.hex()]))
        served = 0
        while served < env.world - 1:
            server.settimeout(_left(deadline))
            line, _ = server.accept()
            with line, suppress(OSError):
                line.settimeout(min(ANSWER_S, _left(deadline)))
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if line.recv(_PASSWORD, socket.MSG_WAITALL) == password:
                    served += 1
                    _answer(line)


def _answer(line: socket.socket) -> None:
    """One rank's pings."""
    for _ in range(PINGS):
        if len(line.recv(_STAMP.size, socket.MSG_WAITALL)) < _STAMP.size:
            return
        line.sendall(_STAMP.pack(time.perf_counter_ns()))


def _left(deadline: float) -> float:
    """Seconds; raises TimeoutError when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for reading clocks is over")
    return left


def _ping(line: socket.socket) -> tuple[int, int, int]:
    """(RTT, rank 0's clock minus ours, our clock in the middle)."""
    sent = time.perf_counter_ns()
    line.sendall(_STAMP.pack(sent))
    answer = line.recv(_STAMP.size, socket.MSG_WAITALL)
    came = time.perf_counter_ns()
    if len(answer) < _STAMP.size:
        raise OSError("rank 0 closed the connection")
    middle = (sent + came) // 2
    return came - sent, _STAMP.unpack(answer)[0] - middle, middle


def _best(pings: list[tuple[int, int, int]]) -> ClockReading:
    round_trip, offset, middle = min(pings)
    return ClockReading(middle, offset, (round_trip + 1) // 2)
