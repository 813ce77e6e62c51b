"""Orders, lowering and check of pipeline schedules; none of it needs torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dist_gpt.schedule.action import MESSAGES, Action, Op, ScheduleError, format_order, parse_grid, parse_order
from dist_gpt.schedule.check import CHANNELS, check
from dist_gpt.schedule.lower import Order, add_communication, add_reduce_and_step
from dist_gpt.schedule.orders import SCHEDULES, forward_only, make_orders, placement

Case = tuple[str, int, int, int]  # schedule, pp, virtual_stages, micro_batches
fixed = settings(derandomize=True, deadline=None, database=None, max_examples=80)


def lowered(case: Case, recv_ahead: int = 1) -> list[Order]:
    return lower(make_orders(*case), placement(*case[:3]), recv_ahead)


def lower(orders: Sequence[Order], ranks: Sequence[int], recv_ahead: int = 1) -> list[Order]:
    return add_reduce_and_step(add_communication(orders, ranks, recv_ahead))


@st.composite
def cases(draw: st.DrawFn, least_pp: int = 1) -> Case:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    pp = draw(st.integers(least_pp, 5))
    if name == "interleaved":
        return name, pp, draw(st.integers(2, 3)), pp * draw(st.integers(1, 3))
    return name, pp, 1, draw(st.integers(1, 9))


# ---------------------------------------------------------------- actions


@given(st.sampled_from(Op), st.integers(0, 99), st.integers(0, 99))
@fixed
def test_text_round_trip(op: Op, chunk: int, micro_batch: int) -> None:
    action = Action(0 if op is Op.STEP else chunk, op, 0 if op in (Op.REDUCE, Op.STEP) else micro_batch)
    assert Action.parse(str(action)) == action
    if op in MESSAGES and action.chunk > 0:
        assert action.partner.partner == action


def test_text_form() -> None:
    text = "2F0 0SEND_F11 1RECV_B3 2REDUCE STEP"
    assert parse_order(text) == [
        Action(2, Op.F, 0), Action(0, Op.SEND_F, 11), Action(1, Op.RECV_B, 3), Action.reduce(2), Action.step(),
    ]  # fmt: skip
    assert format_order(parse_order(text)) == text
    assert sorted(parse_order("1F0 0W1 0F2 0F1")) == parse_order("0F1 0F2 0W1 1F0")


@pytest.mark.parametrize(
    "text", ["", "F", "2F", "F0", "2X0", "2REDUCE0", "REDUCE", "0STEP", "STEP0", "-1F0", "2f0", "2F 0"]
)
def test_text_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(f"{text!r} is not an action") + ".*SEND_F"):
        Action.parse(text)


def test_negative_numbers_refused() -> None:
    with pytest.raises(ScheduleError, match="chunk -1, micro-batch 0; both count from 0"):
        Action(-1, Op.F, 0)


# ---------------------------------------------------------------- orders and lowering


def test_orders_as_published() -> None:
    """1F1B and interleaved for pp = 2, as the figures of arXiv:2104.04473 have them."""
    assert make_orders("gpipe", 2, 1, 2) == parse_grid("0F0 0F1 0B0 0B1 \n 1F0 1F1 1B0 1B1")
    assert make_orders("1f1b", 2, 1, 3) == parse_grid("0F0 0F1 0B0 0F2 0B1 0B2 \n 1F0 1B0 1F1 1B1 1F2 1B2")
    assert make_orders("interleaved", 2, 2, 2) == parse_grid(
        """
        0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1
        1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1
        """
    )
    assert forward_only("1f1b", 2, 1, 2) == parse_grid("0F0 0F1 \n 1F0 1F1")


def test_lowering_inserts_messages_reductions_and_step() -> None:
    orders = make_orders("1f1b", 2, 1, 2)
    late = lower(orders, (0, 1), recv_ahead=0)
    assert late == parse_grid(
        """
        0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE STEP
        1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1REDUCE STEP
        """
    )
    early = lower(orders, (0, 1), recv_ahead=1)
    assert early == parse_grid(
        """
        0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1 0B0 0B1 0REDUCE STEP
        1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1 1REDUCE STEP
        """
    )
    with pytest.raises(ScheduleError, match="recv_ahead = -1"):
        add_communication(orders, (0, 1), recv_ahead=-1)


def test_neighbours_on_one_rank_send_nothing() -> None:
    single = lowered(("interleaved", 1, 3, 2))
    assert not [action for action in single[0] if action.op in MESSAGES]
    check(single, (0, 0, 0), 2)

    v_shape = (0, 1, 1, 0)  # chunks go down the ranks and up again, as in ZB-V
    orders = parse_grid(
        """
        0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1
        1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1
        """
    )
    full = lower(orders, v_shape)
    check(full, v_shape, 2)
    messages = {str(action)[:-1] for order in full for action in order if action.op in MESSAGES}
    assert messages == {"0SEND_F", "1RECV_F", "2SEND_F", "3RECV_F", "3SEND_B", "2RECV_B", "1SEND_B", "0RECV_B"}


def test_illegal_schedules_say_the_rule() -> None:
    with pytest.raises(
        ScheduleError, match="'interleaved' was given pp = 4, .* micro-batches = 6; it needs .* divisible by pp"
    ):
        make_orders("interleaved", 4, 2, 6)
    with pytest.raises(ScheduleError, match="virtual_stages >= 2"):
        make_orders("interleaved", 4, 1, 4)
    with pytest.raises(ScheduleError, match="virtual_stages = 2.*it needs virtual_stages = 1"):
        make_orders("1f1b", 4, 2, 4)
    with pytest.raises(ScheduleError, match="each at least 1"):
        make_orders("gpipe", 2, 1, 0)
    with pytest.raises(
        ScheduleError, match="'1F1B' does not exist; parallel.schedule is one of gpipe, 1f1b, interleaved"
    ):
        placement("1F1B", 2, 1)


# ---------------------------------------------------------------- check


@given(cases(), st.integers(0, 3))
@fixed
def test_every_schedule_passes(case: Case, recv_ahead: int) -> None:
    """On a channel per directed edge any recv_ahead is safe; so are the forwards alone."""
    ranks = placement(*case[:3])
    check(lowered(case, recv_ahead), ranks, case[3], channels="edge")
    check(add_communication(forward_only(*case), ranks, recv_ahead), ranks, case[3], training=False)


def deadlocks(channels: str, cases: list[Case]) -> set[int]:
    """The pipeline sizes at which any of the cases deadlocks."""
    stuck = set()
    for case in cases:
        try:
            check(lowered(case, recv_ahead=0), placement(*case[:3]), case[3], channels)
        except ScheduleError as error:
            assert "deadlock" in str(error)
            stuck.add(case[1])
    return stuck


def test_deadlock_of_every_channel_layout() -> None:
    """Which queues are safe with rendezvous transfers; the channel of the product, "edge", always is."""
    sizes = (2, 3, 4, 8)
    plain: list[Case] = [("1f1b", pp, 1, m) for pp in sizes for m in (2, 4, 8, 11)]
    inter: list[Case] = [("interleaved", pp, v, pp * groups) for pp in sizes for v in (2, 3) for groups in (1, 2, 3)]
    found = {channels: (deadlocks(channels, plain), deadlocks(channels, inter)) for channels in CHANNELS}
    everywhere = set(sizes)
    assert found == {
        "rank": (everywhere, everywhere),
        "rank_direction": (set(), everywhere),
        "pair": (everywhere, everywhere),
        "pair_direction": (set(), {2}),
        "edge": (set(), set()),
    }


def test_deadlock_report_names_what_every_rank_waits_for() -> None:
    orders = parse_grid("0F0 0B0 0F1 0B1 \n 1F0 1F1 1B0 1B1")  # rank 0 wants a backward before it gives F1
    with pytest.raises(ScheduleError) as error:
        check(lower(orders, (0, 1), recv_ahead=0), (0, 1), 2)
    assert str(error.value) == (
        "deadlock with channels 'edge': ranks [0, 1] wait forever\n"
        "rank 0: 0F0 0SEND_F0 0RECV_B0 [0B0] 0F1 0SEND_F1 0RECV_B1 0B1 0REDUCE STEP "
        "<-- ERROR HERE: 0B0 waits for 1SEND_B0 of rank 1; heads of its queues: 0RECV_B0\n"
        "rank 1: 1RECV_F0 1F0 1RECV_F1 [1F1] 1B0 1SEND_B0 1B1 1SEND_B1 1REDUCE STEP "
        "<-- ERROR HERE: 1F1 waits for 0SEND_F1 of rank 0; heads of its queues: 1RECV_F1"
    )


@given(cases(), st.data())
@fixed
def test_planted_missing_or_double_action(case: Case, data: st.DataObject) -> None:
    orders = lowered(case)
    order = orders[data.draw(st.integers(0, len(orders) - 1))]
    position = data.draw(st.integers(0, len(order) - 1))
    if data.draw(st.booleans()):
        del order[position]
        expected = "lacks"
    else:
        order.insert(data.draw(st.integers(0, len(order))), order[position])
        expected = "more than once"
    with pytest.raises(ScheduleError, match=rf"(?s){expected}.*<-- ERROR HERE"):
        check(orders, placement(*case[:3]), case[3])


@given(cases(), st.data())
@fixed
def test_planted_action_of_another_rank_or_micro_batch(case: Case, data: st.DataObject) -> None:
    orders = lowered(case)
    order = orders[data.draw(st.integers(0, len(orders) - 1))]
    position = data.draw(st.integers(0, len(order) - 2))  # not STEP
    old = order[position]
    order[position] = data.draw(
        st.sampled_from([Action(old.chunk + 1, old.op, old.micro_batch), Action(0, Op.F, case[3])])
    )
    assume(order[position].chunk >= len(placement(*case[:3])) or order.count(order[position]) == 1)
    with pytest.raises(ScheduleError, match=r"(?s)not an action of its own.*<-- ERROR HERE"):
        check(orders, placement(*case[:3]), case[3])


@given(cases(), st.data())
@fixed
def test_planted_wrong_order_on_a_rank(case: Case, data: st.DataObject) -> None:
    """Any action moved in front of one that it needs: B before F, SEND before F, F before RECV, REDUCE before B, ..."""
    orders = lowered(case)
    rank = data.draw(st.integers(0, len(orders) - 1))
    order = orders[rank]
    i, chunk = (
        data.draw(st.integers(0, case[3] - 1)),
        data.draw(st.sampled_from([a.chunk for a in order if a.op is Op.F])),
    )
    pairs = [
        ("F", "B"),
        ("F", "SEND_F"),
        ("RECV_F", "F"),
        ("RECV_B", "B"),
        ("B", "SEND_B"),
        ("B", "REDUCE"),
        ("F", "STEP"),
    ]
    present = []
    for first, second in pairs:
        a = Action(chunk, Op(first), i)
        b = {"REDUCE": Action.reduce(chunk), "STEP": Action.step()}.get(second) or Action(chunk, Op(second), i)
        if a in order and b in order:
            present.append((a, b))
    needed, action = data.draw(st.sampled_from(present))
    order.remove(action)
    order.insert(order.index(needed), action)
    with pytest.raises(ScheduleError, match=rf"(?s)rank {rank} does {action} before .*<-- ERROR HERE: needs"):
        check(orders, placement(*case[:3]), case[3])


@given(cases(least_pp=2), st.data())
@fixed
def test_planted_swapped_micro_batches(case: Case, data: st.DataObject) -> None:
    """A rank that receives two micro-batches in the other order than they are sent would compute with wrong data."""
    orders = lowered(case)
    order = orders[data.draw(st.integers(0, len(orders) - 1))]
    receives = [a for a in order if a.op in (Op.RECV_F, Op.RECV_B)]
    one = data.draw(st.sampled_from(receives))
    others = [a for a in receives if (a.chunk, a.op) == (one.chunk, one.op) and a != one]
    assume(others)
    two = data.draw(st.sampled_from(others))
    p, q = order.index(one), order.index(two)
    order[p], order[q] = order[q], order[p]
    with pytest.raises(ScheduleError, match="<-- ERROR HERE"):
        check(orders, placement(*case[:3]), case[3])


def test_swapped_forwards_on_one_rank_break_the_channel() -> None:
    """Rank 1 is consistent in itself, every action is there, nobody waits for ever: only the channel tells."""
    orders = make_orders("gpipe", 3, 1, 3)
    orders[1] = parse_order("1F1 1F0 1F2 1B0 1B1 1B2")
    with pytest.raises(ScheduleError, match="rank 0 sends 0SEND_F0 where rank 1 expects 0SEND_F1"):
        check(lower(orders, (0, 1, 2)), (0, 1, 2), 3)


def test_step_is_last_and_arguments_are_checked() -> None:
    orders = lowered(("1f1b", 2, 1, 2))
    orders[0][-1], orders[0][-2] = orders[0][-2], orders[0][-1]
    with pytest.raises(ScheduleError, match="rank 0 does STEP before 0REDUCE"):
        check(orders, (0, 1), 2)
    with pytest.raises(ScheduleError, match="lacks 0B2, 0F2"):
        check(lowered(("1f1b", 2, 1, 2)), (0, 1), 3)
    with pytest.raises(ScheduleError, match="'nccl' does not exist; it is one of rank, "):
        check(orders, (0, 1), 2, channels="nccl")
    with pytest.raises(ScheduleError, match="names a rank without an order"):
        check(orders, (0, 1, 2), 2)


def test_recompute() -> None:
    """R stands between F and B, for every micro-batch of a chunk or for none; here only rank 0 recomputes."""
    good = parse_grid("0F0 0F1 0R0 0B0 0R1 0B1 \n 1F0 1F1 1B0 1B1")
    check(lower(good, (0, 1)), (0, 1), 2)
    with pytest.raises(ScheduleError, match="rank 0 does 0R0 before 0F0"):
        check(lower(parse_grid("0R0 0F0 0F1 0B0 0R1 0B1 \n 1F0 1F1 1B0 1B1"), (0, 1)), (0, 1), 2)
    with pytest.raises(ScheduleError, match="rank 0 does 0B1 before 0R1"):
        check(lower(parse_grid("0F0 0F1 0R0 0B0 0B1 0R1 \n 1F0 1F1 1B0 1B1"), (0, 1)), (0, 1), 2)
    with pytest.raises(ScheduleError, match="rank 0 lacks 0R1"):
        check(lower(parse_grid("0F0 0F1 0R0 0B0 0B1 \n 1F0 1F1 1B0 1B1"), (0, 1)), (0, 1), 2)
