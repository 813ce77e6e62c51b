"""Simulation of a schedule: how long it takes, and how much of that is bubble.

Every rank carries out its order as the executor does: sends and receives are posted without waiting, a transfer
starts when both of its ends are posted and its channel is free, and an F or B waits for its message. As every order
is fixed, times follow directly from one another, without an event queue.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from dist_gpt.schedule.action import MESSAGES, SENDS, Action, Op, ScheduleError
from dist_gpt.schedule.lower import Order, add_communication, edge, is_lowered, receive_before, weight_gradient_op

Cost = Callable[[int, Action], float]
Edge = tuple[int, int, str]


class Span(NamedTuple):
    """Action in time. A SEND or RECV lasts from its post to the end of the transfer, beside the rank's compute."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Simulated schedule; times are in the unit of the costs."""

    spans: tuple[tuple[Span, ...], ...]
    """Spans of each rank, in the order of its actions."""
    busy: tuple[float, ...]
    """Time of each rank in actions other than sends and receives."""
    peak_in_flight: tuple[int, ...]
    """Most activations that each rank holds at once (see the function of this name)."""

    @property
    def active(self) -> tuple[tuple[float, float], ...]:
        """Start of the first and end of the last action of each rank, other than sends and receives."""
        rows = [[span for span in rank if span.action.op not in MESSAGES] for rank in self.spans]
        return tuple((row[0].start, row[-1].end) if row else (0.0, 0.0) for row in rows)

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end over all ranks."""
        return max(end for _, end in self.active) - min(start for start, _ in self.active)

    @property
    def bubble_by_rank(self) -> tuple[float, ...]:
        """Share of the makespan in which each rank is idle."""
        makespan = self.makespan
        return tuple((makespan - busy) / makespan if makespan > 0 else 0.0 for busy in self.busy)

    @property
    def bubble(self) -> float:
        """Share of the makespan in which a rank is idle, mean over ranks."""
        return sum(self.bubble_by_rank) / len(self.busy)

    @property
    def bubble_without_flush(self) -> float:
        """Bubble as published for zero-bubble schedules (arXiv:2401.10241): the makespan is the longest single rank's.

        A rank may then start its next step before the others have finished this one. If the first rank to start is
        also the last to finish, as in GPipe and 1F1B, this equals `bubble`.
        """
        longest = max(end - start for start, end in self.active)
        return (longest - sum(self.busy) / len(self.busy)) / longest if longest > 0 else 0.0


def simulate(
    orders: Sequence[Order],
    placement: Sequence[int],
    cost: Cost,
    comm_cost: float | Callable[[int, int, Action], float] = 0.0,
) -> Timeline:
    """Simulate `orders` with `cost(rank, action)` for each F, B, W, R, REDUCE and STEP.

    A message costs `comm_cost`, or `comm_cost(source, destination, receive)`. Orders without SEND and RECV are
    simulated with all receives posted at the start. Raises ScheduleError if a rank waits forever.
    """
    if not is_lowered(orders):
        orders = add_communication(orders, placement, recv_ahead=max(map(len, orders), default=0))
    channels = _Channels(placement, comm_cost)
    spans: list[list[Span]] = [[] for _ in orders]
    clock = [0.0] * len(orders)
    awake = deque(range(len(orders)))
    while awake:
        rank = awake.popleft()
        now, done = clock[rank], spans[rank]
        for action in islice(orders[rank], len(done), None):
            if action.op in MESSAGES:
                done.append(Span(action, now, now))
                awake.extend(channels.post(action, now))
                continue
            receive = receive_before(action, placement)
            if receive is not None:
                if receive not in channels.end:
                    break  # the transfer wakes the rank again
                now = max(now, channels.end[receive])
            done.append(Span(action, now, now + cost(rank, action)))
            now = done[-1].end
        clock[rank] = now

    for rank, order in enumerate(orders):
        if len(spans[rank]) < len(order):
            raise ScheduleError(f"rank {rank} waits forever before {order[len(spans[rank])]}; check() shows why")
    return Timeline(
        spans=tuple(tuple(channels.finish(span) for span in rank) for rank in spans),
        busy=tuple(sum(s.end - s.start for s in rank if s.action.op not in MESSAGES) for rank in spans),
        peak_in_flight=peak_in_flight(orders),
    )


class _Channels:
    """Transfers: one channel per directed edge, in order, one at a time."""

    def __init__(self, placement: Sequence[int], comm_cost: float | Callable[[int, int, Action], float]) -> None:
        self.placement = placement
        self.comm_cost = comm_cost
        self.sends: dict[Edge, deque[Span]] = defaultdict(deque)  # posted, not yet received
        self.receives: dict[Edge, deque[Span]] = defaultdict(deque)
        self.free: dict[Edge, float] = defaultdict(float)
        self.end: dict[Action, float] = {}  # of finished transfers, by SEND and by RECV

    def post(self, message: Action, now: float) -> list[int]:
        """Post a SEND or RECV at time `now`; return the ranks that receive a message which now has both ends."""
        channel = edge(message, self.placement)
        sends, receives = self.sends[channel], self.receives[channel]
        (sends if message.op in SENDS else receives).append(Span(message, now, now))
        woken = []
        while sends and receives:
            send, receive = sends.popleft(), receives.popleft()
            source, destination, _ = channel
            duration = self.comm_cost
            if callable(duration):
                duration = duration(source, destination, receive.action)
            end = max(send.start, receive.start, self.free[channel]) + duration
            self.free[channel] = self.end[send.action] = self.end[receive.action] = end
            woken.append(destination)
        return woken

    def finish(self, span: Span) -> Span:
        """Return `span`, for a SEND or RECV with the end of its transfer; raise ScheduleError if that is missing."""
        if span.action.op not in MESSAGES:
            return span
        if span.action not in self.end:
            raise ScheduleError(f"{span.action} has no other end; check() shows where it is missing")
        return span._replace(end=self.end[span.action])


def peak_in_flight(orders: Sequence[Order]) -> tuple[int, ...]:
    """Return for each rank the most (chunk, micro-batch) pairs with live activations: from F to B, or to W if split."""
    last_use = weight_gradient_op(orders)
    peaks = []
    for order in orders:
        alive = peak = 0
        for action in order:
            alive += (action.op is Op.F) - (action.op is last_use)
            peak = max(peak, alive)
        peaks.append(peak)
    return tuple(peaks)
