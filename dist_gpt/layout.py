"""Ranks on the mesh (pp, dp, cp, tp): pure arithmetic, tp varies fastest.

An *axis* is a direction of the mesh. Besides the four base axes there are named combinations: `data`
(dp x cp, over which gradients are summed), `model` (pp x tp, one whole replica), `world`, and `embed`
(the first and the last stage, which both hold a tied embedding). Where state is sharded inside a node and replicated
across nodes, the data axis is split into `shard` (`Layout.shard` consecutive members) and `replica`.

    >>> Layout(pp=2, dp=1, cp=1, tp=2).group("tp", rank=3)
    (2, 3)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

BASE_AXES = ("pp", "dp", "cp", "tp")
AXES: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "data": ("dp", "cp"),
    "model": ("pp", "tp"),
    "world": BASE_AXES,
}


@dataclass(frozen=True, slots=True)
class Coords:
    """Coordinates of a rank on the mesh."""

    pp: int
    dp: int
    cp: int
    tp: int

    def __str__(self) -> str:
        return f"pp {self.pp}, dp {self.dp}, cp {self.cp}, tp {self.tp}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The four degrees of parallelism, whose product is the world size."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    shard: int = 0
    """Members of a data group among which state is sharded; 0: all."""

    @property
    def world(self) -> int:
        """World size."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def data(self) -> int:
        """Size N = dp x cp of a data group, over which gradients are summed and state is sharded."""
        return self.dp * self.cp

    def coords(self, rank: int) -> Coords:
        """Return the coordinates of `rank`. Raise ValueError if it is outside [0, world)."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is outside the world of {self.world} ranks ({self})")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coords(pp, dp, cp, tp)

    def rank(self, pp: int, dp: int, cp: int, tp: int) -> int:
        """Return the rank at these coordinates (the inverse of `coords`)."""
        return ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp

    def data_index(self, rank: int) -> int:
        """Return the position of `rank` in its data group, which decides the shard of the state that it owns."""
        c = self.coords(rank)
        return c.dp * self.cp + c.cp

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """Return the ranks, in order, of the group of `rank` along `axis`, itself included."""
        here = self.coords(rank)
        if axis == "embed":
            ends = sorted({0, self.pp - 1})
            if here.pp not in ends:
                return (rank,)
            return tuple(self.rank(p, here.dp, here.cp, here.tp) for p in ends)
        if axis in ("shard", "replica"):
            data, size = self.group("data", rank), self.shard or self.data
            at = data.index(rank)
            return data[at // size * size :][:size] if axis == "shard" else data[at % size :: size]
        free = AXES[axis]
        ranges = [range(getattr(self, a)) if a in free else [getattr(here, a)] for a in BASE_AXES]
        return tuple(self.rank(*at) for at in product(*ranges))

    def size(self, axis: str) -> int:
        """Return the number of ranks in the group of rank 0 along `axis`."""
        return len(self.group(axis, 0))

    def __str__(self) -> str:
        return f"pp {self.pp} x dp {self.dp} x cp {self.cp} x tp {self.tp}"


def even_split(total: int, parts: int, index: int) -> tuple[int, int]:
    """Return start and stop of piece `index` of `total` cut into `parts` pieces whose sizes differ by at most one."""
    base, extra = divmod(total, parts)
    start = index * base + min(index, extra)
    return start, start + base + (1 if index < extra else 0)
