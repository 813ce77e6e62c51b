"""The table of parity cells: legal, without doubles, as wide as promised, and small where it must be quick."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import yaml

from dist_gpt.config.load import load
from tests.ranks.cells import ALL, AXES, COVERING, MIXED, RANKS, SCHEDULES, choose_covering


def test_every_cell_is_a_legal_configuration_of_its_world(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for cell in ALL:
        path.write_text(yaml.safe_dump(cell.config))
        config = load(str(path), world=cell.world)  # raises with everything that is wrong
        assert config.world_size == cell.world <= RANKS
        assert config.micro_batches == dict(cell.tags)["micro_batches"]


def test_no_cell_is_listed_twice() -> None:
    assert len({cell.name for cell in ALL}) == len(ALL)
    assert len({repr(cell.config) for cell in ALL}) == len(ALL)


def test_the_table_is_as_wide_as_promised() -> None:
    assert len(ALL) >= 120
    layouts = {tuple(cell.config["parallel"][axis] for axis in AXES) for cell in ALL}
    assert layouts == {v for v in product(*AXES.values()) if v[0] * v[1] * v[2] <= RANKS}
    seen = {tag for cell in ALL for tag in cell.tags}
    assert seen >= {(option, value) for option, values in MIXED.items() for value in values}
    assert {(c.config["parallel"]["schedule"], c.config["parallel"]["virtual_stages"]) for c in ALL} == set(SCHEDULES)


def test_every_pair_of_option_values_is_in_the_covering() -> None:
    assert {cell.name for cell in COVERING} <= {cell.name for cell in ALL}
    everything = {pair for cell in ALL for pair in cell.pairs}
    covered = {pair for cell in COVERING for pair in cell.pairs}
    assert everything - covered == set()
    assert len(COVERING) <= 40


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("sequence_parallel", True), ("schedule", "interleaved")),
        (("pp", 4), ("tied", True)),
        (("sharding", "zero1"), ("tp", 4)),
        (("heads", "grouped"), ("tp", 3)),
        (("dropout", 0.1), ("sequence_parallel", True)),
        (("clip", 0.01), ("dp", 4)),
    ],
)
def test_pairs_that_went_wrong_elsewhere_are_there(left: tuple[str, object], right: tuple[str, object]) -> None:
    assert any({left, right} <= set(cell.tags) for cell in COVERING)


def test_the_choice_is_a_covering_of_whatever_it_is_given() -> None:
    some = ALL[::7]
    chosen = choose_covering(some)
    assert {pair for cell in chosen for pair in cell.pairs} == {pair for cell in some for pair in cell.pairs}
    assert choose_covering(some) == chosen
