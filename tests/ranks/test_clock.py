"""Clocks read over real sockets: ranks of one machine agree, and nothing that goes wrong ends a run."""

from __future__ import annotations

import json
import math
import socket
from typing import Any

import torch.distributed as dist

from dist_gpt.comm.clock import read_clock
from dist_gpt.comm.rendezvous import RankEnv
from tests.ranks.threads import in_threads


class TestClock:
    def test_ranks_of_one_machine_agree(self) -> None:
        store = dist.HashStore()

        def body(rank: int) -> Any:
            return read_clock(store, RankEnv(rank, 3, rank, 3, "127.0.0.1", 0, 0, math.inf), "start")

        first, *others = in_threads(3, body)
        assert (first.offset_ns, first.error_ns) == (0, 0)
        for reading in others:
            assert abs(reading.offset_ns) <= reading.error_ns

    def test_a_clock_that_cannot_be_read_ends_no_run(self) -> None:
        store = dist.HashStore()
        rank = RankEnv(1, 2, 1, 2, "127.0.0.1", 0, 0, math.inf)
        for word in (json.dumps(["127.0.0.1", 1, "00" * 16]), "none"):  # nobody listens there; rank 0 has failed
            store.set("clock/start", word)
            assert read_clock(store, rank, "start") is None

    def test_a_stranger_is_sent_away(self) -> None:
        store = dist.HashStore()

        def body(rank: int) -> Any:
            if rank == 1:  # comes first, knows nothing
                store.wait(["clock/start"])
                host, port, _ = json.loads(store.get("clock/start"))
                with socket.create_connection((host, port)) as line:
                    line.sendall(bytes(16))
                    assert line.recv(1) == b""
                store.set("stranger", "left")
                return None
            if rank == 2:
                store.wait(["stranger"])
                return read_clock(store, RankEnv(1, 2, 1, 2, "127.0.0.1", 0, 0, math.inf), "start")
            return read_clock(store, RankEnv(0, 2, 0, 2, "127.0.0.1", 0, 0, math.inf), "start")

        assert in_threads(3, body)[2] is not None

    def test_a_single_process_is_its_own_clock(self) -> None:
        reading = read_clock(dist.HashStore(), RankEnv(0, 1, 0, 1, "127.0.0.1", 0, 0, math.inf), "start")
        assert reading is not None and reading.offset_ns == 0
