"""Bytes that leave a node: closed forms for every operation and placement."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_gpt.events import OPS, leaving_bytes, leaving_total, wire_bytes
from dist_gpt.layout import Layout

B = 8000  # divisible by 2, 4, 5, 8
TWO_OF_FOUR = (0, 0, 0, 0, 1, 1, 1, 1)
"""Node of each of eight ranks."""
RING = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


def of_node(
    op: str, ranks: tuple[int, ...], node: int, emulated: bool = False, nodes: tuple[int, ...] = TWO_OF_FOUR
) -> int:
    """Bytes that leave `node` in one call."""
    return sum(leaving_bytes(op, B, ranks, i, nodes, emulated) for i, rank in enumerate(ranks) if nodes[rank] == node)


@pytest.mark.parametrize("op", RING)
def test_a_ring_leaves_each_node_once(op: str) -> None:
    """Eight ranks, consecutive: one edge out of each node, so (2)(n-1)/n of the payload."""
    assert (
        of_node(op, tuple(range(8)), 0) == of_node(op, tuple(range(8)), 1) == (14 if op == "all_reduce" else 7) * B // 8
    )
    assert leaving_bytes(op, B, range(8), 3, TWO_OF_FOUR) == wire_bytes(op, B, 8)
    assert [leaving_bytes(op, B, range(8), i, TWO_OF_FOUR) > 0 for i in range(8)] == [i in (3, 7) for i in range(8)]


@pytest.mark.parametrize("op", RING)
def test_a_ring_that_changes_node_at_every_edge(op: str) -> None:
    """dp across nodes in the worst order: every member's wire bytes leave."""
    assert of_node(op, (0, 4, 1, 5), 0) == 2 * wire_bytes(op, B, 4)


@pytest.mark.parametrize("op", OPS)
def test_nothing_leaves_within_a_node(op: str) -> None:
    ranks = (0, 1) if op in ("send", "recv") else (0, 1, 2, 3)
    assert of_node(op, ranks, 0) == of_node(op, ranks, 0, emulated=True) == 0


def test_all_to_all_leaves_by_pairs() -> None:
    """n/2 members here each send 1/n to each of n/2 elsewhere: n/4 of the payload from each node."""
    for op, emulated in (("all_to_all", False), ("reduce_scatter", True)):
        assert of_node(op, tuple(range(8)), 0, emulated) == 8 * B // 4
        assert leaving_bytes(op, B, range(8), 5, TWO_OF_FOUR, emulated) == B // 2
        assert leaving_bytes(op, B, (0, 4), 0, TWO_OF_FOUR, emulated) == B // 2
    assert leaving_bytes("all_reduce", B, (0, 4), 0, TWO_OF_FOUR, emulated=True) == B


def test_a_pair() -> None:
    assert leaving_bytes("send", B, (1, 5), 0, TWO_OF_FOUR) == B
    assert leaving_bytes("send", B, (5, 1), 1, TWO_OF_FOUR) == B
    assert leaving_bytes("send", B, (0, 1), 0, TWO_OF_FOUR) == 0
    assert leaving_bytes("recv", B, (1, 5), 1, TWO_OF_FOUR) == leaving_bytes("barrier", 0, (1, 5), 1, TWO_OF_FOUR) == 0


def test_an_unknown_operation() -> None:
    with pytest.raises(ValueError, match="unknown collective 'gossip'"):
        leaving_bytes("gossip", B, (0, 4), 0, TWO_OF_FOUR)


@given(
    op=st.sampled_from(RING), nodes=st.lists(st.integers(0, 3), min_size=2, max_size=9), payload=st.integers(0, 10**12)
)
def test_a_ring_the_other_way_round_leaves_each_node_alike(op: str, nodes: list[int], payload: int) -> None:
    """Which way a backend sends is its own business."""
    ranks = list(range(len(nodes)))

    def sums(order: list[int]) -> dict[int, int]:
        return {
            node: sum(leaving_bytes(op, payload, order, i, nodes) for i, r in enumerate(order) if nodes[r] == node)
            for node in nodes
        }

    assert sums(ranks) == sums(ranks[::-1])


@given(
    op=st.sampled_from(OPS[:5]), nodes=st.lists(st.integers(0, 3), min_size=2, max_size=9),
    payload=st.integers(0, 10**12), emulated=st.booleans(),
)  # fmt: skip
def test_no_more_leaves_than_is_sent(op: str, nodes: list[int], payload: int, emulated: bool) -> None:
    for i in range(len(nodes)):
        leaves = leaving_bytes(op, payload, range(len(nodes)), i, nodes, emulated)
        assert 0 <= leaves <= wire_bytes(op, payload, len(nodes))


def test_the_total_of_a_rank() -> None:
    """dp 2 x pp 2 x tp 2 on two nodes: pp leaves the node, dp and tp do not."""
    layout = Layout(pp=2, dp=2, tp=2)
    rank = 1
    groups = {axis: layout.group(axis, rank) for axis in ("world", "data", "embed", "tp")}
    channels = [{"axis": axis} for axis in groups] + [{"axis": "pp", "ranks": [1, 5], "direction": "f"}]
    assert groups["embed"] == (1, 5)
    rows = [
        {"channel": channel, "phase": phase, "op": op, "calls": 2, "payload_bytes": B}
        for channel, phase, op in [
            (0, "control", "all_reduce"), (1, "train", "reduce_scatter"), (2, "train", "all_reduce"),
            (3, "train", "all_gather"), (4, "train", "send"), (4, "train", "recv"), (4, "eval", "send"),
        ]
    ]  # fmt: skip
    # rank 1's next in the world's ring is rank 2, on its own node
    assert leaving_total(rows, channels, groups, rank, TWO_OF_FOUR, True) == {"control": 0, "train": 2 * B, "eval": B}
    assert leaving_total(rows, channels, groups, rank, (0,) * 8) == {"control": 0, "train": 0, "eval": 0}
    by_dp = (0, 0, 1, 1, 0, 0, 1, 1)  # ranks 1 and 3 on different nodes
    assert leaving_total(rows[1:2], channels, groups, rank, by_dp, True) == {"train": B // 2}
