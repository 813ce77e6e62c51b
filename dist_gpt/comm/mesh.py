"""Mesh: all groups of one rank.

Groups are built directly on a store, by their members only: the cost of creation depends on the groups a rank is in,
never on the size of the world, and no global process group is needed. (`torch.distributed.new_group` with local
synchronisation names a group after a per-process counter, which differs between ranks that are in different numbers
of groups.) Every rank creates its groups in one global order, (axis, ranks), so creation cannot deadlock.

Pipeline messages travel on one two-rank group per directed edge and direction of the pass; that is the channel
layout `edge` that `schedule.check` proves free of deadlock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dist_gpt.comm.cma import Nearby
from dist_gpt.comm.connect import Refused, connect_members
from dist_gpt.comm.group import Group
from dist_gpt.comm.ledger import Ledger
from dist_gpt.layout import Layout

NEAR_AXES = ("data", "embed", "tp", "shard", "replica")
"""Axes whose members read each other's memory where they can: their collectives are large or many."""
COLLECTIVE_AXES = ("world", "data", "embed", "tp")
Edge = tuple[int, int, str]


class Backends(Protocol):
    """Factory of the process groups of a mesh."""

    def create(self, name: str, ranks: tuple[int, ...], rank: int) -> Any:
        """Return the process group `name` of `ranks`, or None for a single rank; `rank` is this rank."""


class Mesh:
    """Groups of `rank` by axis, and its pipeline edges (source pp, destination pp, 'f' or 'b')."""

    def __init__(self, layout: Layout, rank: int, ledger: Ledger, groups: dict[str, Group], edges: dict[Edge, Group]):
        self.layout = layout
        self.rank = rank
        self.coords = layout.coords(rank)
        self.ledger = ledger
        self.groups = groups
        self.edges = edges
        self._alone = Group("replica", (rank,), rank, None, ledger)

    def __getitem__(self, axis: str) -> Group:
        return self.groups[axis]

    @property
    def tp(self) -> Group:
        """Ranks along the tensor-parallel axis."""
        return self.groups["tp"]

    @property
    def data(self) -> Group:
        """Ranks over which gradients are summed (dp x cp)."""
        return self.groups["data"]

    @property
    def shard(self) -> Group:
        """Ranks among which state is sharded."""
        return self.groups["shard"] if self.layout.shard else self.groups["data"]

    @property
    def replica(self) -> Group:
        """Ranks that hold the same shard; only this one where state is sharded over all data ranks."""
        return self.groups.get("replica", self._alone)

    @property
    def world(self) -> Group:
        """All ranks of the run."""
        return self.groups["world"]

    def edge(self, source: int, destination: int, direction: str) -> Group:
        """Return the pair that carries activations ('f') or gradients ('b') from pp rank `source` to `destination`."""
        return self.edges[source, destination, direction]

    @property
    def reads_memory(self) -> bool:
        """True if members of some group of this rank read each other's memory."""
        return any(group.near is not None for group in self.groups.values())

    @property
    def refusal(self) -> str:
        """Why members on one node may not read each other's memory; empty where they may, or are on several nodes."""
        return next((group.refusal for group in self.groups.values() if group.refusal), "")

    def close(self) -> None:
        """Close every group, even if closing one of them fails."""
        with ExitStack() as stack:
            for group in [*self.groups.values(), *self.edges.values()]:
                stack.callback(group.close)


def group_sizes(layout: Layout) -> dict[str, int]:
    """Return the number of ranks per axis, as the ledger needs it."""
    sizes = {axis: layout.size(axis) for axis in ("world", "data", "dp", "cp", "tp", "shard", "replica")}
    return {**sizes, "embed": 2 if layout.pp > 1 else 1, "pp": 2}


def edges_of(holders: Iterable[int], pp: int) -> list[Edge]:
    """Return the directed edges that pipeline rank `pp` uses when chunk i is held by holders[i]."""
    held = list(holders)
    found: set[Edge] = set()
    for source, destination in zip(held, held[1:], strict=False):
        if source != destination and pp in (source, destination):
            found |= {(source, destination, "f"), (destination, source, "b")}
    return sorted(found)


def build_mesh(
    layout: Layout, rank: int, holders: Iterable[int], backends: Backends, ledger: Ledger | None = None
) -> Mesh:
    """Create the groups of `rank`; `holders` has the pipeline rank of each chunk. On an error, close those created."""
    ledger = ledger or Ledger(group_sizes(layout))
    here = layout.coords(rank)
    with ExitStack() as undo:

        def make(axis: str, name: str, ranks: tuple[int, ...], direction: str = "") -> Group:
            group = Group(axis, ranks, rank, backends.create(name, ranks, rank), ledger, direction)
            undo.callback(group.close)
            return group

        axes = COLLECTIVE_AXES + (("shard", "replica") if layout.shard else ())
        groups = {axis: make(axis, axis, layout.group(axis, rank)) for axis in axes}
        edges = {}
        for source, destination, direction in edges_of(holders, here.pp):
            ranks = (
                layout.rank(source, here.dp, here.cp, here.tp),
                layout.rank(destination, here.dp, here.cp, here.tp),
            )
            edges[source, destination, direction] = make("pp", f"pp_{direction}", ranks, direction)
        mesh = Mesh(layout, rank, ledger, groups, edges)
        undo.pop_all()
    return mesh


