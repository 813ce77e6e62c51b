"""Actions: the single operations of a pipeline rank, such as `2F0` (chunk 2, forward, micro-batch 0)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class ScheduleError(ValueError):
    """Error of a schedule that cannot be made, read or executed; the text says what was given and what to change."""


class Op(str, Enum):
    """Operation of an action on its chunk and micro-batch."""

    F = "F"  # forward
    B = "B"  # backward; of the inputs only if the schedule holds any W
    W = "W"  # gradients of the weights, apart from B
    R = "R"  # recompute the forward, before B
    SEND_F = "SEND_F"  # this chunk's output to the next chunk
    RECV_F = "RECV_F"  # this chunk's input from the previous chunk
    SEND_B = "SEND_B"  # this chunk's input gradient to the previous chunk
    RECV_B = "RECV_B"  # this chunk's output gradient from the next chunk
    REDUCE = "REDUCE"  # this chunk's gradients over the data ranks
    STEP = "STEP"  # the optimizer, all chunks of the rank

    __hash__ = str.__hash__  # Enum's own is slow Python code; a schedule makes millions of look-ups

    def __str__(self) -> str:
        return self.value


COMPUTE = frozenset({Op.F, Op.B, Op.W, Op.R})
SENDS = frozenset({Op.SEND_F, Op.SEND_B})
RECVS = frozenset({Op.RECV_F, Op.RECV_B})
MESSAGES = SENDS | RECVS

# The other end of a message: its op, and the distance to its chunk.
_PARTNER = {
    Op.SEND_F: (Op.RECV_F, +1),
    Op.RECV_F: (Op.SEND_F, -1),
    Op.SEND_B: (Op.RECV_B, -1),
    Op.RECV_B: (Op.SEND_B, +1),
}

# Ops that lack a chunk or a micro-batch: (has chunk, has micro-batch).
_HAS = {Op.REDUCE: (True, False), Op.STEP: (False, False)}

_PATTERN = re.compile(r"(?P<chunk>\d+)?(?P<op>[A-Z_]+)(?P<micro_batch>\d+)?")


@dataclass(frozen=True, order=True, slots=True)
class Action:
    """One entry of a rank's order.

    `chunk` counts virtual stages over the whole pipeline: 0 holds the embedding, the last one the head.
    REDUCE has no micro-batch and STEP has neither; these fields are then 0 and not written.
    """

    chunk: int
    op: Op
    micro_batch: int

    def __post_init__(self) -> None:
        if self.chunk < 0 or self.micro_batch < 0:
            given = f"chunk {self.chunk}, micro-batch {self.micro_batch}"
            raise ScheduleError(f"{self.op} was given {given}; both count from 0")

    @classmethod
    def reduce(cls, chunk: int) -> Action:
        """Return the reduction of a chunk's gradients."""
        return cls(chunk, Op.REDUCE, 0)

    @classmethod
    def step(cls) -> Action:
        """Return the optimizer step of a rank."""
        return cls(0, Op.STEP, 0)

    def __str__(self) -> str:
        has_chunk, has_micro_batch = _HAS.get(self.op, (True, True))
        return f"{self.chunk if has_chunk else ''}{self.op}{self.micro_batch if has_micro_batch else ''}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Parse `2F0`, `2SEND_F0`, `2REDUCE` or `STEP`, the inverse of str(); raise ScheduleError for other text."""
        match = _PATTERN.fullmatch(text)
        if match is not None and match["op"] in Op.__members__:
            op = Op[match["op"]]
            if (match["chunk"] is not None, match["micro_batch"] is not None) == _HAS.get(op, (True, True)):
                return cls(int(match["chunk"] or 0), op, int(match["micro_batch"] or 0))
        raise ScheduleError(
            f"{text!r} is not an action; write CHUNK OP MICRO_BATCH without spaces, like 2F0 (REDUCE has no "
            f"micro-batch, STEP has neither), with OP one of {', '.join(Op.__members__)}"
        )

    @property
    def partner(self) -> Action:
        """The other end of a message: `2RECV_F0` for `1SEND_F0`. Only sends and receives have one."""
        return Action(self.partner_chunk, _PARTNER[self.op][0], self.micro_batch)

    @property
    def partner_chunk(self) -> int:
        """The chunk at the other end of a message."""
        return self.chunk + _PARTNER[self.op][1]


def parse_order(text: str) -> list[Action]:
    """Parse one rank's order from actions separated by white space."""
    return [Action.parse(word) for word in text.split()]


def format_order(order: Iterable[Action]) -> str:
    """Return one rank's order as text that `parse_order` reads."""
    return " ".join(map(str, order))


def parse_grid(text: str) -> list[list[Action]]:
    """Parse a hand-written schedule: one line per rank, rank 0 first; empty lines are skipped."""
    return [parse_order(line) for line in text.splitlines() if line.strip()]
