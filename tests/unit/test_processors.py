"""Which processors a rank keeps to, and that it lets go of them."""

from __future__ import annotations

import os
import threading

import pytest

from dist_gpt import cpu
from dist_gpt.cpu import allowed, kept, share, shared


@pytest.mark.parametrize(
    ("ranks", "threads", "expected"),
    [
        (1, 1, [[]]),
        (2, 1, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (2, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (2, 5, [[], []]),
        (3, 1, [[0, 1], [2, 3], [4, 5]]),
        (8, 1, [[n] for n in range(8)]),
        (9, 1, [[]] * 9),
    ],
)
def test_everybody_has_as_many_side_by_side(ranks: int, threads: int, expected: list[list[int]]) -> None:
    assert [share(range(8), index, ranks, threads) for index in range(ranks)] == expected


def test_numbers_need_not_follow_each_other() -> None:
    assert [share([1, 3, 8, 9], index, 2, 1) for index in (0, 1)] == [[1, 3], [8, 9]]


@pytest.fixture
def two() -> list[int]:
    cpus = allowed()
    if len(cpus) < 2 or len(cpus) != os.cpu_count():
        pytest.skip("this process is bound already, or there is one processor")
    return cpus


def test_threads_that_are_started_meanwhile_are_kept_too(two: list[int]) -> None:
    found: list[list[int]] = []
    with kept(1, 2, 1) as own:
        assert own == allowed() == two[len(two) // 2 :][: len(two) // 2]
        thread = threading.Thread(target=lambda: found.append(allowed()))
        thread.start()
        thread.join()
        assert shared() == len(two), "what the ranks of the node have between them"
    assert found == [own] and allowed() == two and shared() == len(two)


def test_who_is_bound_already_is_left_alone(two: list[int]) -> None:
    os.sched_setaffinity(0, two[:1])
    try:
        with kept(0, 1, 1) as own, kept(0, 2, 1) as other:
            assert own == other == [] and allowed() == two[:1] and shared() == 1
    finally:
        os.sched_setaffinity(0, two)


def test_a_system_without_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sched_getaffinity", "sched_setaffinity"):
        monkeypatch.delattr(os, name)
    with kept(0, 2, 1) as own:
        assert own == [] and cpu.shared() == os.cpu_count()
