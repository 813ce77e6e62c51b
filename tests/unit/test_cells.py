"""The table of parity cells: legal, without doubles, as wide as promised, and small where it must be quick."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest
import yaml

from dist_gpt.config.load import load
from tests.ranks.cells import (
    ALL,
    AXES,
    COVERING,
    MIXED,
    RANKS,
    SCHEDULES,
    SHARDED,
    SINGLE,
    TABLES,
    Cell,
    choose_covering,
    make_cell,
)  # fmt: skip


@pytest.mark.parametrize("cells", TABLES)
def test_every_cell_is_a_legal_configuration_of_its_world(cells: list[Cell], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for cell in cells:
        path.write_text(yaml.safe_dump(cell.config))
        config = load(str(path), world=cell.world)  # raises with everything that is wrong
        assert config.world_size == cell.world <= RANKS
        assert config.micro_batches == dict(cell.tags)["micro_batches"]


def test_every_stage_meets_every_pipeline_recomputation_and_number_of_micro_batches() -> None:
    keys = ("sharding", "recompute", "tp", "pp", "schedule", "micro_batches")
    seen = {tuple(dict(cell.tags)[key] for key in keys) for cell in [*ALL, *SHARDED]}
    pipelines = [
        (1, "1f1b", (1, 2, 3, 4)),
        (2, "gpipe", (1, 2, 3, 4)),
        (2, "1f1b", (1, 2, 3, 4)),
        (2, "interleaved", (2, 4)),
    ]
    for stage, again, tp, (pp, schedule, counts) in product(MIXED["sharding"], MIXED["recompute"], (1, 2), pipelines):
        assert {(stage, again, tp, pp, schedule, count) for count in counts} <= seen
    assert len(SHARDED) >= 60 and all(cell.world <= RANKS for cell in SHARDED)


def test_no_cell_is_listed_twice() -> None:
    both = [*ALL, *SHARDED]
    assert len({cell.name for cell in both}) == len(both)
    assert len({repr(cell.config) for cell in both}) == len(both)


def test_the_table_is_as_wide_as_promised() -> None:
    assert len(ALL) >= 120
    layouts = {tuple(cell.config["parallel"][axis] for axis in AXES) for cell in ALL}
    tabled = {v for v in product(*AXES.values()) if v[0] * v[1] * v[2] <= RANKS}
    assert layouts == tabled | {(1, 8, 1)}
    assert all(make_cell(options) in COVERING for options in SINGLE)
    seen = {tag for cell in ALL for tag in cell.tags}
    assert seen >= {(option, value) for option, values in MIXED.items() for value in values}
    assert {(c.config["parallel"]["schedule"], c.config["parallel"]["virtual_stages"]) for c in ALL} == set(SCHEDULES)


def test_every_pair_of_option_values_is_in_the_covering() -> None:
    assert {cell.name for cell in COVERING} <= {cell.name for cell in ALL}
    everything = {pair for cell in ALL for pair in cell.pairs}
    covered = {pair for cell in COVERING for pair in cell.pairs}
    assert everything - covered == set()
    assert len(COVERING) <= 48


def legal_pairs() -> set[frozenset[tuple[str, object]]]:
    """Every two option values that some legal cell has, found by trying: not from the cells that were chosen.

    Whether a mixture is legal hangs on the form, `layers` and `micro_batches` (`make_cell`), so of the other options
    every value is tried with every such mixture, and every two of them once.
    """
    free = {option: values for option, values in MIXED.items() if option not in ("layers", "micro_batches")}
    default = {option: values[0] for option, values in free.items()}
    values = [(option, value) for option, values in free.items() for value in values]
    found: set[frozenset[tuple[str, object]]] = set()
    for axes in product(*AXES.values()):
        dp, tp, pp = axes
        for split, (schedule, virtual) in product((False, True), SCHEDULES):
            chunks = pp * virtual
            if dp * tp * pp > RANKS or (split and tp == 1) or (virtual > 1 and (pp == 1 or chunks > 8)):
                continue
            form = {"dp": dp, "tp": tp, "pp": pp, "sequence_parallel": split, "schedule": schedule}
            for layers, count in product(MIXED["layers"], MIXED["micro_batches"]):
                fixed = {**form, "virtual_stages": virtual, "layers": layers, "micro_batches": count}
                if make_cell({**fixed, **default}) is not None:
                    found |= {frozenset(pair) for pair in combinations(fixed.items(), 2)}
                    found |= {frozenset(pair) for pair in product(fixed.items(), values)}
    one = {"dp": 1, "tp": 1, "pp": 1, "sequence_parallel": False, "schedule": "1f1b", "virtual_stages": 1}
    for left, right in combinations(values, 2):
        mixture = {**one, "layers": "uneven", "micro_batches": 1, **default, **dict([left, right])}
        if left[0] != right[0] and make_cell(mixture) is not None:
            found.add(frozenset((left, right)))
    return found


def test_every_legal_pair_of_option_values_is_in_the_covering() -> None:
    legal = legal_pairs()
    covered = {frozenset(pair) for cell in COVERING for pair in cell.pairs}
    assert len(legal) > 1000
    assert sorted(map(str, legal - covered)) == []


def test_a_pair_that_is_not_covered_is_noticed() -> None:
    """The list of legal pairs does not come from the table: a table without a value lacks its pairs."""
    smaller = choose_covering([cell for cell in ALL if ("clip", 0.01) not in cell.tags])
    covered = {frozenset(pair) for cell in smaller for pair in cell.pairs}
    assert any(("clip", 0.01) in pair for pair in legal_pairs() - covered)


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
