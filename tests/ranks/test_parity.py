"""The parity cells: every layout against one process, and schedules that compute W apart from B.

One process is held against the independent plain GPT in test_one_process.py; together they say that every layout
trains the model that the plain GPT is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from dist_gpt.verify import MEASURES, TOLERANCE
from tests.ranks.cells import COVERING, REST, SPLIT_2, SPLIT_3, Cell, make_cell
from tests.ranks.pool import Pool
from tests.ranks.test_plants import BASE

PARAMETERS = [
    pytest.param(cell, id=cell.name, marks=[] if covers else [pytest.mark.all_cells])
    for cells, covers in ((COVERING, True), (REST, False))
    for cell in cells
]


def assert_certified(result: dict[str, Any], record_property: Any, name: str) -> None:
    """The verdict, and each thing that it stands on; `record_property` keeps a row for the table at the end."""
    worst = result["worst"]
    record_property("parity", {"cell": name, **worst})
    print(f"{name}: " + ", ".join(f"{measure} {worst[measure]:.1e}" for measure in MEASURES), result["accounting"])
    assert result["differences"] == []
    assert result["accounting"] == "exact"
    for measure in MEASURES:
        assert worst[measure] <= TOLERANCE, f"{measure}: {worst[measure]:.2e} at {result['where'][measure]}"
    assert result["verdict"] == "pass"


def test_the_tolerance_is_the_promised_one() -> None:
    assert TOLERANCE == 1e-10


@pytest.mark.parametrize("cell", PARAMETERS)
def test_layout_equals_one_process(pool: Pool, cell: Cell, record_property: Any) -> None:
    assert_certified(pool.certify(cell.config, cell.world), record_property, cell.name)


@pytest.mark.parametrize(("grid", "pp"), [(SPLIT_2, 2), (SPLIT_3, 3)], ids=["pp2", "pp3"])
@pytest.mark.parametrize("tp", [1, 2], ids=["tp1", "tp2-sp"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weight_gradients_apart_from_input_gradients(
    pool: Pool, grid: str, pp: int, tp: int, family: str, record_property: Any
) -> None:
    """The seam on which zero-bubble schedules build, in hand-written orders."""
    options = {"pp": pp, "tp": tp, "sequence_parallel": tp > 1, "family": family, "micro_batches": 4, "micro_batch": 2}
    cell = make_cell(BASE | options)
    assert cell is not None
    result = pool.certify(cell.config, cell.world, grid=grid)
    assert_certified(result, record_property, f"W apart from B, pp {pp}, tp {tp}, {family}")


def apart_and_sharded() -> Iterator[ParameterSet]:
    """Full recomputation with every stage and both tp: of each stage one in `make test`, in turn."""
    forms = (("none", 1, True), ("full", 2, False), ("selective", 2, True), ("full", 1, True))
    for number, sharding in enumerate(("zero1", "zero2", "zero3", "zero3_kept")):
        for recompute, tp, tied in forms:
            more = recompute == "full" and tp != 1 + number % 2
            yield pytest.param(recompute, tp, tied, sharding, marks=[pytest.mark.all_cells] if more else [])


@pytest.mark.parametrize(("recompute", "tp", "tied", "sharding"), list(apart_and_sharded()))
def test_weight_gradients_apart_and_sharded(
    pool: Pool, sharding: str, recompute: str, tp: int, tied: bool, record_property: Any
) -> None:
    """Whole gradients are there in the weight step alone. The first of the two stages has two layers."""
    options = {
        **{"dp": 2, "pp": 2, "tp": tp, "sequence_parallel": tp > 1, "tied": tied, "dropout": 0.1},
        **{"sharding": sharding, "recompute": recompute, "micro_batches": 4, "micro_batch": 2},
    }
    cell = make_cell(BASE | options)
    assert cell is not None
    config = {**cell.config, "model": {**cell.config["model"], "num_layers": 3}}
    result = pool.certify(config, cell.world, grid=SPLIT_2)
    assert_certified(result, record_property, f"W apart from B, {sharding}, recompute {recompute}, tp {tp}")
