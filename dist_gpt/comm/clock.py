"""Measure the offset of every rank's clock from rank 0's, by the best of many pings.

A ping is (t0 here, t1 at rank 0, t2 here): rank 0's clock minus this rank's lies within RTT / 2 of t1 - (t0 + t2) / 2,
so the ping with the smallest RTT is the most accurate. Measurements at the start and at the end of a run give offset
and drift. Ranks on one machine share a clock unless a container shifts it, so they are measured too. Rank 0 serves one
rank after the other, so that pings do not compete for its core.
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
"""Seconds for all pings of a rank, including the wait for its turn; a failed measurement does not end the run."""
ANSWER_S = 1.0
"""Longest silence, in seconds, of a rank that is being served."""
_STAMP = struct.Struct("<q")
_PASSWORD = 16  # bytes


@dataclass(frozen=True)
class ClockReading:
    """Rank 0's clock minus this rank's, in ns, when this rank's showed `at_ns`; accurate to `error_ns`."""

    at_ns: int
    offset_ns: int
    error_ns: int


def read_clock(store: Store, env: RankEnv, name: str) -> ClockReading | None:
    """Measure this rank's clock against rank 0's; all ranks call it together, with a new `name` for every call.

    Return None if the measurement failed. Rank 0 listens on the one interface of MASTER_ADDR (loopback on one node).
    """
    key = f"clock/{name}"
    if env.rank == 0:
        try:
            _serve(store, env, key)
        except (OSError, RuntimeError):
            with suppress(RuntimeError):
                store.set(key, "none")  # so that no rank waits for an address
        return ClockReading(time.perf_counter_ns(), 0, 0)
    try:
        store.wait([key], timedelta(seconds=PATIENCE_S))
        host, port, password = json.loads(store.get(key))
        with socket.create_connection((host, port), timeout=PATIENCE_S) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.sendall(bytes.fromhex(password))
            return _best([_ping(line) for _ in range(PINGS)])
    except (OSError, ValueError, TypeError, RuntimeError):  # torch's store raises subclasses of RuntimeError
        return None


def _serve(store: Store, env: RankEnv, key: str) -> None:
    """Answer every other rank's pings, within PATIENCE_S in all; close connections without the password."""
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
    """Answer one rank's pings, PINGS at most."""
    for _ in range(PINGS):
        if len(line.recv(_STAMP.size, socket.MSG_WAITALL)) < _STAMP.size:
            return
        line.sendall(_STAMP.pack(time.perf_counter_ns()))


def _left(deadline: float) -> float:
    """Return the seconds until `deadline`; raise TimeoutError if it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time limit for reading clocks has passed")
    return left


def _ping(line: socket.socket) -> tuple[int, int, int]:
    """Return (RTT, rank 0's clock minus this rank's, this rank's clock halfway) of one ping, in ns."""
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
