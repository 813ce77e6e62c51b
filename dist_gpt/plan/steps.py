"""Declarations of every step: its collectives, its FLOPs and the bytes that it leaves on the tape.

This is the only place where traffic and work are derived from the configuration. Counting and memory are folds over
these declarations; at run time the ledger compares what is issued with what the running step declared.

Payload is the full tensor: the unsharded one for all-gather and reduce-scatter, counted once for all-reduce; a send
carries its own payload, a receive 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from dist_gpt.config.schema import Config
from dist_gpt.layout import Coords, Layout
from dist_gpt.params import vocab_range
from dist_gpt.plan.buckets import Bucket, make_buckets
from dist_gpt.plan.memory import input_bytes, queued_bytes, saved_bytes
from dist_gpt.plan.precision import Precision, shard_ranks, stage_of
from dist_gpt.plan.split import head_forward_flops, layer_forward_flops, split_blocks
from dist_gpt.schedule.action import Action, Op
from dist_gpt.schedule.expand import (
    BACKWARD,
    EACH_PASS,
    EACH_STEP,
    FIRST,
    FORWARD,
    FREE,
    GATHER,
    NEVER,
    RECOMPUTE,
    RECV,
    REDUCE,
    SEND,
    UPDATE,
    WEIGHT,
    BucketPlace,
    Rules,
    Step,
    expand,
)  # fmt: skip
from dist_gpt.schedule.lower import add_communication, add_reduce_and_step
from dist_gpt.schedule.orders import forward_only, make_orders, placement

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all_reduce", "all_gather", "reduce_scatter"
STATISTICS_BYTES = 24  # three float64: summed loss, squared gradient norm, number of ranks that want to stop


@dataclass(frozen=True, slots=True)
class Call:
    """`calls` collectives of one kind, `payload` bytes each."""

    axis: str
    op: str
    calls: int
    payload: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Declaration of one step on one rank.

    It gives collectives, model FLOPs, bytes that stay for later steps, and FLOPs that only repeat a forward.
    """

    comm: tuple[Call, ...] = ()
    flops: int = 0
    saved_bytes: int = 0
    recompute_flops: int = 0


def layout_of(config: Config) -> Layout:
    """Return the mesh of a resolved configuration."""
    p = config.parallel
    shards = shard_ranks(config) if config.optim.shard_group == "node" else 0
    inside = shards if shards > 1 else 0  # a rank alone in its node shares nothing
    return Layout(pp=p.pp, dp=int(p.dp), cp=p.cp, tp=p.tp, shard=inside)


@lru_cache(maxsize=16)
def lowered_orders(name: str, pp: int, virtual_stages: int, micro_batches: int) -> tuple[list[Action], ...]:
    """Return the orders of all pipeline ranks for one training step, with messages, reductions and the update."""
    orders = make_orders(name, pp, virtual_stages, micro_batches)
    return tuple(add_reduce_and_step(add_communication(orders, placement(name, pp, virtual_stages))))


