"""Proof, before anything runs, that a lowered schedule is complete and cannot deadlock.

`check` shows in turn that
1. every rank does each of its actions exactly once, and nothing else;
2. each action comes after what it needs on its own rank; STEP is last;
3. messages between two ranks are received in the order in which they were sent (messages carry no tag);
4. every rank reaches its end with *rendezvous* transfers: a transfer happens only when its SEND and its RECV are both
   at the head of their queues. A rank queues them without waiting, and waits only before an F or B whose message has
   not arrived.

Which messages share a queue depends on how point-to-point channels are built, see CHANNELS.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence

from dist_gpt.schedule.action import MESSAGES, RECVS, SENDS, Action, Op, ScheduleError
from dist_gpt.schedule.draw import draw_orders
from dist_gpt.schedule.lower import Order, edge, receive_before, send_after, weight_gradient_op

# Channel layout -> the queue in which a rank holds the messages of an edge (source, destination, direction).
CHANNELS: dict[str, Callable[[int, int, str], Hashable]] = {
    "rank": lambda source, destination, direction: "all",  # one group for the whole pipeline
    "rank_direction": lambda source, destination, direction: direction,  # two such groups
    "pair": lambda source, destination, direction: frozenset((source, destination)),  # a communicator per pair
    "pair_direction": lambda source, destination, direction: (frozenset((source, destination)), direction),
    "edge": lambda source, destination, direction: (source, destination, direction),  # a group per directed edge
}


def check(
    orders: Sequence[Order], placement: Sequence[int], micro_batches: int, channels: str = "edge", training: bool = True
) -> None:
    """Prove that lowered `orders` (one per pipeline rank) work; `placement` is the rank of every chunk.

    With `training`, B, REDUCE and STEP are needed as well; without it, orders are forwards and their messages only.
    Raises ScheduleError, with the orders and a mark at the first fault, or with what every stuck rank waits for.
    """
    if channels not in CHANNELS:
        raise ScheduleError(f"channel layout {channels!r} does not exist; it is one of {', '.join(CHANNELS)}")
    if not set(placement) <= set(range(len(orders))):
        raise ScheduleError(f"placement {tuple(placement)} names a rank without an order ({len(orders)} were given)")
    _check_complete(orders, placement, micro_batches, training)
    for rank, order in enumerate(orders):
        _check_rank_order(orders, rank, order, placement)
    _check_fifo(orders, placement, channels)
    _check_progress(orders, placement, channels)


def _fail(orders: Sequence[Order], marks: dict[int, tuple[int, str]], what: str) -> ScheduleError:
    return ScheduleError(f"{what}\n{draw_orders(orders, marks)}")


def _check_complete(orders: Sequence[Order], placement: Sequence[int], micro_batches: int, training: bool) -> None:
    """Raise ScheduleError unless each rank has exactly the actions of its chunks and micro-batches (1)."""
    recomputed = {action.chunk for order in orders for action in order if action.op is Op.R}  # all of a chunk, or none
    split = weight_gradient_op(orders) is Op.W
    for rank, order in enumerate(orders):
        expected: set[Action] = set()
        for chunk in (c for c, owner in enumerate(placement) if owner == rank):
            ops = [Op.F]
            if training:
                ops += [Op.B] + [Op.W] * split + [Op.R] * (chunk in recomputed)
                expected.add(Action.reduce(chunk))
            compute = [Action(chunk, op, i) for op in ops for i in range(micro_batches)]
            expected.update(compute)
            for action in compute:
                messages = (receive_before(action, placement), send_after(action, placement))
                expected.update(message for message in messages if message is not None)
        if training:
            expected.add(Action.step())

        count: Counter[Action] = Counter()
        for position, action in enumerate(order):
            count[action] += 1
            if action not in expected:
                what = f"{micro_batches} micro-batches" if training else f"{micro_batches} micro-batches, forward only"
                message = (
                    f"rank {rank} holds {action}, not an action of its own (ranks of chunks {tuple(placement)}, {what})"
                )
                raise _fail(orders, {rank: (position, "<-- ERROR HERE: not expected")}, message)
            if count[action] > 1:
                message = f"rank {rank} holds {action} more than once"
                raise _fail(orders, {rank: (position, "<-- ERROR HERE: duplicate")}, message)
        missing = sorted(expected - set(order))
        if missing:
            names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            message = f"rank {rank} lacks {names}"
            raise _fail(orders, {rank: (len(order), f"<-- ERROR HERE: {missing[0]} is missing")}, message)


def _check_rank_order(orders: Sequence[Order], rank: int, order: Order, placement: Sequence[int]) -> None:
    """Raise ScheduleError unless each action comes after what it needs on its own rank (2)."""
    position_of = {action: position for position, action in enumerate(order)}
    for position, action in enumerate(order):
        for needed in _needs(action, order, placement):
            if position_of.get(needed, -1) > position:
                message = f"rank {rank} does {action} before {needed}, which it needs"
                raise _fail(orders, {rank: (position, f"<-- ERROR HERE: needs {needed}")}, message)


def _needs(action: Action, order: Order, placement: Sequence[int]) -> list[Action]:
    """Return the actions that must come before `action` on its own rank (R and W only if the order has them)."""
    chunk, i = action.chunk, action.micro_batch
    if action.op is Op.STEP:
        return [other for other in order if other is not action]
    if action.op is Op.REDUCE:
        return [other for other in order if other.chunk == chunk and other.op in (Op.B, Op.W)]
    if action.op in RECVS:
        return []

    receive = receive_before(action, placement)
    if action.op is Op.F:
        return [receive or Action(chunk - 1, Op.F, i)] if chunk > 0 else []
    if action.op is Op.B:
        own = [Action(chunk, Op.F, i), Action(chunk, Op.R, i)]
        return own + [receive or Action(chunk + 1, Op.B, i)] if chunk < len(placement) - 1 else own
    producer = {Op.R: Op.F, Op.W: Op.B, Op.SEND_F: Op.F, Op.SEND_B: Op.B}[action.op]
    return [Action(chunk, producer, i)]


def _check_fifo(orders: Sequence[Order], placement: Sequence[int], channels: str) -> None:
    """Raise ScheduleError unless, on each channel, messages are received in the order in which they are sent (3)."""
    sent: dict[tuple[int, int, Hashable], list[tuple[int, Action]]] = defaultdict(list)
    received: dict[tuple[int, int, Hashable], list[tuple[int, Action]]] = defaultdict(list)
    for order in orders:
        for position, action in enumerate(order):
            if action.op in MESSAGES:
                source, destination, direction = edge(action, placement)
                key = (source, destination, CHANNELS[channels](source, destination, direction))
                (sent if action.op in SENDS else received)[key].append((position, action))
    for key, sends in sent.items():
        for (at_source, send), (at_destination, receive) in zip(sends, received[key], strict=True):
            if send.partner != receive:
                source, destination, _ = edge(send, placement)
                raise _fail(
                    orders,
                    {
                        source: (at_source, f"<-- ERROR HERE: sends {send}"),
                        destination: (at_destination, f"<-- ERROR HERE: takes it for {receive}"),
                    },
                    f"rank {source} sends {send} where rank {destination} expects {receive.partner}: on this channel "
                    "messages must be received in the order in which they are sent",
                )


def _check_progress(orders: Sequence[Order], placement: Sequence[int], channels: str) -> None:
    """Run the schedule with rendezvous transfers through in-order queues; raise ScheduleError on a deadlock (4)."""
    position = [0] * len(orders)
    queues: dict[tuple[int, Hashable], deque[Action]] = defaultdict(deque)
    received: set[Action] = set()
    awake = deque(range(len(orders)))
    while awake:
        rank = awake.popleft()
        while position[rank] < len(orders[rank]):
            action = orders[rank][position[rank]]
            receive = receive_before(action, placement)
            if receive is not None and receive not in received:
                break  # the transfer wakes the rank again
            position[rank] += 1
            if action.op in MESSAGES:
                queue = CHANNELS[channels](*edge(action, placement))
                queues[rank, queue].append(action)
                for finished in _transfer(queues, rank, queue, placement):
                    received.add(finished)
                    awake.append(placement[finished.chunk])

    stuck = [rank for rank in range(len(orders)) if position[rank] < len(orders[rank])]
    if stuck:
        marks = {}
        for rank in stuck:
            action = orders[rank][position[rank]]
            receive = receive_before(action, placement)
            assert receive is not None
            waiting = f"<-- ERROR HERE: {action} waits for {receive.partner} of rank {placement[receive.partner.chunk]}"
            heads = [str(queue[0]) for (owner, _), queue in queues.items() if owner == rank and queue]
            marks[rank] = (position[rank], f"{waiting}; heads of its queues: {', '.join(heads) or 'none'}")
        raise _fail(orders, marks, f"deadlock with channels {channels!r}: ranks {stuck} wait forever")


def _transfer(
    queues: dict[tuple[int, Hashable], deque[Action]], rank: int, channel: Hashable, placement: Sequence[int]
) -> list[Action]:
    """Do the transfers that are possible after `rank` put a message into `channel`; return the finished RECVs."""
    finished = []
    changed = [rank]
    while changed:
        mine = queues[changed.pop(), channel]
        if not mine:
            continue
        here, there = mine[0], mine[0].partner
        ranks = placement[here.chunk], placement[there.chunk]
        theirs = queues[ranks[1], channel]
        if theirs and theirs[0] == there:
            mine.popleft()
            theirs.popleft()
            finished.append(here if here.op in RECVS else there)
            changed += ranks
    return finished
