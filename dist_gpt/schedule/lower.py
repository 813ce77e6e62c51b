"""Lowering: from what a rank computes to everything it does.

    orders = make_orders("1f1b", pp, virtual_stages, micro_batches)     compute only
    orders = add_communication(orders, placement)                       + SEND and RECV
    orders = add_reduce_and_step(orders)                                + REDUCE and STEP

How the executor reads the result: a SEND starts a transfer and does not wait for its end; a RECV posts the buffer and
does not wait either; the F or B that uses the message waits for it. A `placement` is the pipeline rank of every chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

from dist_gpt.schedule.action import MESSAGES, SENDS, Action, Op, ScheduleError

Order = list[Action]


# What an F or B needs from another chunk: the receiving op, and how many chunks further on that one is.
_INPUT = {Op.F: (Op.RECV_F, -1), Op.B: (Op.RECV_B, +1)}
_OUTPUT = {Op.F: (Op.SEND_F, +1), Op.B: (Op.SEND_B, -1)}


def receive_before(action: Action, placement: Sequence[int]) -> Action | None:
    """The RECV whose message `action` needs; None if it needs none (its input is made on its own rank)."""
    return _message(action, placement, _INPUT)


def send_after(action: Action, placement: Sequence[int]) -> Action | None:
    """The SEND that carries the result of `action` to another rank; None if nobody there needs it."""
    return _message(action, placement, _OUTPUT)


def _message(action: Action, placement: Sequence[int], ops: dict[Op, tuple[Op, int]]) -> Action | None:
    if action.op not in ops:
        return None
    op, distance = ops[action.op]
    other = action.chunk + distance
    if not 0 <= other < len(placement) or placement[other] == placement[action.chunk]:
        return None
    return Action(action.chunk, op, action.micro_batch)


def edge(message: Action, placement: Sequence[int]) -> tuple[int, int, str]:
    """(source rank, destination rank, "fwd" or "bwd") of a SEND or RECV."""
    here, there = placement[message.chunk], placement[message.partner_chunk]
    direction = "fwd" if message.op in (Op.SEND_F, Op.RECV_F) else "bwd"
    return (here, there, direction) if message.op in SENDS else (there, here, direction)


def add_communication(orders: Sequence[Order], placement: Sequence[int], recv_ahead: int = 1) -> list[Order]:
    """Insert SEND right after the action that makes a message and RECV before the one that uses it.

    A RECV stands `recv_ahead` compute actions before its user, so that the transfer runs under those. Any value is
    safe where every directed edge has a channel of its own (`check`'s "edge"): all receives move by the same count,
    so their order on each channel stays, and nobody waits for a SEND or at a RECV, so who waits for whom stays. On
    channels that share a queue, `check` has to say. Each step ahead holds one more receive buffer.
    """
    if recv_ahead < 0:
        raise ScheduleError(f"recv_ahead = {recv_ahead}; it is a number of actions, at least 0")
    return [_communicate(order, placement, recv_ahead) for order in orders]


def _communicate(order: Order, placement: Sequence[int], recv_ahead: int) -> Order:
    receives: list[Order] = [[] for _ in order]  # those posted just before each action
    for position, action in enumerate(order):
        receive = receive_before(action, placement)
        if receive is not None:
            receives[max(0, position - recv_ahead)].append(receive)

    lowered: Order = []
    for action, posted in zip(order, receives, strict=True):
        send = send_after(action, placement)
        lowered += [*posted, action] if send is None else [*posted, action, send]
    return lowered


def add_reduce_and_step(orders: Sequence[Order]) -> list[Order]:
    """Append to each chunk's last weight gradient (and the SEND behind it) the chunk's REDUCE; end with one STEP."""
    gradient = weight_gradient_op(orders)
    return [_reduce_and_step(order, gradient) for order in orders]


def _reduce_and_step(order: Order, gradient: Op) -> Order:
    last = {action.chunk: position for position, action in enumerate(order) if action.op is gradient}
    lowered: Order = []
    due: list[int] = []  # chunks whose gradients are complete
    for position, action in enumerate(order):
        if action.op not in SENDS:  # a neighbour waits for the SEND: it goes first
            lowered += [Action.reduce(chunk) for chunk in due]
            due = []
        lowered.append(action)
        if last.get(action.chunk) == position:
            due.append(action.chunk)
    return lowered + [Action.reduce(chunk) for chunk in due] + [Action.step()]


def weight_gradient_op(orders: Sequence[Order]) -> Op:
    """W where the schedule holds any W, else B: the op that makes weight gradients."""
    return Op.W if any(action.op is Op.W for order in orders for action in order) else Op.B


def is_lowered(orders: Sequence[Order]) -> bool:
    """Does any rank send or receive?"""
    return any(action.op in MESSAGES for order in orders for action in order)