@dataclass
class RankPlan:
    """All that is known about one rank before it starts."""

    config: Config
    rank: int
    layout: Layout = field(init=False)
    coords: Coords = field(init=False)
    chunks: list[tuple[int, tuple[int, ...]]] = field(init=False)
    buckets: tuple[Bucket, ...] = field(init=False)
    holders: tuple[int, ...] = field(init=False)
    precision: Precision = field(init=False)
    shards: int = field(init=False)
    """Number of pieces into which state is cut."""
    stage: int = field(init=False)
    """ZeRO stage, 0 to 3."""

    def __post_init__(self) -> None:
        p = self.config.parallel
        self.layout = layout_of(self.config)
        self.coords = self.layout.coords(self.rank)
        self.holders = tuple(placement(p.schedule, p.pp, p.virtual_stages))
        blocks = split_blocks(self.config)
        self.chunks = [(c, blocks[c]) for c, holder in enumerate(self.holders) if holder == self.coords.pp]
        self.buckets = make_buckets(self.config, self.chunks, self.coords.tp)
        self.precision = Precision.of(self.config)
        self.shards, self.stage = shard_ranks(self.config), stage_of(self.config)

    @cached_property
    def steps(self) -> list[Step]:
        """Step list of one training step."""
        p = self.config.parallel
        return self.expand(lowered_orders(p.schedule, p.pp, p.virtual_stages, self.config.micro_batches))

    def expand(self, orders: Sequence[list[Action]]) -> list[Step]:
        """Return the step list of this rank for lowered `orders` (one list of actions per pipeline rank)."""
        gathers = {0: NEVER, 1: FIRST, 2: FIRST, 3: self._stage_3}
        layers = range(1, self.config.model.num_layers + 1) if self.config.train.recompute == "full" else ()
        rules = Rules(frozenset(layers), self.stage >= 2, gathers[self.stage]) if self.ours else Rules()
        return expand(orders[self.coords.pp], dict(self.chunks), self._places, rules)

    @property
    def _stage_3(self) -> str:
        return EACH_STEP if self.config.optim.reshard == "step" else EACH_PASS

    @property
    def ours(self) -> bool:
        """True if steps of the list reduce, gather and step the state (engine native).

        DeepSpeed does that by itself, outside these declarations; buckets then only give sizes.
        """
        return self.config.optim.engine == "native"

    @property
    def _places(self) -> list[BucketPlace]:
        if not self.ours:
            return []
        return [BucketPlace(b.index, b.chunk, b.last_block, b.blocks) for b in self.buckets]

    @cached_property
    def eval_steps(self) -> list[Step]:
        """Step list of one validation batch: forwards only."""
        p = self.config.parallel
        orders = forward_only(p.schedule, p.pp, p.virtual_stages, self.config.micro_batches)
        rules = Rules(gather=self._stage_3 if self.stage == 3 and self.ours else NEVER)
        return expand(add_communication(orders, self.holders)[self.coords.pp], dict(self.chunks), self._places, rules)

    @cached_property
    def refresh_steps(self) -> list[Step]:
        """Gathers before the forwards of a validation, if ranks have stepped only their own shards."""
        wanted = self.buckets if self.stage in (1, 2) and self.ours else ()
        return [Step(GATHER, Action(b.chunk, Op.F, 0), bucket=b.index) for b in reversed(wanted)]

    def declare(self, step: Step) -> Cost:
        """Return the collectives, FLOPs and saved bytes of `step`."""
        if step.kind == FORWARD:
            return self._forward(step)
        if step.kind == BACKWARD:
            return self._split_backward(step) if step.split else self._backward(step)
        if step.kind == WEIGHT:
            return self._weight(step)
        if step.kind == RECOMPUTE:
            return self._recompute(step)
        if step.kind == SEND:
            return Cost((Call("pp", "send", 1, self.hidden_bytes // self._token_split),))
        if step.kind == RECV:
            return Cost((Call("pp", "recv", 1, 0),))
        if step.kind == REDUCE:
            return Cost(self._reduce(self.buckets[step.bucket or 0]))
        if step.kind == UPDATE:
            return Cost(self._update())
        if step.kind == GATHER:
            size = self.buckets[step.bucket or 0].padded * self.element
            return Cost((Call(self.shard_axis, ALL_GATHER, 1, size),) if self.shards > 1 else ())
        if step.kind == FREE:
            return Cost()
        raise ValueError(f"no declaration for step kind {step.kind!r}")

    # --- sizes -------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Number of tokens of one micro-batch on this rank's context shard."""
        return self.config.train.micro_batch * self.config.model.seq_len // self.config.parallel.cp

    @property
    def element(self) -> int:
        """Bytes of one element of a parameter or an activation."""
        return self.precision.bytes("compute")

    @property
    def shard_axis(self) -> str:
        """Axis over which shards are gathered and reduced."""
        return "shard" if self.layout.shard else "data"

    @property
    def shard_index(self) -> int:
        """Index of the shard of the state that this rank owns."""
        return self.layout.data_index(self.rank) % self.shards

    @property
    def replicas(self) -> int:
        """Number of copies of each shard, on different nodes; 1 without sharding."""
        return self.layout.data // self.shards if self.stage else 1

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one whole activation (tokens, hidden)."""
        return self.tokens * self.config.model.hidden_size * self.element

    @property
    def _token_split(self) -> int:
        p = self.config.parallel
        return p.tp if p.sequence_parallel else 1

    def is_head(self, block: int) -> bool:
        """Return whether `block` is the head."""
        return block == self.config.model.num_layers + 1

    # --- blocks ------------------------------------------------------------------------------------------------

    def _tp(self, *ops: str, calls: int = 1) -> tuple[Call, ...]:
        """Return collectives over tp, each of one hidden activation: `calls` of each op."""
        if self.layout.tp == 1:
            return ()
        return tuple(Call("tp", op, calls, self.hidden_bytes) for op in ops)

    @property
    def _sequence_parallel(self) -> bool:
        return self.config.parallel.sequence_parallel

    def block_flops(self, block: int) -> tuple[int, int]:
        """Return the forward FLOPs of `block` on this rank: (matmuls with weights, attention matmuls)."""
        if block == 0:
            return 0, 0
        if self.is_head(block):
            start, stop = vocab_range(self.config, self.coords.tp)
            whole = head_forward_flops(self.config, self.tokens)
            return whole // int(self.config.model.vocab_size or 1) * (stop - start), 0
        attention = 4 * self.tokens * self.config.model.seq_len * self.config.model.hidden_size
        everything = layer_forward_flops(self.config, self.tokens)
        return (everything - attention) // self.layout.tp, attention // self.layout.tp

    def _forward(self, step: Step) -> Cost:
        block = step.block or 0
        matmul, attention = self.block_flops(block)
        saved = saved_bytes(self.config, block, self.coords.tp)
        if self._recomputed(block):
            saved = input_bytes(self.config)
        return Cost(self._forward_calls(block), matmul + attention, saved)

    def _forward_calls(self, block: int) -> tuple[Call, ...]:
        if block == 0:
            return self._tp(REDUCE_SCATTER if self._sequence_parallel else ALL_REDUCE)
        if self.is_head(block):
            comm = self._tp(ALL_GATHER) if self._sequence_parallel else ()
            if self.layout.tp > 1:  # cross-entropy: row maxima, then (sum of exponentials, target logit)
                number = self.precision.statistic
                comm += (Call("tp", ALL_REDUCE, 1, self.tokens * number),)
                comm += (Call("tp", ALL_REDUCE, 1, 2 * self.tokens * number),)
            return comm
        if self._sequence_parallel:
            return self._tp(ALL_GATHER, REDUCE_SCATTER, calls=2)
        return self._tp(ALL_REDUCE, calls=2)

    def _recomputed(self, block: int) -> bool:
        """Return whether the forward of `block` keeps only its input."""
        return self.config.train.recompute == "full" and block != 0 and not self.is_head(block)

    def _recompute(self, step: Step) -> Cost:
        """Return the cost of repeating a layer's forward up to its last matmul, which no saved tensor needs."""
        block = step.block or 0
        matmul, attention = self.block_flops(block)
        m, p = self.config.model, self.config.parallel
        last = 2 * self.tokens * m.hidden_size * int(m.ffn_size or 0) // p.tp
        if self._sequence_parallel:
            comm = self._tp(ALL_GATHER, calls=2) + self._tp(REDUCE_SCATTER)
        else:
            comm = self._tp(ALL_REDUCE)
        saved = saved_bytes(self.config, block, self.coords.tp) - input_bytes(self.config)
        return Cost(comm, saved_bytes=saved, recompute_flops=matmul + attention - last)

    def _backward(self, step: Step) -> Cost:
        early, late = self._split_backward(step), self._weight(step)
        return Cost(early.comm + late.comm, early.flops + late.flops, recompute_flops=early.recompute_flops)

    def _split_backward(self, step: Step) -> Cost:
        """Return the cost of the input gradients.

        Sequence parallelism gathers output gradients of row-parallel matmuls and scatters input gradients of
        column-parallel ones.
        """
        block = step.block or 0
        matmul, attention = self.block_flops(block)
        if block == 0:
            comm = self._tp(ALL_GATHER) if self._sequence_parallel else ()
        elif self.is_head(block):
            comm = self._tp(REDUCE_SCATTER if self._sequence_parallel else ALL_REDUCE)
        elif self._sequence_parallel:
            comm = self._tp(ALL_GATHER, REDUCE_SCATTER, calls=2)
        else:
            comm = self._tp(ALL_REDUCE, calls=2)
        again = attention if self.config.train.recompute == "selective" else 0
        queued = queued_bytes(self.config, block, self.coords.tp)
        return Cost(comm, matmul + 2 * attention, queued, again)

    def _weight(self, step: Step) -> Cost:
        """Return the cost of the weight gradients; sequence parallelism gathers column-parallel inputs again."""
        block = step.block or 0
        matmul, _ = self.block_flops(block)
        columns = 0 if block == 0 else 1 if self.is_head(block) else 2
        comm = self._tp(ALL_GATHER, calls=columns) if self._sequence_parallel and columns else ()
        return Cost(comm, matmul)

    # --- gradients and update ------------------------------------------------------------------------------------

    def _reduce(self, bucket: Bucket) -> tuple[Call, ...]:
        calls: tuple[Call, ...] = ()
        if self.layout.tp > 1 and bucket.partial_numel:
            calls += (Call("tp", ALL_REDUCE, 1, bucket.partial_numel * self.precision.bytes("gradient")),)
        payload = bucket.padded * self.precision.bytes("reduce")
        if self.stage:
            calls += (Call(self.shard_axis, REDUCE_SCATTER, 1, payload),)
        elif self.layout.data > 1:
            calls += (Call("data", ALL_REDUCE, 1, payload),)
        return calls

    def _update(self) -> tuple[Call, ...]:
        calls: tuple[Call, ...] = ()
        element = self.precision.bytes("gradient")
        for bucket in self.buckets if self.ours else ():
            if self.replicas > 1:
                calls += (Call("replica", ALL_REDUCE, 1, bucket.padded // self.shards * element),)
            if bucket.tied and len(self.layout.group("embed", self.rank)) > 1:
                calls += (Call("embed", ALL_REDUCE, 1, bucket.padded // self.shards * element),)
        if self.layout.world > 1:
            calls += (Call("world", ALL_REDUCE, 1, STATISTICS_BYTES),)
        return calls

    def eval_calls(self) -> tuple[Call, ...]:
        """Return the collective after the forwards of one validation batch: the loss, summed over the world."""
        return (Call("world", ALL_REDUCE, 1, 8),) if self.layout.world > 1 else ()


def calls_by_key(comm: Iterable[Call]) -> dict[tuple[str, str, int], int]:
    """Return {(axis, op, payload): calls}, the form in which the ledger compares."""
    calls: dict[tuple[str, str, int], int] = {}
    for call in comm:
        key = (call.axis, call.op, call.payload)
        calls[key] = calls.get(key, 0) + call.calls
    return calls


def p2p_direction(op: Op) -> str:
    """Return which of the two directed edges a SEND or RECV uses: 'f' for activations, 'b' for gradients."""
    return "f" if op in (Op.SEND_F, Op.RECV_F) else "b"
