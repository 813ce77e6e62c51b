"""Test and time a small collective along every axis and a message over every pipeline edge, before training.

Every run on several nodes begins with `network` (launch.preflight); `python -m dist_gpt.comm.probe CONFIG`, which each
rank of `dist-gpt launch CONFIG --check` runs, ends after it. Rank 0 has the result, as a table and as rows.
Bus bandwidth is that of nccl-tests (doc/PERFORMANCE.md): all-reduce 2 (n-1)/n x bytes / time, send bytes / time.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from dist_gpt.comm.group import Pending
from dist_gpt.comm.mesh import Mesh, build_mesh
from dist_gpt.comm.rendezvous import (
    RankEnv,
    RendezvousError,
    Store,
    choose_device,
    connect_store,
    identity,
    make_backends,
    rank_env,
    roll_call,
    scoped,
    wait_for,
)
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import config_hash, load
from dist_gpt.config.schema import Config
from dist_gpt.events import CONTROL
from dist_gpt.plan.steps import layout_of
from dist_gpt.schedule.orders import placement

PAYLOAD_BYTES = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Bytes by device type: enough that the link dominates the time, not the call, on the usual links of such devices."""
REPEATS = 5
NAME = "network probe"
BAD_INPUT = 2
SLOW = 3.0
"""A group with this many times less bandwidth than others of its kind is reported."""
ENOUGH = 3
"""Least number of groups of a kind for one of them to be called slow."""


@dataclass(frozen=True)
class Network:
    """Result of the probe. On rank 0 `rows` has all groups, on the others none.

    `moved` is the traffic that this rank issued for it: {axis: {op: {calls, payload_bytes, wire_bytes}}}.
    """

    rows: list[dict[str, Any]]
    hosts: dict[int, str]
    seconds: float
    moved: dict[str, dict[str, dict[str, int]]]

    def lines(self) -> list[str]:
        """Return rank 0's result as lines of text for users."""
        return [*table(self.rows).splitlines(), *slow_groups(self.rows, self.hosts)]

    def fact(self) -> dict[str, Any]:
        """Return the result for the events file: one row per axis, however many groups there are."""
        slowest = [{**slow, "groups": groups, "busbw_median": usual} for slow, groups, usual in by_axis(self.rows)]
        return {"seconds": self.seconds, "comm": self.moved, "slowest": slowest}


def network(config: Config, mesh: Mesh, device: torch.device, store: Store, env: RankEnv) -> Network:
    """Probe all groups that carry large tensors in training; all ranks call it together."""
    started, before = time.perf_counter(), mesh.ledger.counts(CONTROL).copy()
    rows = probe(mesh, axes_of(config), device)
    rows, hosts = gather(scoped(store, "probe"), env, rows, config.launch.timeout_s)
    moved = mesh.ledger.counts(CONTROL).since(before).as_dict()
    return Network(rows, hosts, time.perf_counter() - started, moved)


def axes_of(config: Config) -> tuple[str, ...]:
    """Return the axes with collectives of large tensors; on others NCCL would keep buffers for nothing."""
    data = ("shard", "replica") if layout_of(config).shard else ("data",)
    return (*data, *(("embed",) if config.model.tie_embeddings else ()), "tp")


