"""Layout of a rank's parameters in flat buckets: pure arithmetic, shared by the plan and the run.

A bucket is the unit of gradient reduction, optimizer sharding and parameter gathering. It holds whole blocks, in
reverse order of the forward pass, so that its reduction can start while the backward of earlier blocks continues.
Inside a bucket, parameters of one kind are adjacent and form *segments*: first those whole on every tp rank (their
partial gradients are then one contiguous tp sum), then the sharded ones, each split by weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from dist_gpt.config.schema import Config
from dist_gpt.params import PARTIAL, SHARDED, Param, params_of_blocks
from dist_gpt.plan.precision import Precision, shard_ranks, stage_of


@dataclass(frozen=True, slots=True)
class Slot:
    """Place of one parameter: elements [start, start + numel) of the bucket."""

    param: Param
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """Number of elements of the parameter on this tp rank."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """Adjacent elements of one gradient kind and one decay group."""

    start: int
    stop: int
    kind: str
    decay: bool


@dataclass(frozen=True, slots=True)
class Bucket:
    """Flat buffer of one chunk.

    `last_block` is the block whose backward completes it; `padded` is `numel` rounded up to a multiple of its shards;
    `tied` marks the bucket of a tied embedding, which the first and the last stage both hold.
    """

    index: int
    chunk: int
    last_block: int
    slots: tuple[Slot, ...]
    segments: tuple[Segment, ...]
    numel: int
    padded: int
    tied: bool
    blocks: tuple[int, ...]
    """Blocks that compute with its parameters."""

    @property
    def partial_numel(self) -> int:
        """Number of leading elements whose gradients are summed over tp."""
        return sum(s.stop - s.start for s in self.segments if s.kind == PARTIAL)

    def shard(self, shards: int, index: int) -> tuple[int, int]:
        """Return the elements [start, stop) that shard `index` of `shards` owns (padding included)."""
        width = self.padded // shards
        return index * width, (index + 1) * width


def make_buckets(config: Config, chunks: list[tuple[int, tuple[int, ...]]], tp_index: int) -> tuple[Bucket, ...]:
    """Return the buckets of a rank that holds `chunks` (pairs of chunk number and blocks), in the order of reduction.

    A tied embedding has its own bucket in every layout, and so has every block in ZeRO stage 3, where a bucket is also
    gathered and freed as a whole. Raises ValueError if the rank would store the tied embedding twice.
    """
    limit = config.optim.bucket_mb * 1e6 / Precision.of(config).bytes("gradient") if stage_of(config) < 3 else 0.0
    head = config.model.num_layers + 1
    buckets: list[Bucket] = []

    def close(chunk: int, last_block: int, members: list[Param], tied: tuple[int, ...] = ()) -> None:
        if members:
            buckets.append(_lay_out(config, len(buckets), chunk, last_block, members, tp_index, tied))

    for chunk, blocks in reversed(chunks):
        table = params_of_blocks(config, blocks)
        tied = [p for p in table if p.name == "embed.weight"] if config.model.tie_embeddings else []
        if tied and 0 not in blocks:  # the head's copy is complete as soon as the head's backward is
            close(chunk, max(blocks), tied, tied=(head,))
        members: list[Param] = []
        for block in reversed(blocks):
            members += [p for p in table if p.block == block and p not in tied]
            # sizes of tp rank 0, the widest: all tp ranks must cut the same buckets
            if sum(prod(p.local_shape(config.parallel.tp, 0)) for p in members) >= limit:
                close(chunk, block, members)
                members = []
        close(chunk, blocks[0], members)
        if tied and 0 in blocks:
            close(chunk, 0, tied, tied=(0, head) if head in blocks else (0,))
    names = [slot.param.name for bucket in buckets for slot in bucket.slots]
    if len(set(names)) != len(names):
        raise ValueError("a rank that holds the first and the last chunk apart would store the tied embedding twice")
    return tuple(buckets)


def _lay_out(
    config: Config, index: int, chunk: int, last_block: int, members: list[Param], tp_index: int, tied: tuple[int, ...]
) -> Bucket:
    """Lay out `members` as one bucket; `tied` are the blocks that use a tied embedding, if this is its bucket."""
    ordered = sorted(members, key=lambda p: (p.kind == SHARDED, p.decay))  # stable: the given order in a segment
    slots: list[Slot] = []
    segments: list[Segment] = []
    at = 0
    for p in ordered:
        slot = Slot(p, p.local_shape(config.parallel.tp, tp_index), at)
        slots.append(slot)
        at += slot.numel
        if segments and (segments[-1].kind, segments[-1].decay) == (p.kind, p.decay):
            segments[-1] = Segment(segments[-1].start, at, p.kind, p.decay)
        else:
            segments.append(Segment(slot.start, at, p.kind, p.decay))
    shards = shard_ranks(config)
    padded = -(-at // shards) * shards
    blocks = tied or tuple(sorted({p.block for p in members}))
    return Bucket(index, chunk, last_block, tuple(slots), tuple(segments), at, padded, bool(tied), blocks)
