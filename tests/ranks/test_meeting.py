"""How ranks agree before and after training, and the groups they then make: addresses, timeouts, and leaving."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from dist_gpt.comm import rendezvous
from dist_gpt.comm.group import Group
from dist_gpt.comm.ledger import Ledger
from dist_gpt.comm.mesh import GlooBackends, build_mesh
from dist_gpt.comm.p2p_collectives import JOIN_S, Waiter
from dist_gpt.comm.rendezvous import RankEnv, RendezvousError, make_backends
from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.layout import Layout
from dist_gpt.train import startup
from dist_gpt.train.startup import meet
from tests.patience import PATIENCE_S
from tests.ranks.threads import in_threads

LOOPBACK = "127.0.0.1"
FAR_S = 60.0


def env_of(rank: int, world: int, left_s: float, local_world: int | None = None) -> RankEnv:
    """A rank whose meeting may take `left_s` more seconds; on one node, or on nodes of `local_world` ranks."""
    per_node = local_world or world
    return RankEnv(rank, world, rank % per_node, per_node, LOOPBACK, 0, 0, time.monotonic() + left_s)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may themselves run under a launcher."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "DIST_GPT_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


def here() -> int:
    """The rank whose thread asks."""
    return int(threading.current_thread().name.removeprefix("rank"))


class TestMeet:
    """Threads as ranks, on two nodes of two; the data is a path and a digest."""

    @pytest.fixture
    def config(self) -> Config:
        return load("demo")

    def said(
        self, config: Config, prepare: Callable[[Config], Any], patch: pytest.MonkeyPatch, left_s: float = FAR_S
    ) -> list[str | RankEnv]:
        """What each of the four ranks raised, or the environment it goes on with."""
        store = dist.HashStore()
        patch.setattr(startup, "prepare", prepare)
        patch.setattr(startup, "open_prepared", lambda path: SimpleNamespace(path=path, digest=path))

        def body(rank: int) -> str | RankEnv:
            try:
                return meet(config, store, env_of(rank, 4, left_s, local_world=2))[1]
            except Exception as error:
                return f"{type(error).__name__}: {error}"

        return in_threads(4, body)

    def test_data_does_not_eat_the_deadline(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second node takes longer than the meeting may; all wait for it, and the deadline starts again."""
        left_s = 1.0

        def prepare(_: Config) -> Any:
            if here() == 2:
                time.sleep(left_s + 0.5)
            return SimpleNamespace(path="tokens", digest="tokens")

        for env in self.said(config, prepare, monkeypatch, left_s):
            assert isinstance(env, RankEnv), env
            assert env.left_s() > config.launch.timeout_s - 30.0

    @pytest.mark.parametrize("failing", [0, 2])
    def test_who_has_no_data_says_so_to_all(
        self, failing: int, config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It raises its own error, the others hear of it at once, and rank 0 does not stay in vain."""

        def prepare(_: Config) -> Any:
            if here() == failing:
                raise ValueError("no such corpus")
            return SimpleNamespace(path="tokens", digest="tokens")

        monkeypatch.setattr(rendezvous, "READ_S", 10 * FAR_S)
        started = time.monotonic()
        said = self.said(config, prepare, monkeypatch)
        assert time.monotonic() - started < FAR_S
        assert said[failing] == "ValueError: no such corpus"
        assert said[failing + 1] == f"RendezvousError: rank {failing} could not prepare the data: no such corpus"
        for line in said[:failing] + said[failing + 2 :]:
            assert str(line).startswith("RendezvousError: roll call: rank ")
            assert "has no data" in str(line) and "no such corpus" in str(line)

    def test_different_data(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        prepare = lambda _: SimpleNamespace(path=f"of {here()}", digest=f"of {here()}")  # noqa: E731
        (line,) = set(map(str, self.said(config, prepare, monkeypatch)))
        assert "rank 2 on" in line and "rank 3 on" in line and "has data of 2, rank 0 has of 0" in line
        assert line.startswith("DataError: data.source: ") and "give every node the same files" in line

    def test_another_configuration_is_found_before_data_is_made(
        self, config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def body(rank: int) -> str:
            mine = config.model_copy(update={"name": f"run{rank}"})
            with pytest.raises(RendezvousError) as raised:
                meet(mine, store, env_of(rank, 2, FAR_S))
            return str(raised.value)

        store = dist.HashStore()
        monkeypatch.setattr(startup, "prepare", lambda _: pytest.fail("data was prepared"))
        (line,) = set(in_threads(2, body))
        assert "rank 1 on" in line and "has config" in line

    def test_a_single_process(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: Config) -> Any:
            raise ValueError("no such corpus")

        monkeypatch.setattr(startup, "prepare", refuse)
        with pytest.raises(ValueError, match="no such corpus"):
            meet(config, dist.HashStore(), env_of(0, 1, FAR_S))


class Tracked:
    """A backend that notes its end, and may fail at it."""

    def __init__(self, ended: list[str], name: str, fails: bool = False) -> None:
        self.ended, self.label, self.fails = ended, name, fails

    def name(self) -> str:
        return "tracked"

    def shutdown(self) -> None:
        self.ended.append(self.label)
        if self.fails:
            raise RuntimeError(f"{self.label} does not go")


class TestClosing:
    LAYOUT = Layout(pp=2, dp=2, cp=1, tp=2)

    def test_groups_made_before_a_failure_are_closed(self) -> None:
        ended: list[str] = []

        class Backends:
            def create(self, name: str, ranks: tuple[int, ...], rank: int) -> Any:
                if name == "pp_b":
                    raise OSError("no more sockets")
                return Tracked(ended, name)

        with pytest.raises(OSError, match="no more sockets"):
            build_mesh(self.LAYOUT, 0, range(2), Backends())
        assert sorted(ended) == ["data", "embed", "pp_f", "tp", "world"]

    def test_one_that_fails_to_close_keeps_none_open(self) -> None:
        ended: list[str] = []

        class Backends:
            def create(self, name: str, ranks: tuple[int, ...], rank: int) -> Any:
                return Tracked(ended, name, fails=name in ("world", "tp"))

        mesh = build_mesh(self.LAYOUT, 0, range(2), Backends())
        assert not ended, "a mesh that was made keeps its groups"
        with pytest.raises(RuntimeError, match="does not go"):
            mesh.close()
        assert sorted(ended) == ["data", "embed", "pp_b", "pp_f", "tp", "world"]

    def test_the_thread_of_sends_is_joined(self) -> None:
        waiter, release = Waiter(), threading.Event()
        watched = waiter.watch(release.wait)
        threading.Timer(0.1, release.set).start()
        waiter.close()
        assert watched.is_completed()
        assert waiter._thread is not None and not waiter._thread.is_alive()

    def test_a_stuck_send_does_not_hold_the_close(self) -> None:
        waiter, release = Waiter(), threading.Event()
        waiter.watch(release.wait)
        started = time.monotonic()
        waiter.close()
        assert JOIN_S * 0.9 <= time.monotonic() - started < PATIENCE_S
        release.set()

    def test_without_sends_nothing_is_joined(self) -> None:
        waiter = Waiter()
        waiter.close()
        assert waiter._thread is None


class TestBackends:
    def nodes(self, host: str, left_s: float = FAR_S) -> RankEnv:
        """One of two nodes with a rank each."""
        return RankEnv(0, 2, 0, 1, host, 29500, 0, time.monotonic() + left_s)

    def made(self, env: RankEnv) -> tuple[str, list[str]]:
        """(host, interfaces) that gloo is given."""
        given: list[tuple[str, list[str]]] = []

        def made(
            _: Any, host: str, __: float, names: Sequence[str] = (), left_s: Any = None, one_node: bool = True,
            single_copy: bool = False,
        ) -> None:  # fmt: skip
            assert one_node == env.one_node and single_copy
            given.append((host, list(names)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rendezvous, "GlooBackends", made)
            make_backends(dist.HashStore(), env, torch.device("cpu"), FAR_S)
        return given[0]

    def test_one_node_is_loopback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
        assert self.made(env_of(0, 2, FAR_S)) == (LOOPBACK, [])

    def test_several_nodes_use_the_route_to_rank_0(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel is asked, not the host's name; an address of this machine is reached from itself."""
        monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
        assert self.made(self.nodes("127.0.0.1")) == ("127.0.0.1", [])
        for address in own_addresses():
            assert self.made(self.nodes(address)) == (address, [])

    def test_interfaces_that_were_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo, lo")
        assert self.made(self.nodes("203.0.113.9")) == ("", ["lo", "lo"])
        backends = make_backends(dist.HashStore(), self.nodes("203.0.113.9"), torch.device("cpu"), FAR_S)
        assert isinstance(backends, GlooBackends) and "lo" in str(backends.devices[0])

    def test_no_route(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*words: object, **options: object) -> None:
            raise socket.gaierror("unknown name")

        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        with pytest.raises(RendezvousError, match="to MASTER_ADDR nowhere: unknown name.*GLOO_SOCKET_IFNAME"):
            self.made(self.nodes("nowhere"))

    @pytest.mark.parametrize(("given", "nodes", "name"), [(None, 1, "lo"), ("ib0", 1, "ib0"), (None, 2, None)])
    def test_nccl_stays_on_loopback_on_one_node(
        self, given: str | None, nodes: int, name: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "environ", {"NCCL_SOCKET_IFNAME": given} if given else {})
        env = env_of(0, 2, FAR_S) if nodes == 1 else self.nodes(LOOPBACK)
        make_backends(dist.HashStore(), env, torch.device("cuda"), FAR_S)
        assert os.environ.get("NCCL_SOCKET_IFNAME") == name

    def test_a_group_is_created_within_the_deadline(self) -> None:
        """The other rank never comes; a collective's own timeout is much longer."""
        env = env_of(0, 2, 0.0)
        started = time.monotonic()
        with pytest.raises(RuntimeError):
            make_backends(dist.HashStore(), env, torch.device("cpu"), FAR_S).create("tp", (0, 1), 0)
        assert env.left_s() <= time.monotonic() - started < FAR_S / 2

    @pytest.mark.parametrize("op", ["all_reduce", "recv", "all_gather", "reduce_scatter", "send"])
    @pytest.mark.parametrize(("creation_s", "later_s"), [(FAR_S, 0.5), (1.0, 1.5)])
    @pytest.mark.parametrize("read", [True, False], ids=["read", "sent"])
    def test_then_a_collective_has_its_own_timeout(
        self, op: str, creation_s: float, later_s: float, read: bool
    ) -> None:
        """Rank 1 takes no part."""
        store = dist.HashStore()

        def end(rank: int) -> Any:
            backends = GlooBackends(store, LOOPBACK, later_s, left_s=lambda: creation_s, single_copy=read)
            return backends.create("tp", (0, 1), rank)

        ends = in_threads(2, end)
        group = Group("tp", (0, 1), 0, ends[0], Ledger({"tp": 2}))
        tensor, part = torch.ones(1 << 22), torch.ones(1 << 21)  # more than a socket's buffers hold
        start = {
            "all_reduce": lambda: group.all_reduce(tensor),
            "recv": lambda: group.recv(tensor),
            "all_gather": lambda: group.all_gather(tensor, part),
            "reduce_scatter": lambda: group.reduce_scatter(part, tensor),
            "send": lambda: group.send(tensor),
        }[op]
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="(?i)time"):
            start().wait()
        elapsed = time.monotonic() - started
        group.close()
        ends[1].shutdown()
        assert 0.9 * later_s <= elapsed < FAR_S / 2


def own_addresses() -> set[str]:
    """IPv4 addresses of this machine, without those that only name it to itself."""
    found = [a.address for names in psutil.net_if_addrs().values() for a in names if a.family == socket.AF_INET]
    return {address for address in found if not address.startswith("127.")}