def probe(
    mesh: Mesh, axes: Sequence[str], device: torch.device, payload: int | None = None, repeats: int = REPEATS
) -> list[dict[str, Any]]:
    """Time every group of this rank along `axes`, and its edges, as control traffic; all ranks call it together.

    Return, for each group of which this rank is the first member, and each edge that it receives from: {axis, op,
    ranks, bytes, seconds (of one call), busbw (bytes/s)}. All groups of an axis work at the same time, as in training.
    """
    found = []
    payload = PAYLOAD_BYTES[device.type] if payload is None else payload
    tensor = torch.zeros(payload // 4, dtype=torch.float32, device=device)
    with mesh.ledger.aside(NAME):
        for axis in axes:
            group = mesh[axis]
            mesh.world.barrier()  # a rank alone in its group must not run ahead either
            if group.size > 1:
                seconds = _time(partial(group.all_reduce, tensor), device, repeats)
                if group.index == 0:
                    wire = 2 * (group.size - 1) / group.size * payload
                    found.append(_row(axis, "all_reduce", group.ranks, payload, seconds, wire))
        mesh.world.barrier()
        for (_, _, direction), edge in sorted(mesh.edges.items()):  # the same order on all ranks: no deadlock
            seconds = _time(partial(edge.send if edge.index == 0 else edge.recv, tensor), device, repeats)
            if edge.index == 1:  # a send is done when the network has taken it, a receive when it is here
                found.append(_row(f"pp {direction}", "send", edge.ranks, payload, seconds, payload))
        mesh.world.barrier()  # edges are timed one after the other, so the last stage comes late
    return found


def _row(axis: str, op: str, ranks: Sequence[int], payload: int, seconds: float, wire: float) -> dict[str, Any]:
    return {"axis": axis, "op": op, "ranks": list(ranks), "bytes": payload, "seconds": seconds, "busbw": wire / seconds}


def _time(call: Callable[[], Pending], device: torch.device, repeats: int) -> float:
    """Return the seconds of one call, leaving out the first, which may open connections."""
    # a GPU runs behind the host, so the host waits for it inside the call: a hang is then seen as one
    over = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
    call().wait(over)
    started = time.perf_counter()
    for _ in range(repeats):
        call().wait(over)
    return max(1e-9, (time.perf_counter() - started) / repeats)


def by_axis(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], int, float]]:
    """Return (row of the slowest group, number of groups, median bus bandwidth) of each axis."""
    axes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        axes[row["axis"]].append(row)
    return [
        (min(found, key=lambda row: float(row["busbw"])), len(found), median(row["busbw"] for row in found))
        for found in axes.values()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per axis: number and size of groups, and the slowest one's time, bandwidth and ranks."""
    if not rows:
        return "probe: a single rank, nothing to send"
    lines = [f"{'axis':8}{'call':12}{'groups':>7}{'ranks':>7}{'ms':>10}{'bus MB/s':>11}  slowest group"]
    for slow, groups, _ in by_axis(rows):
        ranks = ", ".join(map(str, slow["ranks"][:8])) + (", ..." if len(slow["ranks"]) > 8 else "")
        lines.append(
            f"{slow['axis']:8}{slow['op']:12}{groups:7}{len(slow['ranks']):7}{slow['seconds'] * 1e3:10.3f}"
            f"{slow['busbw'] / 1e6:11.1f}  {ranks}"
        )
    return f"probe: {rows[0]['bytes'] / 2**20:g} MiB along every axis\n" + "\n".join(lines)


def slow_groups(rows: Sequence[dict[str, Any]], hosts: Mapping[int, str]) -> list[str]:
    """Return a line for each group with far less bandwidth than others of its axis over as many hosts."""
    kinds: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[row["axis"], len({hosts.get(rank) for rank in row["ranks"]})].append(row)
    lines = []
    for (axis, _), alike in kinds.items():
        usual = median(row["busbw"] for row in alike)
        for row in alike if len(alike) >= ENOUGH else ():
            if row["busbw"] * SLOW < usual:
                where = ", ".join(dict.fromkeys(hosts.get(rank, "?") for rank in row["ranks"]))
                lines.append(
                    f"probe: slow: {axis} group of ranks {', '.join(map(str, row['ranks'][:8]))} on {where}: "
                    f"{row['busbw'] / 1e6:.1f} MB/s, others {usual / 1e6:.1f}; check the links and load of these nodes"
                )
    return lines


def gather(
    store: Store, env: RankEnv, rows: list[dict[str, Any]], timeout_s: float
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Return all ranks' rows and hosts on rank 0, which may host the store and so exits last; nothing on the others."""
    store.set(str(env.rank), json.dumps([socket.gethostname(), rows]))
    if env.rank != 0:
        return [], {}
    keys = {rank: str(rank) for rank in range(env.world)}
    wait_for(store, env, keys, "finish the probe", timeout_s)
    found = {rank: json.loads(store.get(key)) for rank, key in keys.items()}
    return [row for _, theirs in found.values() for row in theirs], {rank: host for rank, (host, _) in found.items()}


def main(argv: Sequence[str]) -> int:
    """Run the probe; return exit code 0, or 2 where the configuration or the ranks do not fit."""
    try:
        config = load(argv[0])
        env = rank_env(config.launch.timeout_s)
        p = config.parallel
        layout = layout_of(config)
        if env.world != layout.world:
            raise RendezvousError(
                f"the world size is {env.world}, but the layout {layout} needs {layout.world}: start that many ranks, "
                "or change the degrees in parallel"
            )
        store = connect_store(env)
        device = choose_device(env, config.launch.backend)
        roll_call(store, env, identity(config_hash(config)))
    except (ConfigError, RendezvousError) as error:
        print(f"dist-gpt: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    holders = placement(p.schedule, p.pp, p.virtual_stages)
    backends = make_backends(store, env, device, config.launch.timeout_s, config.launch.reads_memory)
    mesh = build_mesh(layout, env.rank, holders, backends)
    try:
        found = network(config, mesh, device, store, env)
        mesh.world.barrier()
    finally:
        mesh.close()
    if env.rank == 0:
        print("\n".join(found.lines()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