class GlooGroup(dist.ProcessGroupGloo):
    """Gloo group whose operations can have another timeout than its connections had.

    `one_node`: the whole run is on one node. `near`: its members, where they read each other's memory; `refusal`: why
    they may not.
    """

    one_node = False
    near: Nearby | None = None
    refusal = ""

    def limit(self, timeout: timedelta) -> None:
        """Set the timeout of every later operation."""
        self._set_default_timeout(timeout)
        self.timeout = timeout

    def send(self, tensors: list[torch.Tensor], destination: int, tag: int) -> Any:
        """Send `tensors` to member `destination`, within the group's timeout."""
        return _PairWork(super().send(tensors, destination, tag), self.timeout)  # type: ignore[misc]

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Any:
        """Receive `tensors` from member `source`, within the group's timeout."""
        return _PairWork(super().recv(tensors, source, tag), self.timeout)  # type: ignore[misc]


class _PairWork:
    """Gloo send or receive with the group's timeout; by itself it keeps that of the connections. It has no future."""

    __slots__ = ("is_completed", "_timeout", "_work")

    def __init__(self, work: Any, timeout: timedelta) -> None:
        self._work = work
        self._timeout = timeout
        self.is_completed = work.is_completed

    def wait(self) -> None:
        self._work.wait(self._timeout)


class GlooBackends:
    """Factory of gloo groups on a shared store, over the interface of address `host` (loopback on one node).

    `interfaces`, if there are any, replace `host`. `timeout_s` limits a collective; creating a group may take the
    seconds that `left_s` returns by then (default `timeout_s`). `one_node`: all ranks are on one node.
    `single_copy`: members of a group on one node read each other's memory where the system permits it.
    """

    def __init__(
        self,
        store: dist.Store,
        host: str,
        timeout_s: float,
        interfaces: Sequence[str] = (),
        left_s: Callable[[], float] | None = None,
        one_node: bool = True,
        single_copy: bool = True,
    ) -> None:
        self.store = store
        self.timeout_s = timeout_s
        self.left_s = left_s or (lambda: timeout_s)
        create = dist.ProcessGroupGloo.create_device
        self.devices = [create(interface=name) for name in interfaces] or [create(hostname=host)]
        self.one_node, self.single_copy = one_node, single_copy

    def create(self, name: str, ranks: tuple[int, ...], rank: int) -> Any:
        """Return the connected group of `ranks`, or None for a single rank; all members call it."""
        if len(ranks) == 1:
            return None
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = self.devices
        options._timeout = timedelta(seconds=self.left_s())
        options._threads = 1
        store = dist.PrefixStore(_key(name, ranks), self.store)
        index = ranks.index(rank)
        backend = self.make_group(store, index, len(ranks), options)
        if self.single_copy and name in NEAR_AXES:
            try:
                backend.near = connect_members(backend, ranks, index, self.timeout_s)
            except Refused as refusal:
                backend.refusal = str(refusal)
        backend.limit(timedelta(seconds=self.timeout_s))
        backend.one_node = self.one_node
        return backend

    def make_group(self, store: dist.Store, index: int, size: int, options: Any) -> GlooGroup:
        """Return a new group, which the caller configures."""
        return GlooGroup(store, index, size, options)


class NcclBackends:
    """Factory of NCCL groups, one GPU per process. Never run with several ranks by the authors; see the README."""

    def __init__(
        self, store: dist.Store, device: torch.device, timeout_s: float, left_s: Callable[[], float] | None = None
    ) -> None:
        self.store = store
        self.device = device
        self.timeout_s = timeout_s
        self.left_s = left_s or (lambda: timeout_s)

    def create(self, name: str, ranks: tuple[int, ...], rank: int) -> Any:
        """Return the connected group of `ranks`, or None for a single rank; all members call it."""
        if len(ranks) == 1:
            return None
        return self.connect(name, ranks, rank)

    def connect(self, name: str, ranks: tuple[int, ...], rank: int) -> Any:
        """Return a new connected group, possibly of a single rank."""
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self.left_s())
        store = dist.PrefixStore(_key(name, ranks), self.store)
        backend = dist.ProcessGroupNCCL(store, ranks.index(rank), len(ranks), options)
        backend.eager_connect_single_device(self.device)
        backend._set_default_timeout(timedelta(seconds=self.timeout_s))
        return backend


class FakeBackends:
    """Factory of torch's fake process groups, which return at once and move nothing, for dry runs on meta tensors.

    `as_gloo`: groups that reduce gradients emulate operations that gloo lacks, as on gloo.
    """

    def __init__(self, as_gloo: bool = False) -> None:
        self.as_gloo = as_gloo

    def create(self, name: str, ranks: tuple[int, ...], rank: int) -> Any:
        """Return a fake group of `ranks`, or None for a single rank."""
        if len(ranks) == 1:
            return None
        from torch.testing._internal.distributed.fake_pg import FakeProcessGroup

        group = FakeProcessGroup._create_internal(ranks.index(rank), len(ranks))
        return _CalledGloo(group) if self.as_gloo and name in ("data", "shard") else group


class _CalledGloo:
    """Process group that reports gloo's name."""

    one_node = True

    def __init__(self, group: Any) -> None:
        self._group = group

    def name(self) -> str:
        return "gloo"

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._group, attribute)


def _key(name: str, ranks: tuple[int, ...]) -> str:
    """Return a store prefix: equal on all members, different for every group, and short even for thousands of ranks."""
    return f"{name}:{hashlib.sha256(repr(ranks).encode()).hexdigest()}"
