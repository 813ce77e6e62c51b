"""How ranks meet: what is said when one is missing, differs or cannot connect, and what listens where."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from dist_gpt.comm import rendezvous
from dist_gpt.comm.mesh import GlooBackends
from dist_gpt.comm.rendezvous import (
    RankEnv,
    RendezvousError,
    connect_store,
    identity,
    rank_env,
    roll_call,
    wait_for,
)  # fmt: skip
from tests.ranks.runs import Killed
from tests.ranks.threads import in_threads

LOOPBACK = "127.0.0.1"
FAR_S = 60.0
FULL = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
LOCAL = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MINE = {"config": "c0ffee", "data": "da7a", "torch": "2.13.0", "python": "3.11.7"}


def env_of(rank: int, world: int, left_s: float, port: int = 0, host: str = LOOPBACK, attempt: int = 0) -> RankEnv:
    """A rank of one node whose initialisation may take `left_s` more seconds."""
    return RankEnv(rank, world, rank, world, host, port, attempt, time.monotonic() + left_s)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may themselves run under a launcher."""
    elastic = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT")
    interfaces = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in (*FULL, *LOCAL, *elastic, *interfaces, rendezvous.STORE_FD, rendezvous.ATTEMPT):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def taken() -> Iterator[int]:
    """A loopback port on which somebody listens who speaks no store."""
    with socket.create_server((LOOPBACK, 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> Iterator[int]:
    """A loopback port that is bound, so that nobody else takes it, and on which nobody listens."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # rank 0 may still listen on it: so does it
        server.bind((LOOPBACK, 0))
        yield server.getsockname()[1]


class TestRankEnv:
    def test_without_rank_a_single_process(self) -> None:
        env = rank_env(5.0, {"WORLD_SIZE": "8"})
        assert (env.rank, env.world, env.local_rank, env.local_world, env.attempt) == (0, 1, 0, 1, 0)
        assert env.one_node

    def test_a_worker_that_nobody_started_is_a_single_process(self) -> None:
        env = rank_env(5.0, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
        assert (env.rank, env.world) == (0, 1) and env.one_node

    def test_torchruns_variables(self) -> None:
        given = {**FULL, **LOCAL, "TORCHELASTIC_RESTART_COUNT": "4"}
        env = rank_env(5.0, given)
        assert (env.rank, env.world, env.local_rank, env.local_world) == (3, 8, 1, 2)
        assert (env.master_addr, env.master_port, env.attempt) == ("10.0.0.7", 29500, 4)
        assert not env.one_node
        assert 1.0 <= env.left_s() <= 5.0

    def test_the_launchers_count_comes_before_torchruns(self) -> None:
        """A launcher that starts torchrun once more: torchrun tells its ranks that this is their first start."""
        env = rank_env(5.0, {**FULL, **LOCAL, "TORCHELASTIC_RESTART_COUNT": "0", "DIST_GPT_ATTEMPT": "2"})
        assert env.attempt == 2

    def test_time_left_is_never_none(self) -> None:
        """A timeout of 0 would mean "for ever" to some of torch's calls."""
        assert env_of(0, 2, -10.0).left_s() == 1.0

    @pytest.mark.parametrize("name", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
    def test_what_is_missing_is_named(self, name: str) -> None:
        with pytest.raises(RendezvousError, match=f"RANK is set but {name} is not: start ranks with dist-gpt launch"):
            rank_env(5.0, {key: value for key, value in FULL.items() if key != name})

    def test_all_that_is_missing_is_named(self) -> None:
        with pytest.raises(RendezvousError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"):
            rank_env(5.0, {"RANK": "0"})

    @pytest.mark.parametrize("name", sorted(LOCAL))
    def test_several_ranks_must_know_their_node(self, name: str) -> None:
        given = {key: value for key, value in {**FULL, **LOCAL}.items() if key != name}
        with pytest.raises(RendezvousError, match=f"WORLD_SIZE is 8 but {name} is not set.*with dist-gpt launch"):
            rank_env(5.0, given)

    def test_a_single_rank_is_its_node(self) -> None:
        assert rank_env(5.0, {**FULL, "RANK": "0", "WORLD_SIZE": "1"}).one_node


class TestConnect:
    def test_nobody_listens(self, closed: int) -> None:
        with pytest.raises(RendezvousError) as raised:
            connect_store(env_of(1, 2, 1.0, closed))
        text = str(raised.value)
        assert text.startswith(f"rank 1: no store at {LOOPBACK}:{closed} within 1 s. Is rank 0 running")
        assert f"MASTER_ADDR reachable from {socket.gethostname()}?" in text

    def test_address_of_another_host(self) -> None:
        """203.0.113.0/24 is for documentation (RFC 5737): no machine has it."""
        with pytest.raises(RendezvousError) as raised:
            connect_store(env_of(0, 2, 1.0, 29500, host="203.0.113.9"))
        text = str(raised.value)
        assert text.startswith("rank 0 cannot listen on 203.0.113.9:29500: ")
        assert "a MASTER_ADDR that is an address of this host" in text

    def test_port_that_is_taken(self, taken: int) -> None:
        with pytest.raises(RendezvousError, match=rf"cannot listen on {LOOPBACK}:{taken}: .*another MASTER_PORT"):
            connect_store(env_of(0, 2, 1.0, taken))

    def test_single_process_opens_nothing(self) -> None:
        store = connect_store(env_of(0, 1, 1.0))
        assert isinstance(store, dist.HashStore)
        roll_call(store, env_of(0, 1, 1.0), MINE)

    def test_listens_on_loopback_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The store and a gloo group of two ranks, by what the kernel says of this process."""
        before = listening()
        with socket.create_server((LOOPBACK, 0)) as server:
            port = server.getsockname()[1]
            monkeypatch.setenv(rendezvous.STORE_FD, str(server.detach()))
        envs = [env_of(rank, 2, FAR_S, port) for rank in range(2)]
        stores = in_threads(2, lambda rank: connect_store(envs[rank]))
        in_threads(2, lambda rank: roll_call(stores[rank], envs[rank], MINE))
        groups = in_threads(2, lambda rank: GlooBackends(stores[rank], LOOPBACK, FAR_S).create("tp", (0, 1), rank))
        opened = listening() - before
        for group in groups:
            group.shutdown()
        assert (LOOPBACK, port) in opened
        assert {address for address, _ in opened} == {LOOPBACK}

    def test_rank_0_binds_the_address_it_was_given(self, closed: int) -> None:
        before = listening()
        store = connect_store(env_of(0, 2, FAR_S, closed))
        assert listening() - before == {(LOOPBACK, closed)}
        del store

    def test_a_restart_does_not_read_what_the_attempt_before_wrote(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Under torchrun one store lives through all attempts."""
        with socket.create_server((LOOPBACK, 0)) as server:
            port = server.getsockname()[1]
            agent = dist.TCPStore(LOOPBACK, port, is_master=True, master_listen_fd=server.detach(),
                                  wait_for_workers=False)  # fmt: skip
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

        def meet(attempt: int) -> dist.Store:
            envs = [env_of(rank, 2, FAR_S, port, attempt=attempt) for rank in range(2)]
            return in_threads(2, lambda rank: connect_store(envs[rank]))[0]

        first = meet(0)
        first.set("roll/0", "an address that is gone")
        second = meet(0)  # the agent of another node may not have counted
        assert not second.check(["roll/0"])
        second.set("roll/0", "new")
        assert (first.get("roll/0"), second.get("roll/0")) == (b"an address that is gone", b"new")
        assert agent.get(f"{agent.get(rendezvous.NONCE).decode()}/roll/0") == b"new"

    def test_the_launchers_attempts_are_numbered_alike(self, closed: int) -> None:
        store = connect_store(env_of(0, 2, FAR_S, closed, attempt=3))
        store.set("key", "x")
        client = dist.TCPStore(LOOPBACK, closed, is_master=False, wait_for_workers=False)
        assert client.get("attempt3/key") == b"x"


class TestRollCall:
    def call(self, cards: dict[int, dict[str, str]], world: int, left_s: float, *stores: dist.Store) -> list[str]:
        """What each rank of `cards` raised; "" where the roll call passed. One store for all, or one for each."""
        ranks = sorted(cards)
        envs = {rank: env_of(rank, world, left_s) for rank in ranks}

        def answer(i: int) -> str:
            try:
                roll_call(stores[i % len(stores)], envs[ranks[i]], cards[ranks[i]])
            except RendezvousError as error:
                return str(error)
            return ""

        return in_threads(len(ranks), answer)

    def test_all_present_and_equal(self) -> None:
        assert self.call(dict.fromkeys(range(3), MINE), 3, FAR_S, dist.HashStore()) == ["", "", ""]

    def test_it_waits_for_the_last(self) -> None:
        store = dist.HashStore()
        env = env_of(1, 2, FAR_S)
        came = threading.Event()

        def come() -> None:
            came.set()
            roll_call(store, env, MINE)

        late = threading.Timer(0.3, come)
        late.start()
        roll_call(store, env_of(0, 2, FAR_S), MINE)
        assert came.is_set(), "the roll call was over before the last rank had come"
        late.join()

    def test_missing_ranks_are_named_to_everybody(self) -> None:
        started = time.monotonic()
        said = self.call({0: MINE, 2: MINE}, 5, 0.3, dist.HashStore())
        assert said == ["roll call: 3 of 5 ranks did not appear in time: 1, 3, 4. See their logs"] * 2
        assert time.monotonic() - started < FAR_S

    def test_over_tcp(self) -> None:
        with socket.create_server((LOOPBACK, 0)) as server:
            port = server.getsockname()[1]
            host = dist.TCPStore(LOOPBACK, port, is_master=True, master_listen_fd=server.detach(),
                                 wait_for_workers=False)  # fmt: skip
        stores = [host, dist.TCPStore(LOOPBACK, port, is_master=False, wait_for_workers=False)]
        assert (
            self.call(dict.fromkeys(range(2), MINE), 3, 0.3, *stores)
            == ["roll call: 1 of 3 ranks did not appear in time: 2. See their logs"] * 2
        )

    def test_without_rank_0_the_others_leave_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(RankEnv, "left_s", lambda self: -4.8)  # 0.2 s with roll_call's margin for rank 0
        said = self.call({1: MINE}, 2, 0.0, dist.HashStore())
        assert len(said) == 1
        told = r"rank 1: rank 0 did not finish the roll call within \d+ s\. See the log of rank 0"
        assert re.fullmatch(told, said[0])

    def test_an_error_ends_it_at_once(self) -> None:
        """Rank 2 never answers: nobody waits for it when rank 1 has said why it cannot go on."""
        started = time.monotonic()
        said = self.call({0: MINE, 1: {"error": "has no data: gone"}}, 2, FAR_S, dist.HashStore())
        assert said == [f"roll call: rank 1 on {socket.gethostname()} has no data: gone"] * 2
        assert time.monotonic() - started < FAR_S

    @pytest.mark.parametrize("verdict", ["differs", "missing"])
    def test_rank_0_stays_until_the_verdict_is_read(self, verdict: str) -> None:
        """Rank 1 answered, and reads only when the test lets it."""
        store, left = dist.HashStore(), threading.Event()
        world = 2 if verdict == "differs" else 3
        store.set("roll/1", json.dumps({**MINE, "config": "y", "host": "there"}))

        def rank_0() -> None:
            with pytest.raises(RendezvousError, match="has config y" if verdict == "differs" else "appear in time: 2"):
                roll_call(store, env_of(0, world, FAR_S if verdict == "differs" else 0.0), MINE)
            left.set()

        thread = threading.Thread(target=rank_0)
        thread.start()
        store.wait(["roll/verdict"], timedelta(seconds=FAR_S))
        assert not left.wait(0.2)
        store.set("roll/read/1", "")
        assert left.wait(rendezvous.READ_S / 2)
        thread.join()

    def test_rank_0_does_not_stay_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rendezvous, "READ_S", 0.1)
        store = dist.HashStore()
        store.set("roll/1", json.dumps({**MINE, "config": "y", "host": "there"}))
        with pytest.raises(RendezvousError, match="has config y"):
            roll_call(store, env_of(0, 2, FAR_S), MINE)

    @pytest.mark.parametrize("key", sorted(MINE))
    def test_a_difference_is_named_to_everybody(self, key: str) -> None:
        cards = {0: MINE, 1: MINE, 2: {**MINE, key: "other"}}
        expected = f"roll call: rank 2 on {socket.gethostname()} has {key} other, rank 0 has {MINE[key]}"
        assert self.call(cards, 3, FAR_S, dist.HashStore()) == [expected] * 3

    def test_every_difference_is_named(self) -> None:
        cards = {0: MINE, 1: {**MINE, "data": "x"}, 2: {**MINE, "torch": "2.11.0", "config": "y"}}
        (said,) = set(self.call(cards, 3, FAR_S, dist.HashStore()))
        assert said.count(";") == 2
        for words in ("rank 1 on", "data x", "rank 2 on", "torch 2.11.0", "config y"):
            assert words in said

    def test_what_is_compared(self) -> None:
        card = identity("c" * 64)
        assert card["config"] == "c" * 16
        assert card["torch"].startswith("2.") and card["python"].startswith("3.")


class TestWaitFor:
    def test_who_is_absent_is_named(self) -> None:
        store = dist.HashStore()
        store.set("k1", "")
        with pytest.raises(RendezvousError) as raised:
            wait_for(store, env_of(0, 4, FAR_S), {rank: f"k{rank}" for rank in range(1, 4)}, "bring its key", 0.1)
        told = r"rank 0: ranks 2, 3 did not bring its key within \d+ s\. See the log of ranks 2, 3"
        assert re.fullmatch(told, str(raised.value))

    def test_a_store_that_is_gone(self) -> None:
        with socket.create_server((LOOPBACK, 0)) as server:
            port = server.getsockname()[1]
            host = dist.TCPStore(LOOPBACK, port, is_master=True, master_listen_fd=server.detach(),
                                 wait_for_workers=False)  # fmt: skip
        store = dist.TCPStore(LOOPBACK, port, is_master=False, wait_for_workers=False)
        del host
        with pytest.raises(RendezvousError, match=rf"rank 1 lost the store while it waited for rank 0 to go.*{port}"):
            wait_for(store, env_of(1, 2, FAR_S, port), {0: "key"}, "go", 1.0)


def test_the_node_is_one_when_all_ranks_are_local() -> None:
    env = env_of(0, 2, FAR_S)
    assert env.one_node and not replace(env, local_world=1).one_node


def listening() -> set[tuple[str, int]]:
    """(address, port) on which this process listens."""
    return {
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.Process().net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_scoped_stores_do_not_meet() -> None:
    store = dist.HashStore()
    one, two = rendezvous.scoped(store, "one"), rendezvous.scoped(store, "two")
    one.set("key", "1")
    assert not two.check(["key"])
    with pytest.raises(Exception, match=r"(?i)timeout|wait"):
        two.wait(["key"], timedelta(milliseconds=50))


def test_ranks_of_a_run_listen_on_loopback_only(killed: Killed) -> None:
    """Two real ranks in the middle of training: the store and every gloo group."""
    assert killed.listening == {LOOPBACK}


class TestDevice:
    @pytest.fixture
    def gpus(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        """How many GPUs torch says it sees."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    def test_the_one_at_the_local_rank(self, gpus: Callable[[int], None]) -> None:
        gpus(2)
        assert rendezvous.choose_device(env_of(1, 2, FAR_S)) == torch.device("cuda", 1)
        assert rendezvous.choose_device(env_of(1, 2, FAR_S), "gloo") == torch.device("cpu")

    @pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
    def test_one_for_each_task(
        self, gpus: Callable[[int], None], name: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """srun --gpus-per-task=1: every task sees its own as the first."""
        gpus(1)
        monkeypatch.setenv(name, "0")
        assert rendezvous.choose_device(env_of(0, 2, FAR_S)) == torch.device("cuda", 0)
        assert capsys.readouterr().out == ""
        assert rendezvous.choose_device(env_of(1, 2, FAR_S)) == torch.device("cuda", 0)
        out = capsys.readouterr().out
        assert out.startswith("rank 1 (local 1 of 2 on ") and "as with srun --gpus-per-task=1, and uses cuda:0" in out

    def test_a_machine_with_one_for_two(self, gpus: Callable[[int], None]) -> None:
        gpus(1)
        with pytest.raises(RendezvousError, match="local rank 1 has no GPU of its own: 1 visible on"):
            rendezvous.choose_device(env_of(1, 2, FAR_S))
