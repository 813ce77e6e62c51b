"""The probe of every group before training."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_gpt.comm import probe as probing
from dist_gpt.comm.mesh import Backends, FakeBackends, Mesh, build_mesh
from dist_gpt.comm.rendezvous import RankEnv
from dist_gpt.events import CONTROL, TRAIN
from dist_gpt.layout import Layout
from dist_gpt.plan.steps import layout_of
from tests.ranks.runs import STEPS, Place, Run, finish, run_ranks
from tests.ranks.test_optim import tiny
from tests.ranks.threads import on_gloo

LAYOUT = Layout(pp=2, dp=2, tp=2)
CPU = torch.device("cpu")
AXES = ("data", "embed", "tp")


def test_every_group_and_edge_is_timed_once() -> None:
    def body(rank: int, backends: Backends) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], list[str]]:
        mesh: Mesh = build_mesh(LAYOUT, rank, (0, 1), backends)
        try:
            rows = probing.probe(mesh, AXES, CPU, 4096, 2)
            mesh.world.barrier()
            counts = mesh.ledger.counts
            return rows, counts(TRAIN).as_dict(), counts(CONTROL).as_dict(), mesh.ledger.differences
        finally:
            mesh.close()

    results = on_gloo(8, body)
    rows = [row for result in results for row in result[0]]
    met = {(row["axis"], tuple(row["ranks"])) for row in rows}
    expected = {(axis, LAYOUT.group(axis, rank)) for axis in AXES for rank in range(8)}
    expected |= {("pp f", (rank, rank + 4)) for rank in range(4)} | {("pp b", (rank + 4, rank)) for rank in range(4)}
    assert met == expected and len(rows) == len(expected)
    for row in rows:
        n = len(row["ranks"])
        factor = 1 if row["op"] == "send" else 2 * (n - 1) / n
        assert row["busbw"] == pytest.approx(factor * 4096 / row["seconds"])
    for _, train, control, differences in results:
        assert (train, differences) == ({}, [])
        assert control["tp"]["all_reduce"]["calls"] == 3  # one to warm up, two timed
    text = probing.table(rows)
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["data", "embed", "tp", "pp", "pp"]


def test_a_single_rank() -> None:
    mesh = build_mesh(Layout(), 0, (0,), FakeBackends())
    assert probing.probe(mesh, AXES, CPU) == []
    assert probing.table([]) == "probe: a single rank, nothing to send"


PARALLEL: list[tuple[dict[str, int], dict[str, str], list[str]]] = [
    ({"dp": 2, "tp": 2}, {}, ["data", "tp"]),
    ({"dp": 4}, {"sharding": "zero3", "shard_group": "node"}, ["shard", "replica"]),
]


@pytest.mark.parametrize(("parallel", "optim", "axes"), PARALLEL, ids=["data and tensor", "inside nodes"])
def test_rank_0_has_all_groups_and_every_rank_what_it_issued(
    parallel: dict[str, int], optim: dict[str, str], axes: list[str]
) -> None:
    store = dist.HashStore()
    config = tiny(parallel=parallel, **optim)
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"nodes": 2})})
    layout = layout_of(config)

    def body(rank: int, backends: Backends) -> probing.Network:
        mesh = build_mesh(layout, rank, (0,), backends)
        try:
            mesh.world.barrier()  # control traffic before is not the probe's
            none_left = time.monotonic()  # of the time to create groups in
            env = RankEnv(rank, 4, 0, 1, "127.0.0.1", 0, 0, none_left)
            return probing.network(config, mesh, CPU, store, env)
        finally:
            mesh.close()

    first, *others = on_gloo(4, body)
    groups = {(axis, layout.group(axis, rank)) for axis in axes for rank in range(4)}
    assert {(row["axis"], tuple(row["ranks"])) for row in first.rows} == groups
    assert first.hosts == dict.fromkeys(range(4), socket.gethostname())
    assert [(row["axis"], row["groups"]) for row in first.fact()["slowest"]] == [(axis, 2) for axis in axes]
    calls = 1 + probing.REPEATS
    for found in (first, *others):
        assert set(found.moved) == {*axes, "world"}
        for axis in axes:
            assert found.moved[axis]["all_reduce"]["payload_bytes"] == calls * probing.PAYLOAD_BYTES["cpu"]
        assert found.fact()["comm"] is found.moved and found.seconds > 0
    assert all(found.rows == [] for found in others)


@pytest.mark.parametrize("holders", [(0, 1, 2, 3, 0, 1, 2, 3), (0, 1, 2, 3, 3, 2, 1, 0)], ids=["around", "V"])
def test_pipelines_with_several_stages_a_rank(holders: tuple[int, ...]) -> None:
    def body(rank: int, backends: Backends) -> list[dict[str, Any]]:
        mesh = build_mesh(Layout(pp=4), rank, holders, backends)
        try:
            return probing.probe(mesh, AXES, CPU, 4096, 1)
        finally:
            mesh.close()

    rows = [row for found in on_gloo(4, body) for row in found if row["op"] == "send"]
    steps = {(a, b) for a, b in zip(holders, holders[1:], strict=False) if a != b}
    assert {tuple(row["ranks"]) for row in rows} == steps | {(b, a) for a, b in steps}


def test_where_a_rank_is_that_hangs_or_fails_in_it() -> None:
    mesh = build_mesh(Layout(tp=2), 0, (0,), FakeBackends())
    seen: list[dict[str, Any]] = []

    def fails(*_: object) -> None:
        seen.append(mesh.ledger.position())
        raise RuntimeError("the link is down")

    mesh.tp.backend = SimpleNamespace(allreduce=fails)
    with pytest.raises(RuntimeError, match="the link is down"):
        probing.probe(mesh, ("tp",), CPU, 4096, 1)
    for place in (*seen, mesh.ledger.position()):
        where = [place[key] for key in ("phase", "action", "axis", "op", "state")]
        assert where == [CONTROL, "network probe", "tp", "all_reduce", "issuing"]
    assert mesh.ledger.in_collective


def test_a_group_that_is_slow_is_told_with_its_nodes() -> None:
    def row(axis: str, ranks: list[int], busbw: float) -> dict[str, Any]:
        return {"axis": axis, "op": "all_reduce", "ranks": ranks, "bytes": 1, "seconds": 1.0, "busbw": busbw}

    hosts = {rank: f"n{rank // 2}" for rank in range(12)}
    pairs = [row("tp", [rank, rank + 1], 900e6) for rank in range(0, 12, 2)]
    across = [row("pp f", [1, 2], 9e6), row("pp f", [0, 1], 800e6), row("pp f", [2, 3], 850e6)]
    assert probing.slow_groups([*pairs, *across], hosts) == [], "an edge across nodes is not of the kind of one inside"
    pairs[2]["busbw"] = 299e6
    (line,) = probing.slow_groups([*pairs, *across], hosts)
    assert line == (
        "probe: slow: tp group of ranks 4, 5 on n2: 299.0 MB/s, others 900.0; check the links and load of these nodes"
    )
    assert probing.slow_groups(pairs[1:3], hosts) == [], "of two nobody knows which is the usual one"


@pytest.mark.parametrize("preflight", ["strict", pytest.param("off", marks=pytest.mark.all_cells)])
def test_a_run_on_two_nodes_begins_with_it(preflight: str, tmp_path: Path) -> None:
    """Two torchruns, as on two nodes, without a launcher of ours."""
    place = Place(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    argv = place.argv("train", "two", sets={"parallel.dp": 2, "launch.preflight": preflight})
    way = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    nodes = [
        place.start([*way, "--node-rank", str(n), "-m", "dist_gpt", *argv], "torch.distributed.run") for n in range(2)
    ]
    for node in nodes:
        node.read_along()
    runs = [Run(node.returncode, *said, tmp_path / "two") for node in nodes for said in [finish(node)]]
    assert [node.wait() for node in nodes] == [0, 0], runs[0].err + runs[1].err
    facts = [[row["probe"] for row in runs[0].events(rank) if "probe" in row] for rank in range(2)]
    heads = [line for line in runs[0].lines if line.startswith("probe: ")]
    if preflight == "off":
        assert (facts, heads) == ([[], []], [])
        return
    assert heads == ["probe: 1 MiB along every axis"] and any("all_reduce" in line for line in runs[0].lines)
    assert [len(fact) for fact in facts] == [1, 1]
    (slow,) = facts[0][0]["slowest"]
    assert (slow["axis"], slow["ranks"], slow["groups"], slow["busbw_median"]) == ("data", [0, 1], 1, slow["busbw"])
    assert facts[1][0]["slowest"] == [] and facts[1][0]["comm"] == facts[0][0]["comm"]
    assert len([row for row in runs[0].metrics() if row.get("loss") is not None]) == STEPS


def test_as_ranks_run_it(tmp_path: Path) -> None:
    """A pipeline with three stages has a middle without an embedding."""
    place = Place(tmp_path)
    text = place.config.read_text().replace("num_layers: 2", "num_layers: 3")
    place.config.write_text(text + "parallel: {pp: 3}\n")
    head, columns, *lines = run_ranks(tmp_path, "dist_gpt.comm.probe", place.config, ranks=3).splitlines()
    assert head == "probe: 1 MiB along every axis" and "bus MB/s" in columns
    assert [line.split()[0] for line in lines] == ["embed", "pp", "pp"]


def test_a_layout_that_was_not_started(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.config.write_text(place.config.read_text() + "parallel: {dp: 2}\n")
    run = place.run([str(place.config)], "none", module="dist_gpt.comm.probe")
    assert run.code == 2 and "the world size is 1, but the layout pp 1 x dp 2 x cp 1 x tp 1 needs 2" in run.err
