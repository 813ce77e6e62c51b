"""Who waits for whom: the waiting graph of ranks, from their groups and how many calls each issued on them.

Calls on a group are numbered from 1 on every member, so the n-th call of one is the n-th call of all: a rank that waits
in call n waits for the members that have issued fewer. A member that issued it and is silent since (stopped in the
middle of the transfer) holds it up as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

Channel = tuple[str, tuple[int, ...], str]
WAITING = ("waiting", "issuing")


class Waiting:
    """The graph. `channels`: of each rank, (axis, ranks, direction); `positions`: POSITION of each; `lost`: the ranks
    that are dead or silent, which wait for nobody."""

    def __init__(
        self,
        channels: Mapping[int, Sequence[Channel]],
        positions: Mapping[int, Mapping[str, Any] | None],
        lost: Collection[int],
    ) -> None:
        self.channels, self.positions, self.lost = channels, positions, lost
        self.numbers = {rank: {key: i for i, key in enumerate(keys)} for rank, keys in channels.items()}
        self.edges = {rank: self._waits_for(rank) for rank in positions}

    def waits(self, rank: int) -> bool:
        """It is in a collective, as far as is known."""
        position = self.positions.get(rank)
        return position is not None and position.get("state") in WAITING and rank not in self.lost

    def _waits_for(self, rank: int) -> list[int]:
        position, keys = self.positions.get(rank), self.channels.get(rank, ())
        channel = position.get("channel", -1) if position else -1
        if position is None or not self.waits(rank) or not 0 <= channel < len(keys):
            return []
        key, seq = keys[channel], int(position.get("seq", 0))
        others = [member for member in key[1] if member != rank]
        behind = [member for member in others if self._issued(member, key, seq) < seq]
        return behind or [member for member in others if member in self.lost]

    def _issued(self, rank: int, key: Channel, unknown: int) -> int:
        """Calls that `rank` issued on the group `key`; `unknown` where it never said."""
        position, number = self.positions.get(rank), self.numbers.get(rank, {}).get(key)
        counts = position.get("counts", ()) if position else ()
        return int(counts[number]) if number is not None and number < len(counts) else unknown

    def waiters(self, ranks: Collection[int]) -> list[int]:
        """Who waits for one of `ranks` directly."""
        return sorted(r for r, targets in self.edges.items() if any(t in ranks for t in targets) and r not in ranks)

    def roots(self) -> list[int]:
        """Those at the end of the chains: waited for, and waiting for nobody; silent or dead ones before those that
        compute, those before ones that wait. Where ranks wait in a circle, the ranks of the circle."""
        targets = {t for found in self.edges.values() for t in found}
        ends = sorted(t for t in targets if not self.edges.get(t))
        for chosen in (
            [r for r in ends if r in self.lost],
            [r for r in ends if not self.waits(r)],
            ends,
        ):
            if chosen:
                return chosen
        return sorted(r for r in targets if r in self._reached(r))

    def _reached(self, rank: int) -> set[int]:
        """All that it waits for, directly or not."""
        found: set[int] = set()
        open_ = list(self.edges.get(rank, ()))
        while open_:
            target = open_.pop()
            if target not in found:
                found.add(target)
                open_ += self.edges.get(target, ())
        return found


def describe_call(position: Mapping[str, Any]) -> str:
    """`tp all_reduce number 45`; empty where there was none yet."""
    axis, op = position.get("axis"), position.get("op")
    return f"{axis} {op} number {position.get('seq')}" if axis and op else ""
