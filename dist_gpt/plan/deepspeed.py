"""Bytes that a rank holds when DeepSpeed trains: pure arithmetic, after the source of DeepSpeed 0.19.8.

DeepSpeed allocates and frees most of its memory as it goes, so the sum of the largest of each category would be too
much. Instead, the few moments of a step that can be the fullest are counted, and the plan gives the fullest of them.
`tests/ranks/test_deepspeed_memory.py` compares the result with tracked storages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod

from dist_gpt.config.schema import DTYPE_BYTES, Config
from dist_gpt.params import Param, parameter_table, params_of_blocks
from dist_gpt.plan.precision import STAGES

FP32 = DTYPE_BYTES["fp32"]
ALIGNMENT = 2
"""Flat groups of stages 1 and 2 are padded to a multiple of this times the data ranks."""
COALESCED = 500_000_000
"""Elements after which stage 0 and BF16_Optimizer reduce the gradients that they have coalesced."""
PREFETCHED = 50_000_000
"""Elements that stage 3 gathers ahead of their use (stage3_prefetch_bucket_size)."""
LIVE = 1_000_000_000
"""Elements of gathered parameters at which stage 3 stops gathering ahead (stage3_max_live_parameters). Below that,
nearly all that the forward gathers is kept for the backward."""
PERSISTENT = 100_000
"""Elements up to which a parameter may stay whole in stage 3 (stage3_param_persistence_threshold)."""


@dataclass(frozen=True)
class Moment:
    """Bytes held at one moment of a step, on top of those always held."""

    gradients: int = 0
    activations: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """Bytes of all three categories together."""
        return self.gradients + self.activations + self.buffers


def bucket_elements(config: Config) -> int:
    """Return the number of elements of one DeepSpeed bucket."""
    return max(1, int(config.optim.bucket_mb * 1e6 / FP32))


def persistence_threshold(config: Config) -> int:
    """Return the elements up to which a parameter stays whole in stage 3: vectors do, matrices are sharded."""
    return min(PERSISTENT, max(p.numel for p in parameter_table(config) if len(p.shape) == 1))


class DeepSpeedMemory:
    """Memory of data rank `index` of `config`; `activations` are the bytes of one micro-batch."""

    def __init__(self, config: Config, tp_index: int, index: int, activations: int) -> None:
        o, p, self.config = config.optim, config.parallel, config
        self.stage, self.ranks, self.index = STAGES[o.sharding], int(p.dp), index
        self.activations, self.repeated = activations, config.micro_batches > 1
        self.element, self.offload = DTYPE_BYTES[config.train.dtype], o.offload
        self.cuda = config.launch.backend == "nccl"
        rows = params_of_blocks(config, tuple(range(config.model.num_layers + 2)))
        self.sizes = {row.name: prod(row.local_shape(p.tp, tp_index)) for row in rows}
        self.groups = [group for decay in (True, False) if (group := self._group(rows, decay))]
        self.whole = sum(self.sizes.values())
        self.largest = max(self.sizes.values())
        self.bucket = bucket_elements(config)
        self.averages = 2 if o.name == "adamw" else 1 if o.momentum else 0

    def _group(self, rows: Sequence[Param], decay: bool) -> list[int]:
        return [self.sizes[row.name] for row in rows if row.decay == decay]

    # --- what is always held ---------------------------------------------------------------------------------------

    @property
    def low(self) -> bool:
        """True if parameters take fewer bytes than the sums of gradients."""
        return self.element < FP32

    @property
    def flat(self) -> int:
        """Elements of the flat groups of stages 1 and 2, with padding."""
        unit = ALIGNMENT * self.ranks
        return sum(ceil(sum(group) / unit) * unit for group in self.groups)

    @property
    def shard(self) -> int:
        """Elements that this rank steps."""
        if self.stage == 0:
            return self.whole
        if self.stage == 3:
            return sum(ceil(size / self.ranks) for size in self.sizes.values())
        return self.flat // self.ranks

    @property
    def parameters(self) -> int:
        """Bytes of parameters between two steps."""
        if self.stage == 3:
            return (self.shard + self.kept_whole) * self.element
        return (self.flat if self.stage else self.whole) * self.element

    @property
    def kept_whole(self) -> int:
        """Elements of parameters that stage 3 keeps whole, in addition to their shards."""
        threshold = persistence_threshold(self.config)
        return sum(size for size in self.sizes.values() if size <= threshold) if self.ranks > 1 else 0

    @property
    def optimizer(self) -> int:
        """Bytes of masters and Adam's moments. From stage 1 on there are masters in fp32 training, too."""
        masters = FP32 if self.stage else 0
        return self.shard * (masters + FP32 * self.averages)

    @property
    def gradients(self) -> int:
        """Bytes of gradients kept from one micro-batch to the next, or as long as the engine exists."""
        if self.stage == 3:
            return self.shard * FP32
        if self.stage == 2:
            return self.owned * FP32 if not self.low else self.shard * FP32
        return (self.flat if self.low else self.whole) * FP32

    @property
    def owned(self) -> int:
        """Elements of the parameters of which this rank steps a part; it keeps their whole gradients, in fp32."""
        return self.owned_by_rank()[self.index]

    def owned_by_rank(self) -> list[int]:
        """Return `owned` of every data rank; a parameter cut by the border of two shards counts for both."""
        totals = [0] * self.ranks
        for group in self.groups:
            width = ceil(sum(group) / (ALIGNMENT * self.ranks)) * ALIGNMENT
            start = 0
            for size in group:
                for rank in range(start // width, (start + size - 1) // width + 1):
                    totals[rank] += size
                start += size
        return totals

    @property
    def host(self) -> int:
        """Bytes in host memory; 0 without optim.offload."""
        if not self.offload:
            return 0
        gradient = self.shard * FP32
        if self.stage == 3:
            return self.optimizer + 2 * gradient
        accumulated = self.owned * FP32 if self.stage == 2 and not self.low and self.repeated else 0
        return self.optimizer + gradient + (self.shard + self.largest) * self.element + accumulated

    # --- moments of a step -----------------------------------------------------------------------------------------

    def document(self) -> dict[str, int]:
        """Return the bytes by category at the fullest moment of a step."""
        fullest = max(self.moments(), key=lambda moment: moment.total)
        return {
            "parameters": self.parameters,
            "gradients": fullest.gradients,
            "optimizer": 0 if self.offload else self.optimizer,
            "activations": fullest.activations,
            "buffers": fullest.buffers,
            "host": self.host,
        }

    def moments(self) -> Iterator[Moment]:
        """Yield the candidates for the fullest moment: end of the forward or backward, a reduction, the update."""
        if self.stage == 3:
            return self._stage_3()
        if self.stage == 2:
            return self._stage_2_low() if self.low else self._stage_2()
        if self.stage == 1 and self.low:
            return self._stage_1_low_offload() if self.offload else self._stage_1_low()
        return self._stage_1() if self.stage else self._stage_0()

    @property
    def _tied(self) -> int:
        return self.sizes["embed.weight"] if self.config.model.tie_embeddings else 0

    @property
    def _head(self) -> int:
        """Bytes of the head's new gradient before it is added to anything."""
        return self.sizes["embed.weight" if self._tied else "head.weight"] * self.element

    @property
    def _last(self) -> int:
        """Bytes on top of the gradients when the last one, the embedding's, arrives.

        For a tied embedding, autograd holds the head's and the embedding's gradient and adds them up into a third.
        """
        size = self.sizes["embed.weight"] * self.element
        return (2 * size if self._tied else 0) + (size if self.repeated else 0)

    @property
    def _sent(self) -> int:
        """Elements of the largest reduction; a gradient larger than a bucket is reduced alone."""
        return min(self.whole, max(self.bucket, self.largest))

    def _buckets(self, element: int) -> int:
        """Return the bytes of the buckets of stages 1 and 2; on a GPU one is filled while the other is reduced.

        Each backward allocates them. Offload adds a buffer for one gradient on its way to the host.
        """
        return (2 if self.cuda else 1) * self.bucket * element + (self.largest * self.element if self.offload else 0)

    def _copied(self, groups: list[int]) -> int:
        """Return the most elements copied into one tensor, of up to about COALESCED, to be reduced together.

        A gradient that is reduced alone is not copied.
        """
        most = held = count = 0
        for size in groups:
            held, count = held + size, count + 1
            most = max(most, held if count > 1 else 0)
            if held > COALESCED:
                held = count = 0
        return most

    def _stage_0(self) -> Iterator[Moment]:
        whole = self.whole * FP32
        yield Moment(whole if self.repeated else 0, self.activations, self._head)
        yield Moment(whole, 0, self._last)
        yield Moment(whole, 0, self._copied(list(self.sizes.values())) * FP32)

    def _stage_1(self) -> Iterator[Moment]:
        whole, buckets = self.whole * FP32, self._buckets(FP32)
        yield Moment(whole if self.repeated else 0, self.activations, self._head + buckets)
        yield Moment(whole, 0, self._last + buckets)
        owned = 0 if self.offload else self.owned * FP32
        left = 0 if self.whole <= self.bucket else whole  # 0: all lie in the bucket
        yield Moment(left, 0, buckets + max(owned, self._sent * FP32))
        yield Moment(owned, 0, self._stepped)

    @property
    def _stepped(self) -> int:
        """Bytes of the copy of gradients with which the optimizer steps the larger group."""
        return 0 if self.offload else ceil(max(map(sum, self.groups)) / self.ranks) * FP32

    def _stage_1_low(self) -> Iterator[Moment]:
        """Yield moments of BF16_Optimizer: gradients as autograd makes them, and their full sum in fp32."""
        sums, low = self.flat * FP32, self.whole * self.element
        yield Moment(sums, self.activations, self._head + (low if self.repeated else 0))
        yield Moment(sums, 0, low + self._last)
        yield Moment(sums, 0, low + self._copied([sum(group) for group in self.groups]) * FP32)

    def _stage_1_low_offload(self) -> Iterator[Moment]:
        sums, buckets = self.whole * FP32, self._buckets(FP32)
        yield Moment(sums if self.repeated else 0, self.activations, self._head + buckets)
        yield Moment(sums, 0, self._last + buckets)
        left = 0 if self.whole <= self.bucket else sums
        yield Moment(left + self.shard * FP32, 0, buckets + 2 * self._sent * FP32)

    def _stage_2(self) -> Iterator[Moment]:
        buckets, owned = self._buckets(FP32), 0 if self.offload else self.owned * FP32
        carried = owned if self.repeated else 0
        yield Moment(carried, self.activations, self._head + buckets)
        early = 0 if self.whole <= self.bucket else owned  # from buckets reduced before
        last = self.sizes["embed.weight"] * FP32
        yield Moment(carried + early, 0, buckets + (3 * last if self._tied else 2 * last))
        yield Moment(carried + early, 0, buckets + self._sent * FP32)
        yield Moment(owned, 0, self._stepped)

    def _stage_2_low(self) -> Iterator[Moment]:
        """Yield moments in 16-bit: the own shard's gradients are summed in fp32; reduced ones are copied and cast."""
        buckets, own = self._buckets(self.element), self.shard * FP32
        yield Moment(own if self.repeated else 0, self.activations, self._head + buckets)
        yield Moment(own, 0, buckets + self._sent * (self.element + FP32))

    def _stage_3(self) -> Iterator[Moment]:
        """Yield moments of stage 3; the gradient shard (in host memory with offload) and the bucket are always held."""
        own, bucket = 0 if self.offload else self.shard * FP32, self.bucket * FP32
        gathered, ahead = self._gathered
        yield Moment(own, self.activations, bucket + gathered + ahead)
        yield Moment(own, self.activations, bucket + gathered + self._head)
        copies = (1 if self.cuda else 2) * self._sent * FP32  # gloo's reduce-scatter works on a copy
        if self.whole <= self.bucket:
            yield Moment(own, 0, bucket + copies)
        else:
            yield Moment(own, self.activations, bucket + gathered + copies)
        yield Moment(own, 0, bucket + max(self._stepped, own // FP32 * (FP32 + 1)))  # the search for infinities

    @property
    def _gathered(self) -> tuple[int, int]:
        """Bytes of parameters gathered by the end of the forward, and of those arriving then."""
        if self.ranks == 1:
            return 0, 0
        cut = self.whole - self.kept_whole
        kept = min(cut, LIVE + self.largest)
        ahead = min(cut - self.sizes["embed.weight"], PREFETCHED + self.largest)
        return kept * self.element, ahead * self.element


def fullest_rank(config: Config, tp_index: int) -> int:
    """Return the data rank that owns most (see `DeepSpeedMemory.owned`)."""
    totals = DeepSpeedMemory(config, tp_index, 0, 0).owned_by_rank()
    return totals.index(max(totals))


def state_bytes(held: DeepSpeedMemory) -> int:
    """Return the bytes of parameters, gradients, masters and Adam's moments, on any device: all that ZeRO shards."""
    return held.parameters + held.gradients + held.optimizer
