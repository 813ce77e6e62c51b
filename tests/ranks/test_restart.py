"""Ranks that torchrun starts again meet anew: an attempt is agreed by all, whatever the shared store still holds.

`python -m tests.ranks.test_restart 8` says how many of 8 restarts came through (by hand: half a minute).
"""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist

from dist_gpt.comm import rendezvous
from dist_gpt.comm.rendezvous import RankEnv, RendezvousError, Store, connect_store, join_attempt, restarts, roll_call
from dist_gpt.config.load import load
from dist_gpt.train import trainer
from tests.ranks.preloaded import Started
from tests.ranks.runs import ROOT, end, environment, finish
from tests.ranks.threads import in_threads

FAR_S = 60.0
SCRIPT = str(ROOT / "tests" / "ranks" / "restarting.py")


def env_of(rank: int, world: int, left_s: float = FAR_S, attempt: int = 0, port: int = 0) -> RankEnv:
    return RankEnv(rank, world, rank, world, "127.0.0.1", port, attempt, time.monotonic() + left_s)


@contextmanager
def agent() -> Iterator[tuple[int, Store]]:
    """A store as torchrun's agent hosts one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        yield port, dist.TCPStore("127.0.0.1", port, is_master=True, master_listen_fd=server.detach(),
                                  wait_for_workers=False)  # fmt: skip


def attempt(store: Store, world: int, starts: int = 0) -> None:
    """All ranks join, call the roll and leave something under a key that is the same in every attempt."""

    def body(rank: int) -> list[str]:
        env = env_of(rank, world, attempt=starts + rank % 2)  # agents count their own restarts
        scope = join_attempt(store, env)
        assert restarts(scope, env) == starts + (world > 1), "the most that an agent has counted"
        assert not scope.check([f"address/{r}" for r in range(world)][rank : rank + 1])
        roll_call(scope, env, {"config": "same"})
        scope.set(f"address/{rank}", str(starts))
        scope.wait([f"address/{r}" for r in range(world)], timedelta(seconds=FAR_S))
        return [scope.get(f"address/{r}").decode() for r in range(world)]

    assert in_threads(world, body) == [[str(starts)] * world] * world


class TestJoining:
    def test_attempt_after_attempt_on_one_store(self) -> None:
        store = dist.HashStore()
        for starts in range(4):
            attempt(store, 5, starts)

    def test_over_tcp_as_connect_store_does_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.delenv(rendezvous.STORE_FD, raising=False)
        with agent() as (port, store):
            store.set("attempt0/roll/0", "of an attempt before")

            def body(rank: int) -> None:
                env = env_of(rank, 3, attempt=7 * rank, port=port)
                roll_call(connect_store(env), env, {"config": "same"})

            for _ in range(3):
                in_threads(3, body)

    def test_ranks_that_come_before_rank_0_wait_for_the_new_attempt(self) -> None:
        """They find the nonce of the attempt before, under which everybody has been answered."""
        store = dist.HashStore()
        attempt(store, 3)
        old = store.get(rendezvous.NONCE).decode()
        came = threading.Event()

        def body(rank: int) -> Store:
            if rank == 0:
                assert came.wait(FAR_S)
            elif rank == 2:  # by now rank 1 has left its new token under the old nonce
                while rendezvous.scoped(store, old).get("join/1") == before:
                    time.sleep(0.01)
                came.set()
            return join_attempt(store, env_of(rank, 3))

        before = rendezvous.scoped(store, old).get("join/1")
        scopes = in_threads(3, body)
        scopes[0].set("key", "x")
        assert scopes[1].check(["key"]) and scopes[2].check(["key"])
        assert not rendezvous.scoped(store, old).check(["key"])

    def test_an_attempt_that_never_began_leaves_nothing_in_the_way(self) -> None:
        """Rank 0 had published a nonce, rank 1 had joined under it, and both were killed."""
        store = dist.HashStore()
        store.set(rendezvous.NONCE, "0ld")
        store.set("0ld/join/1", "t0ken")
        attempt(store, 3)

    def test_a_rank_that_starts_again_while_rank_0_waits_joins_again(self) -> None:
        store, first = dist.HashStore(), threading.Event()

        def body(rank: int) -> bool:
            if rank == 1:  # left its token, died, and is started again
                store.wait([rendezvous.NONCE], timedelta(seconds=FAR_S))
                rendezvous.scoped(store, store.get(rendezvous.NONCE).decode()).set("join/1", "of the process that died")
                first.set()
            if rank == 2:
                assert first.wait(FAR_S)
                scope = rendezvous.scoped(store, store.get(rendezvous.NONCE).decode())
                while scope.get("join/1") == b"of the process that died":
                    time.sleep(0.01)
            join_attempt(store, env_of(rank, 3))
            return True

        assert in_threads(3, body) == [True] * 3

    def test_who_is_missing_is_named_to_everybody_in_time(self) -> None:
        store, started = dist.HashStore(), time.monotonic()

        def body(rank: int) -> str:
            with pytest.raises(RendezvousError) as raised:
                join_attempt(store, env_of(rank, 5, 1.0 if rank == 0 else FAR_S))
            return str(raised.value)

        said = in_threads(3, body)
        assert said == [said[0]] * 3
        assert re.match(
            r"rank 0: ranks 3, 4 did not join this attempt within \d+ s\. See the log of ranks 3, 4", said[0]
        )
        assert time.monotonic() - started < FAR_S / 2

    @pytest.mark.parametrize("stale", [False, True])
    def test_without_rank_0(self, stale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rendezvous, "READ_S", 0.0)
        store = dist.HashStore()
        if stale:
            store.set(rendezvous.NONCE, "0ld")
            store.set("0ld/joined", json.dumps({"tokens": {"1": "x"}, "problem": "of then"}))
        told = r"rank 1: rank 0 did not admit it to this attempt within \d+ s"
        with pytest.raises(RendezvousError, match=told) as said:
            join_attempt(store, env_of(1, 2, 1.0))
        assert ("joined too late" in str(said.value)) == stale

    def test_a_store_that_goes(self) -> None:
        with agent() as (port, host):
            client = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
            del host
        with pytest.raises(RendezvousError, match=f"rank 1 lost torchrun's store at 127.0.0.1:{port}"):
            join_attempt(client, env_of(1, 2, port=port))


def test_a_rank_whose_agent_has_counted_no_restart_resumes_like_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would begin at step 0, in a run directory that its rank 0 refuses or continues."""
    store, seen = dist.HashStore(), list[Any]()
    store.set(rendezvous.RESTARTS, "1")

    class Folder:
        def restart(self) -> None:
            seen.append("restart")

    def stop(config: object, resume: str | None, store: Store, env: RankEnv, *rest: object) -> None:
        seen.append((resume, env.attempt))
        raise RendezvousError("far enough")

    monkeypatch.setattr(trainer, "connect_store", lambda env: store)
    monkeypatch.setattr(trainer, "_train", stop)
    monkeypatch.delenv("RANK", raising=False)
    config = load("demo", [f"run_dir={tmp_path}", "parallel.dp=1", "parallel.tp=1", "parallel.pp=1"], world=1)
    with pytest.raises(RendezvousError, match="far enough"):
        trainer.main(config, None, cast(Any, Folder()))
    assert seen == ["restart", ("auto", 1)]


