"""Lowering: from the compute actions of a rank to all of its actions.

    orders = make_orders("1f1b", pp, virtual_stages, micro_batches)     compute only
    orders = add_communication(orders, placement)                       + SEND and RECV
    orders = add_reduce_and_step(orders)                                + REDUCE and STEP

In the executor, a SEND starts a transfer without waiting for its end, and a RECV posts the buffer without waiting
either; the F or B that uses the message waits for it. A `placement` is the pipeline rank of every chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

from dist_gpt.schedule.action import MESSAGES, SENDS, Action, Op, ScheduleError

Order = list[Action]


# The message that an F or B reads, and the one that it makes: its op, and the distance to the other chunk.
_INPUT = {Op.F: (Op.RECV_F, -1), Op.B: (Op.RECV_B, +1)}
_OUTPUT = {Op.F: (Op.SEND_F, +1), Op.B: (Op.SEND_B, -1)}


def receive_before(action: Action, placement: Sequence[int]) -> Action | None:
    """Return the RECV whose message `action` needs; None if it needs none (its input is made on its own rank)."""
    return _message(action, placement, _INPUT)


def send_after(action: Action, placement: Sequence[int]) -> Action | None:
    """Return the SEND that carries the result of `action` to another rank; None if no other rank needs it."""
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
    """Return (source rank, destination rank, "fwd" or "bwd") of a SEND or RECV."""
    here, there = placement[message.chunk], placement[message.partner_chunk]
    direction = "fwd" if message.op in (Op.SEND_F, Op.RECV_F) else "bwd"
    return (here, there, direction) if message.op in SENDS else (there, here, direction)


def add_communication(orders: Sequence[Order], placement: Sequence[int], recv_ahead: int = 1) -> list[Order]:
    """Return `orders` with a SEND right after the action that makes a message and a RECV before the one that uses it.

    A RECV stands `recv_ahead` compute actions before its user, so that the transfer overlaps these. Any value is safe
    if every directed edge has its own channel (`check`'s "edge"): all receives move by the same count, so their order
    on each channel stays, and no rank waits at a SEND or RECV, so the dependencies between ranks stay. On channels that
    share a queue, `check` decides. Each action ahead holds one more receive buffer.
    """
    if recv_ahead < 0:
        raise ScheduleError(f"recv_ahead = {recv_ahead}; expected a number of actions, at least 0")
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
    """Return `orders` with a REDUCE after each chunk's last weight gradient (and its SEND), and one STEP at the end."""
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
    """Return the op that makes weight gradients: W if the schedule holds any, else B."""
    return Op.W if any(action.op is Op.W for order in orders for action in order) else Op.B


def is_lowered(orders: Sequence[Order]) -> bool:
    """Return whether any rank sends or receives."""
    return any(action.op in MESSAGES for order in orders for action in order)
