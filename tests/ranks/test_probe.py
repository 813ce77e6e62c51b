"""The probe of every group before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_gpt.comm import probe as probing
from dist_gpt.comm.mesh import Backends, FakeBackends, Mesh, build_mesh
from dist_gpt.events import CONTROL, TRAIN
from dist_gpt.layout import Layout
from tests.ranks.runs import Place
from tests.ranks.threads import on_gloo

LAYOUT = Layout(pp=2, dp=2, tp=2)
CPU = torch.device("cpu")


def test_every_group_and_edge_is_timed_once() -> None:
    def body(rank: int, backends: Backends) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], list[str]]:
        mesh: Mesh = build_mesh(LAYOUT, rank, (0, 1), backends)
        try:
            rows = probing.probe(mesh, CPU, 4096, 2)
            mesh.world.barrier()
            counts = mesh.ledger.counts
            return rows, counts(TRAIN).as_dict(), counts(CONTROL).as_dict(), mesh.ledger.differences
        finally:
            mesh.close()

    results = on_gloo(8, body)
    rows = [row for result in results for row in result[0]]
    met = {(row["axis"], tuple(row["ranks"])) for row in rows}
    expected = {(axis, LAYOUT.group(axis, rank)) for axis in ("world", "data", "embed", "tp") for rank in range(8)}
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
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["world", "data", "embed", "tp", "pp", "pp"]


def test_a_single_rank() -> None:
    mesh = build_mesh(Layout(), 0, (0,), FakeBackends())
    assert probing.probe(mesh, CPU) == []
    assert probing.table([]) == "probe: a single rank, nothing to send"


def test_as_ranks_run_it(tmp_path: Path) -> None:
    """Three ranks under torchrun: pp with three stages has a middle without an embedding."""
    place = Place(tmp_path)
    text = place.config.read_text().replace("num_layers: 2", "num_layers: 3")
    place.config.write_text(text + "parallel: {pp: 3}\n")
    argv = ["--standalone", "--nproc-per-node", "3", "-m", "dist_gpt.comm.probe", str(place.config)]
    run = place.run(argv, "none", module="torch.distributed.run")
    assert run.code == 0, run.err
    head, columns, *lines = run.lines
    assert head == "probe: 1 MiB along every axis" and "bus MB/s" in columns
    assert [line.split()[0] for line in lines] == ["world", "embed", "pp", "pp"]


def test_a_layout_that_was_not_started(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.config.write_text(place.config.read_text() + "parallel: {dp: 2}\n")
    run = place.run([str(place.config)], "none", module="dist_gpt.comm.probe")
    assert run.code == 2 and "1 ranks were started, but the layout pp 1 x dp 2 x cp 1 x tp 1 has 2" in run.err
