"""Build the waiting graph of the ranks from their groups and the number of calls that each issued on them.

Calls on a group are numbered from 1 on every member, so the n-th call of one is the n-th call of all: a rank that waits
in call n waits for the members that have issued fewer. A member that issued it but has been silent since (stopped in
the middle of the transfer) holds it up as well.

Thousands of ranks wait in few calls, so each group gets a number once, and the ranks behind are found once per call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

Channel = tuple[str, tuple[int, ...], str]
Call = tuple[int, int]
"""Number of the group, and number of the call on it."""
WAITING = ("waiting", "issuing")


class Waiting:
    """Graph of the ranks that wait for each other.

    `channels`: groups (axis, ranks, direction) of each rank; `positions`: `Ledger.position()` of each; `lost`: ranks
    that are dead or silent, which wait for none.
    """

    def __init__(
        self,
        channels: Mapping[int, Sequence[Channel]],
        positions: Mapping[int, Mapping[str, Any] | None],
        lost: Collection[int],
    ) -> None:
        self.positions, self.lost = positions, frozenset(lost)
        self.members: list[tuple[int, ...]] = []  # ranks of each group
        self.numbers = self._numbered(channels)
        self.places = {rank: {number: at for at, number in enumerate(found)} for rank, found in self.numbers.items()}
        self.calls = {rank: call for rank in positions if (call := self._call_of(rank)) is not None}
        behind = {call: self._behind(call) for call in set(self.calls.values())}
        self.behind = {call: (members, frozenset(members)) for call, members in behind.items()}

    def _numbered(self, channels: Mapping[int, Sequence[Channel]]) -> dict[int, list[int]]:
        """Give each group a number; return the numbers of each rank's groups, in the order of its counts."""
        groups: dict[tuple[str, int, str], int] = {}
        known: dict[tuple[int, ...], int] = {}
        seen: dict[int, int] = {}  # by the tuple's id: most ranks share one tuple, and hashing it takes its length
        found: dict[int, list[int]] = {}
        for rank, keys in channels.items():
            found[rank] = []
            for axis, ranks, way in keys:
                which = seen.get(id(ranks))
                if which is None:
                    which = seen[id(ranks)] = known.setdefault(ranks, len(known))
                number = groups.setdefault((axis, which, way), len(groups))
                if number == len(self.members):
                    self.members.append(ranks)
                found[rank].append(number)
        return found

    def _call_of(self, rank: int) -> Call | None:
        """Return the call that a rank waits in; None if it waits in none."""
        position = self.positions.get(rank)
        if position is None or not self.waits(rank):
            return None
        place, numbers = position.get("channel", -1), self.numbers.get(rank, [])
        return (numbers[place], int(position.get("seq", 0))) if 0 <= place < len(numbers) else None

    def _behind(self, call: Call) -> list[int]:
        """Return the members that have not issued a call; if all have, those that are lost."""
        number, seq = call
        members = self.members[number]
        behind = [member for member in members if self._issued(member, number, seq) < seq]
        return behind or [member for member in members if member in self.lost]

    def _issued(self, rank: int, number: int, unknown: int) -> int:
        """Return the number of calls that `rank` issued on a group; `unknown` if it never said."""
        position, place = self.positions.get(rank), self.places.get(rank, {}).get(number)
        counts = position.get("counts", ()) if position else ()
        return int(counts[place]) if place is not None and place < len(counts) else unknown

    def waits(self, rank: int) -> bool:
        """Return whether `rank` is in a collective, as far as is known."""
        position = self.positions.get(rank)
        return position is not None and position.get("state") in WAITING and rank not in self.lost

    def waits_for(self, rank: int) -> list[int]:
        """Return the ranks that `rank` waits for directly."""
        call = self.calls.get(rank)
        if call is None:
            return []
        members, as_set = self.behind[call]
        return [member for member in members if member != rank] if rank in as_set else members

    def waiters(self, ranks: Collection[int]) -> list[int]:
        """Return the other ranks that wait for one of `ranks` directly."""
        wanted = frozenset(ranks)
        calls = {call for call, (_, members) in self.behind.items() if not wanted.isdisjoint(members)}
        return sorted(rank for rank, call in self.calls.items() if call in calls and rank not in wanted)

    def roots(self) -> list[int]:
        """Return the ranks at the ends of the chains: waited for, and waiting for none; in a cycle, its ranks.

        Of several ends, only those that are silent or dead count, else those that compute, else those that wait.
        """
        targets: set[int] = set()
        waiters: dict[Call, list[int]] = {}
        for rank, call in self.calls.items():
            waiters.setdefault(call, []).append(rank)
        for call, ranks in waiters.items():
            members = self.behind[call][1]
            targets |= members if len(ranks) > 1 else members - set(ranks)  # no rank waits for itself
        ends = sorted(t for t in targets if not self.waits_for(t))
        for chosen in (
            [r for r in ends if r in self.lost],
            [r for r in ends if not self.waits(r)],
            ends,
        ):
            if chosen:
                return chosen
        reached = {call: self._reached(call) for call in waiters}
        return sorted(r for r in targets if r in self.calls and r in reached[self.calls[r]])

    def _reached(self, start: Call) -> set[int]:
        """Return all ranks that those in a call wait for, directly or not."""
        found: set[int] = set()
        seen, open_ = {start}, [start]
        while open_:
            members = self.behind[open_.pop()][1]
            for call in {self.calls[rank] for rank in members - found if rank in self.calls} - seen:
                seen.add(call)
                open_.append(call)
            found |= members
        return found


def describe_call(position: Mapping[str, Any]) -> str:
    """Return `tp all_reduce number 45`; empty if there was no call yet."""
    axis, op = position.get("axis"), position.get("op")
    return f"{axis} {op} number {position.get('seq')}" if axis and op else ""