def torchrun(ranks: int, victim: int, when: str = "groups", nodes: int = 1, timeout_s: float = 60.0) -> list[str]:
    """`done` lines of a job whose `victim` kills itself once. AssertionError with all output where it did not end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    argv = ["--nproc-per-node", str(ranks), "--max-restarts", "1"]
    if nodes == 1:
        argvs = [[*argv, "--standalone"]]
    else:
        where = ["--nnodes", str(nodes), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        argvs = [[*argv, *where, "--node-rank", str(node)] for node in range(nodes)]
    agents = [Started("torch.distributed.run", [*words, SCRIPT, str(victim), when, str(timeout_s)], ROOT, environment())
              for words in argvs]  # fmt: skip
    for process in agents:
        process.read_along()
    try:
        out = "\n".join(text for process in agents for text in finish(process))
    finally:
        for process in agents:
            end(process)
    codes = [process.wait() for process in agents]
    assert codes == [0] * nodes, f"exit codes {codes}\n{out}"
    return sorted(line for line in out.splitlines() if line.startswith("done "))


def expected(world: int) -> list[str]:
    return [f"done {rank} 1 {2**world - 1}" for rank in range(world)]


@pytest.mark.parametrize("when", ["groups", pytest.param("groups", marks=pytest.mark.all_cells), "start"])
def test_torchrun_brings_the_ranks_back(when: str) -> None:
    assert torchrun(3, victim=1, when=when) == expected(3)


def test_two_agents_bring_the_ranks_back() -> None:
    """Static rendezvous: each agent counts its own restarts, and node 1's notices by its own ranks' errors."""
    assert torchrun(2, victim=1, nodes=2) == expected(4)


def test_agents_that_restarted_differently_often_meet() -> None:
    """Rank 1 dies before it meets anybody: node 0's agent starts its two again, node 1's two wait through it."""
    started = [line.split() for line in torchrun(2, victim=1, when="start", nodes=2)]
    assert [(rank, attempt, total) for _, rank, attempt, total in started] == [
        ("0", "1", "15"), ("1", "1", "15"), ("2", "0", "15"), ("3", "0", "15"),
    ]  # fmt: skip


def count(times: int) -> int:
    """How many of `times` restarts came through."""
    good = 0
    for number in range(times):
        try:
            good += torchrun(3, victim=1) == expected(3)
        except AssertionError as error:
            print(error)
        print(f"{good} of {number + 1}", flush=True)
    return good


if __name__ == "__main__":
    count(int(sys.argv[1]))
