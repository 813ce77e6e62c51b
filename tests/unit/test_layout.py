"""Ranks on the mesh: coordinates, groups and the tied pair, as properties over many shapes."""

from __future__ import annotations

from itertools import product

import pytest

from dist_gpt.layout import AXES, BASE_AXES, Layout, even_split

SHAPES = [
    Layout(*shape) for shape in ((1, 1, 1, 1), (2, 2, 1, 2), (3, 2, 1, 4), (4, 1, 3, 2), (2, 3, 2, 5), (1, 6, 1, 1))
]
EVERY_SHAPE = pytest.mark.parametrize("layout", SHAPES, ids=str)


@EVERY_SHAPE
def test_coordinates_and_ranks_are_a_bijection(layout: Layout) -> None:
    places = list(product(*(range(getattr(layout, axis)) for axis in BASE_AXES)))
    assert [layout.rank(*place) for place in places] == list(range(layout.world))  # tp fastest, pp slowest
    for rank, place in enumerate(places):
        at = layout.coords(rank)
        assert (at.pp, at.dp, at.cp, at.tp) == place


@EVERY_SHAPE
@pytest.mark.parametrize("axis", sorted(AXES))
def test_groups_of_an_axis_partition_the_world(layout: Layout, axis: str) -> None:
    groups = {layout.group(axis, rank) for rank in range(layout.world)}
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
    assert {len(group) for group in groups} == {layout.size(axis)}
    for group in groups:
        assert list(group) == sorted(group)
        for rank in group:
            assert layout.group(axis, rank) == group


@EVERY_SHAPE
@pytest.mark.parametrize("axis", sorted(AXES))
def test_a_group_holds_exactly_the_ranks_that_differ_along_its_axis_only(layout: Layout, axis: str) -> None:
    fixed = [a for a in BASE_AXES if a not in AXES[axis]]
    for rank in range(layout.world):
        here = layout.coords(rank)
        alike = [
            other
            for other in range(layout.world)
            if all(getattr(layout.coords(other), a) == getattr(here, a) for a in fixed)
        ]
        assert list(layout.group(axis, rank)) == alike


@EVERY_SHAPE
def test_the_tied_pair_joins_first_and_last_stage(layout: Layout) -> None:
    for rank in range(layout.world):
        here, group = layout.coords(rank), layout.group("embed", rank)
        if here.pp not in (0, layout.pp - 1) or layout.pp == 1:
            assert group == (rank,)
            continue
        first, last = (layout.coords(other) for other in group)
        assert rank in group and (first.pp, last.pp) == (0, layout.pp - 1)
        assert {(c.dp, c.cp, c.tp) for c in (first, last)} == {(here.dp, here.cp, here.tp)}
    assert layout.size("embed") == min(2, layout.pp)


@EVERY_SHAPE
def test_the_data_index_is_the_place_in_the_data_group(layout: Layout) -> None:
    for rank in range(layout.world):
        assert layout.group("data", rank)[layout.data_index(rank)] == rank
    assert layout.size("data") == layout.data == layout.dp * layout.cp


def test_a_worked_example() -> None:
    layout = Layout(pp=2, dp=2, cp=1, tp=2)
    assert str(layout.coords(5)) == "pp 1, dp 0, cp 0, tp 1"
    assert layout.group("tp", 5) == (4, 5)
    assert layout.group("data", 5) == layout.group("dp", 5) == (5, 7)
    assert layout.group("pp", 5) == layout.group("embed", 5) == (1, 5)
    assert layout.group("model", 5) == (0, 1, 4, 5)


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is outside the world of 8 ranks \(pp 2 x dp 2 x cp 1 x tp 2\)"):
        Layout(2, 2, 1, 2).coords(rank)


@pytest.mark.parametrize(("total", "parts"), [(12, 4), (13, 4), (3, 5), (0, 2), (50257, 8), (7, 1)])
def test_even_split_tiles_and_differs_by_at_most_one(total: int, parts: int) -> None:
    pieces = [even_split(total, parts, index) for index in range(parts)]
    assert pieces[0][0] == 0 and pieces[-1][1] == total
    assert all(left[1] == right[0] for left, right in zip(pieces, pieces[1:], strict=False))
    widths = [stop - start for start, stop in pieces]
    assert max(widths) - min(widths) <= 1 and widths == sorted(widths, reverse=True)
