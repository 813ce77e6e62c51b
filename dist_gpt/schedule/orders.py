"""Pipeline schedules: the order in which each rank computes forwards (F) and backwards (B).

A new schedule is one function that returns a rank's list of actions, and one row of SCHEDULES. It says nothing about
communication: `lower.add_communication` derives the messages, and `check.check` proves that the result works.

The three schedules here share one idea: run some forwards as warm-up, then alternate one forward with one backward,
then run the remaining backwards. They differ only in the length of the warm-up and in the number of chunks per rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dist_gpt.schedule.action import Action, Op, ScheduleError


def gpipe(rank: int, pp: int, micro_batches: int) -> list[Action]:
    """Order all forwards, then all backwards: simple, but all micro-batches are held at once (arXiv:1811.06965)."""
    forwards = [Action(rank, Op.F, i) for i in range(micro_batches)]
    backwards = [Action(rank, Op.B, i) for i in range(micro_batches)]
    return alternate(forwards, backwards, warmup=micro_batches)


def one_f_one_b(rank: int, pp: int, micro_batches: int) -> list[Action]:
    """Alternate forwards and backwards: GPipe's bubble, but only pp - rank micro-batches held (arXiv:2104.04473)."""
    forwards = [Action(rank, Op.F, i) for i in range(micro_batches)]
    backwards = [Action(rank, Op.B, i) for i in range(micro_batches)]
    # Micro-batch 0 reaches the last rank after pp - 1 - rank more forwards; then its backward can return.
    return alternate(forwards, backwards, warmup=pp - 1 - rank)


def interleaved(rank: int, pp: int, virtual_stages: int, micro_batches: int) -> list[Action]:
    """Run 1F1B with several chunks per rank: the bubble shrinks by virtual_stages (arXiv:2104.04473, section 2.2).

    Rank r holds chunks r, r + pp, r + 2 pp, ... Micro-batches travel in groups of pp: a group passes the rank's
    first chunk, then its second, and so on; by then its first micro-batch has passed all other ranks.
    """
    forwards, backwards = [], []
    for start in range(0, micro_batches, pp):
        group = range(start, start + pp)
        chunks = range(rank, pp * virtual_stages, pp)
        forwards += [Action(chunk, Op.F, i) for chunk in chunks for i in group]
        backwards += [Action(chunk, Op.B, i) for chunk in reversed(chunks) for i in group]
    # Micro-batch 0 passes all chunks of this rank but the last, pp forwards each; then it must reach the last rank
    # and return, with one forward and one backward per rank on the way.
    return alternate(forwards, backwards, warmup=(virtual_stages - 1) * pp + 2 * (pp - 1 - rank))


def alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """Return `warmup` forwards, then a forward and a backward in turn, then the remaining backwards."""
    order, steady = forwards[:warmup], forwards[warmup:]
    for forward, backward in zip(steady, backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(steady) :]


def round_robin(pp: int, virtual_stages: int) -> tuple[int, ...]:
    """Return the rank of every chunk: chunk c is on rank c % pp."""
    return tuple(chunk % pp for chunk in range(pp * virtual_stages))


@dataclass(frozen=True)
class Schedule:
    """Row of SCHEDULES; pp, virtual_stages and micro_batches always come in this order."""

    name: str
    order: Callable[[int, int, int, int], list[Action]]
    """(rank, pp, virtual_stages, micro_batches) -> compute actions of the rank."""
    placement: Callable[[int, int], tuple[int, ...]]
    """(pp, virtual_stages) -> rank of every chunk."""
    legal: Callable[[int, int, int], bool]
    """(pp, virtual_stages, micro_batches) -> True if the schedule exists."""
    rule: str
    """The rule of `legal` in words, for error messages."""


def one_chunk(pp: int, virtual_stages: int, micro_batches: int) -> bool:
    """Return whether each rank holds one chunk."""
    return virtual_stages == 1


def whole_groups(pp: int, virtual_stages: int, micro_batches: int) -> bool:
    """Return whether each rank holds several chunks and pp divides the number of micro-batches."""
    return virtual_stages >= 2 and micro_batches % pp == 0


_ROWS = (
    Schedule("gpipe", lambda rank, pp, v, m: gpipe(rank, pp, m), round_robin, one_chunk, "virtual_stages = 1"),
    Schedule("1f1b", lambda rank, pp, v, m: one_f_one_b(rank, pp, m), round_robin, one_chunk, "virtual_stages = 1"),
    Schedule(
        "interleaved", interleaved, round_robin, whole_groups, "virtual_stages >= 2 and micro-batches divisible by pp"
    ),
)
SCHEDULES = {schedule.name: schedule for schedule in _ROWS}


def make_orders(name: str, pp: int, virtual_stages: int, micro_batches: int) -> list[list[Action]]:
    """Return the order of every pipeline rank, compute actions only; raise ScheduleError for illegal degrees."""
    schedule = find(name)
    if min(pp, virtual_stages, micro_batches) < 1 or not schedule.legal(pp, virtual_stages, micro_batches):
        raise ScheduleError(
            f"schedule {name!r} was given pp = {pp}, virtual_stages = {virtual_stages}, micro-batches = {micro_batches}"
            f"; it needs {schedule.rule}, each at least 1. Change parallel.pp, parallel.virtual_stages, "
            "parallel.schedule, or train.global_batch (micro-batches = global_batch / (dp x micro_batch))"
        )
    return [schedule.order(rank, pp, virtual_stages, micro_batches) for rank in range(pp)]


def forward_only(name: str, pp: int, virtual_stages: int, micro_batches: int) -> list[list[Action]]:
    """Return the orders of `make_orders` without the backwards, for evaluation."""
    orders = make_orders(name, pp, virtual_stages, micro_batches)
    return [[action for action in order if action.op is Op.F] for order in orders]


def placement(name: str, pp: int, virtual_stages: int) -> tuple[int, ...]:
    """Return the pipeline rank of every chunk."""
    return find(name).placement(pp, virtual_stages)


def find(name: str) -> Schedule:
    """Return the schedule called `name`; raise ScheduleError with the known names if there is none."""
    if name not in SCHEDULES:
        raise ScheduleError(f"schedule {name!r} does not exist; parallel.schedule is one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]
