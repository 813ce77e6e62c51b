"""Simulator and drawing of pipeline schedules, against closed forms and published bubbles; none of it needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from dist_gpt.schedule.action import Action, Op, ScheduleError, parse_grid
from dist_gpt.schedule.check import check
from dist_gpt.schedule.draw import draw_orders, draw_text
from dist_gpt.schedule.lower import Order, add_communication, add_reduce_and_step
from dist_gpt.schedule.orders import make_orders, placement
from dist_gpt.schedule.simulate import Timeline, simulate

Case = tuple[str, int, int, int]  # schedule, pp, virtual_stages, micro_batches


def lower(orders: Sequence[Order], ranks: Sequence[int]) -> list[Order]:
    return add_reduce_and_step(add_communication(orders, ranks))


def lowered(case: Case) -> list[Order]:
    return lower(make_orders(*case), placement(*case[:3]))


def priced(f: float = 1.0, b: float = 2.0, w: float = 0.0) -> Callable[[int, Action], float]:
    """Costs by op; REDUCE and STEP are free."""
    cost = {Op.F: f, Op.B: b, Op.W: w}
    return lambda rank, action: cost.get(action.op, 0.0)


def run(case: Case, cost: Callable[[int, Action], float] | None = None, comm: float = 0.0) -> Timeline:
    return simulate(make_orders(*case), placement(*case[:3]), cost or priced(), comm)


def assert_closed_bubble(pp: int, m: int) -> None:
    for name in ("gpipe", "1f1b"):
        assert run((name, pp, 1, m)).bubble == pytest.approx((pp - 1) / (m + pp - 1), abs=1e-12)
    if m % pp == 0:
        for v in (2, 3):
            assert run(("interleaved", pp, v, m)).bubble == pytest.approx((pp - 1) / (v * m + pp - 1), abs=1e-12)


@pytest.mark.parametrize("pp", range(1, 17))
def test_bubble_is_the_closed_form(pp: int) -> None:
    for m in sorted({1, 2, 7, 16, pp, 2 * pp}):
        assert_closed_bubble(pp, m)


@pytest.mark.all_cells
@pytest.mark.parametrize("pp", range(1, 17))
def test_bubble_is_the_closed_form_everywhere(pp: int) -> None:
    for m in range(1, 65):
        assert_closed_bubble(pp, m)


@pytest.mark.parametrize(("pp", "v", "m"), [(1, 2, 3), (2, 2, 8), (3, 2, 3), (4, 3, 12), (8, 2, 16)])
def test_memory_high_water(pp: int, v: int, m: int) -> None:
    """arXiv:2104.04473: GPipe holds m micro-batches, 1F1B pp - rank, interleaved (1 + (pp-1)/(pp v)) pp on rank 0."""
    assert run(("gpipe", pp, 1, m)).peak_in_flight == (m,) * pp
    assert run(("1f1b", pp, 1, m)).peak_in_flight == tuple(min(m, pp - rank) for rank in range(pp))
    assert run(("interleaved", pp, v, m)).peak_in_flight[0] == min(v * m, pp * v + pp - 1)  # in chunks


# arXiv:2401.10241, tables 5 and 6: pp, m, T_F, T_B, T_W, T_comm (ms), bubble of 1F1B and of ZB-H1;
# v is one chunk per layer of a middle stage.
PUBLISHED = [
    (8, 24, 3, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585),
    (8, 32, 3, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242),
    (8, 64, 3, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674),
    (8, 24, 4, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323),
    (8, 32, 4, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045),
    (8, 64, 4, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554),
    (16, 48, 3, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397),
    (16, 64, 3, 11.307, 11.254, 8.101, 0.379, 0.2082, 0.1088),
    (16, 128, 3, 11.325, 11.308, 8.109, 0.378, 0.1251, 0.0576),
    (32, 96, 2, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421),
    (32, 128, 2, 10.408, 10.204, 7.703, 0.408, 0.2168, 0.1106),
    (32, 256, 2, 10.402, 10.248, 7.698, 0.460, 0.1352, 0.0594),
]


@pytest.mark.parametrize(("pp", "m", "v", "f", "b", "w", "comm", "plain", "zero_bubble"), PUBLISHED)
def test_published_bubbles(
    pp: int, m: int, v: int, f: float, b: float, w: float, comm: float, plain: float, zero_bubble: float
) -> None:
    timeline = simulate(add_communication(make_orders("1f1b", pp, 1, m), range(pp)), range(pp), priced(f, b + w), comm)
    assert round(timeline.bubble, 4) == plain  # receives one action ahead hide nothing less than ideal
    h1 = simulate([zb_h1(rank, pp, m) for rank in range(pp)], range(pp), priced(f, b, w), comm)
    assert round(h1.bubble_without_flush, 4) == zero_bubble


@pytest.mark.parametrize(("pp", "m", "v", "f", "b", "w", "comm"), [row[:7] for row in PUBLISHED if row[1] < 100])
def test_interleaved_with_transfer_time(pp: int, m: int, v: int, f: float, b: float, w: float, comm: float) -> None:
    """Every chunk boundary is crossed once forward and once backward (the published 1F1B-I rates have pp fewer)."""
    timeline = run(("interleaved", pp, v, m), priced(f / v, (b + w) / v), comm)
    whole = f + b + w
    assert timeline.makespan == pytest.approx(m * whole + (pp - 1) * whole / v + (2 * pp * v - 2) * comm, rel=1e-12)


def test_receives_posted_late_expose_the_transfer() -> None:
    orders, ranks = make_orders("1f1b", 4, 1, 16), range(4)
    ideal, ahead, late = (
        simulate(o, ranks, priced(), 0.1).makespan
        for o in (orders, add_communication(orders, ranks, 1), add_communication(orders, ranks, 0))
    )
    assert ideal == ahead < late


def test_cost_of_each_link_and_action() -> None:
    """Two ranks, one micro-batch: everything is on the critical path, so the makespan is the sum."""
    links = {(0, 1): 0.25, (1, 0): 0.5}
    costs = {Op.F: 1.0, Op.B: 2.0, Op.REDUCE: 4.0, Op.STEP: 8.0}
    timeline = simulate(
        lowered(("1f1b", 2, 1, 1)),
        (0, 1),
        lambda rank, a: costs[a.op] * (1 + rank),
        lambda src, dst, a: links[src, dst],
    )
    spans = {str(span.action): (span.start, span.end) for rank in timeline.spans for span in rank}
    assert spans["0SEND_F0"] == (1.0, 1.25)
    assert spans["1F0"] == (1.25, 3.25)
    assert spans["1SEND_B0"] == (7.25, 7.75)
    assert spans["0RECV_B0"] == (0.0, 7.75)  # posted in front of 0F0
    assert timeline.busy == (15.0, 30.0)
    assert timeline.makespan == 1.25 + 30.0  # rank 1 ends last: F1, B1, REDUCE, STEP
    assert timeline.bubble_by_rank == pytest.approx((1 - 15 / 31.25, 1 - 30 / 31.25))
    assert timeline.bubble == pytest.approx(sum(timeline.bubble_by_rank) / 2)
    assert timeline.bubble_without_flush == pytest.approx((30.0 - 22.5) / 30.0)  # rank 1 starts at 1.25


def test_a_channel_carries_one_message_at_a_time() -> None:
    """Transfers of 5 behind forwards of 1: each starts when the one before has arrived."""
    timeline = run(("gpipe", 2, 1, 3), priced(1.0, 1.0), comm=5.0)
    assert [span.start for span in timeline.spans[1] if span.action.op is Op.F] == [6.0, 11.0, 16.0]


def test_simulate_refuses_what_waits_for_ever() -> None:
    with pytest.raises(ScheduleError, match="waits forever before"):
        simulate(parse_grid("0F0 0B0 0F1 0B1 \n 1F0 1F1 1B0 1B1"), (0, 1), priced())
    orders = lowered(("1f1b", 2, 1, 1))
    orders[1].remove(Action.parse("1SEND_B0"))
    with pytest.raises(ScheduleError, match="rank 0 waits forever before 0B0"):
        simulate(orders, (0, 1), priced())
    orders = lowered(("1f1b", 2, 1, 1))
    orders[1].append(Action.parse("1SEND_B1"))
    with pytest.raises(ScheduleError, match="1SEND_B1 has no other end"):
        simulate(orders, (0, 1), priced())


# ---------------------------------------------------------------- weight gradients apart: zero bubble, by hand

ZERO_BUBBLE = {
    2: """
        0F0 0F1 0B0 0W0 0F2 0B1 0W1 0F3 0B2 0W2 0B3 0W3
        1F0 1B0 1F1 1B1 1W0 1F2 1B2 1W1 1F3 1B3 1W2 1W3
    """,
    3: """
        0F0 0F1 0F2 0B0 0W0 0F3 0B1 0W1 0B2 0W2 0B3 0W3
        1F0 1F1 1B0 1F2 1B1 1W0 1F3 1B2 1W1 1B3 1W2 1W3
        2F0 2B0 2F1 2B1 2F2 2B2 2W0 2F3 2B3 2W1 2W2 2W3
    """,
    4: """
        0F0 0F1 0F2 0F3 0B0 0W0 0B1 0W1 0B2 0W2 0B3 0W3
        1F0 1F1 1F2 1B0 1F3 1B1 1W0 1B2 1W1 1B3 1W2 1W3
        2F0 2F1 2B0 2F2 2B1 2F3 2B2 2W0 2B3 2W1 2W2 2W3
        3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3W0 3W1 3W2 3W3
    """,
}


def zb_h1(rank: int, pp: int, m: int) -> Order:
    """ZB-H1 of arXiv:2401.10241: 1F1B whose weight gradients wait for `rank` more backwards."""
    order = [Action(rank, Op.F, i) for i in range(min(m, pp - 1 - rank))]
    for i in range(m):
        if i + pp - 1 - rank < m:
            order.append(Action(rank, Op.F, i + pp - 1 - rank))
        order.append(Action(rank, Op.B, i))
        if i >= rank:
            order.append(Action(rank, Op.W, i - rank))
    return order + [Action(rank, Op.W, i) for i in range(max(0, m - rank), m)]


@pytest.mark.parametrize("pp", ZERO_BUBBLE)
def test_hand_written_zero_bubble(pp: int) -> None:
    orders = parse_grid(ZERO_BUBBLE[pp])
    assert orders == [zb_h1(rank, pp, 4) for rank in range(pp)]
    full = lower(orders, range(pp))
    check(full, range(pp), 4)
    timeline = simulate(full, range(pp), priced(1.0, 1.0, 1.0))
    plain = run(("1f1b", pp, 1, 4), priced(1.0, 2.0))
    assert timeline.makespan == 4 * 3 + (pp - 1)  # m (F + B + W) + (pp - 1) (F + B - W)
    assert timeline.bubble < plain.bubble
    assert timeline.peak_in_flight[0] == plain.peak_in_flight[0]
    for rank, order in enumerate(full):  # the reduction stands behind the last W
        assert order[-3:] == [Action(rank, Op.W, 3), Action.reduce(rank), Action.step()]


def test_planted_faults_of_split_weight_gradients() -> None:
    orders = lower(parse_grid(ZERO_BUBBLE[2]), (0, 1))
    orders[1].remove(Action.parse("1W2"))
    with pytest.raises(ScheduleError, match="rank 1 lacks 1W2"):
        check(orders, (0, 1), 4)
    orders = lower(parse_grid(ZERO_BUBBLE[2].replace("0B0 0W0", "0W0 0B0")), (0, 1))
    with pytest.raises(ScheduleError, match="rank 0 does 0W0 before 0B0"):
        check(orders, (0, 1), 4)


# ---------------------------------------------------------------- draw


def test_drawings() -> None:
    timeline = run(("1f1b", 2, 1, 2))
    assert draw_text(timeline, width=27) == (
        "rank 0   |F0-F1-......B0----...B1----|  33.3% idle\n"  # a cell per action where it fits
        "rank 1   |...F0-B0----F1-B1----......|  33.3% idle"
    )
    assert draw_text(timeline, width=9) == (
        "rank 0   |Ff..BB.bb|  33.3% idle\n"  # small letters: odd micro-batches
        "rank 1   |.FBBfbb..|  33.3% idle"
    )
    several = simulate(lowered(("interleaved", 1, 2, 1)), (0, 0), lambda rank, action: 1.0)
    assert draw_text(several, width=28) == "rank 0   |0F0-1F0-1B0-+---0B0-+---=---|   0.0% idle"
    assert draw_orders(parse_grid("0F0 0B0 \n 1F0 1B0")) == "rank 0: 0F0 0B0\nrank 1: 1F0 1B0"
    marked = draw_orders(make_orders("gpipe", 1, 1, 40), {0: (40, "<-- here")}, window=2)
    assert marked == "rank 0: ... 0F38 0F39 [0B0] 0B1 0B2 ... <-- here"
