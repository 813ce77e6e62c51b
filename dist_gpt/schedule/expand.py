"""Second level of lowering: every action of a rank's list becomes steps, one per block.

    F   forward(block) ...                       B   (recompute(block)) backward(block) ..., last block first
    W   weight(block) ...                        REDUCE  reduce(bucket) ...

A bucket's reduction starts right after the step that completes it and overlaps the rest of the backward. Only buckets
that the chunk's first block completes wait: the SEND that a neighbour needs goes first. If state is sharded, its
collectives are steps too, as the `Rules` say: gather(bucket) starts to gather its parameters, free(bucket) frees them.

The executor runs exactly this list; `RankPlan.declare` (plan.steps) gives each step's traffic, FLOPs and saved bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_gpt.schedule.action import SENDS, Action, Op

FORWARD, BACKWARD, WEIGHT, RECOMPUTE, SEND, RECV, REDUCE, UPDATE, GATHER, FREE = (
    "forward", "backward", "weight", "recompute", "send", "recv", "reduce", "update", "gather", "free",
)  # fmt: skip
NEVER, FIRST, EACH_PASS, EACH_STEP = "never", "first", "each_pass", "each_step"


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a rank's step list.

    Forward, backward, weight and recompute steps have a `block`; reduce, gather and free steps have a `bucket`.
    `split` marks a backward whose weight gradients come later, in a weight step.
    """

    kind: str
    action: Action
    block: int | None = None
    bucket: int | None = None
    split: bool = False

    def __str__(self) -> str:
        where = f" block {self.block}" if self.block is not None else ""
        where += f" bucket {self.bucket}" if self.bucket is not None else ""
        return f"{self.kind} {self.action}{where}"


@dataclass(frozen=True, slots=True)
class BucketPlace:
    """Place of a bucket in the model.

    `blocks` (in `chunk`) compute with its parameters, and the gradients of `last_block` complete it.
    """

    index: int
    chunk: int
    last_block: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules for recomputation and for collectives over the data axis.

    `recomputed`: blocks whose forward runs again before their backward. `reduce_each`: reduce after every micro-batch,
    not only after the last. `gather`: when the shards of parameters are gathered: never (every rank has stepped all),
    first (each rank has stepped its own; the forward of a block waits only for its bucket), for each pass over a block,
    or once per step.
    """

    recomputed: frozenset[int] = frozenset()
    reduce_each: bool = False
    gather: str = NEVER


def expand(
    actions: Sequence[Action],
    blocks: Mapping[int, tuple[int, ...]],
    buckets: Sequence[BucketPlace] = (),
    rules: Rules | None = None,
) -> list[Step]:
    """Return the steps of one rank; `blocks` maps each of its chunks to its blocks."""
    rules = rules or Rules()
    steps = _Expansion(actions, blocks, buckets, rules).steps()
    if rules.gather == FIRST:
        return [Step(GATHER, steps[0].action, bucket=b.index) for b in reversed(buckets)] + steps
    if rules.gather in (EACH_PASS, EACH_STEP):
        return _with_gathers(steps, buckets, whole_step=rules.gather == EACH_STEP)
    return steps


class _Expansion:
    """Expansion of actions into steps per block, with reductions."""

    def __init__(
        self,
        actions: Sequence[Action],
        blocks: Mapping[int, tuple[int, ...]],
        buckets: Sequence[BucketPlace],
        rules: Rules,
    ) -> None:
        self.actions, self.blocks, self.buckets, self.rules = actions, blocks, buckets, rules
        self.split = any(a.op is Op.W for a in actions)
        self.producing = Op.W if self.split else Op.B  # the op that makes weight gradients
        self.final = {a.chunk: a for a in actions if a.op is self.producing}  # the last one of each chunk

    def steps(self) -> list[Step]:
        """Return the steps without gathers."""
        steps: list[Step] = []
        due: list[Step] = []  # reductions that let a SEND go first
        for action in self.actions:
            if due and action.op not in SENDS:
                steps += due
                due = []
            if action.op is Op.F:
                steps += [Step(FORWARD, action, block) for block in self.blocks[action.chunk]]
            elif action.op in (Op.B, Op.W):
                steps += self._gradients(action)
                if self.rules.reduce_each and action.op is self.producing:
                    due = self._reductions(action, action.chunk, self.blocks[action.chunk][0])
            elif action.op in (Op.SEND_F, Op.SEND_B):
                steps.append(Step(SEND, action))
            elif action.op in (Op.RECV_F, Op.RECV_B):
                steps.append(Step(RECV, action))
            elif action.op is Op.STEP:
                steps.append(Step(UPDATE, action))
            elif action.op is Op.REDUCE:
                if not self.rules.reduce_each:
                    steps += self._reductions(action, action.chunk, self.blocks[action.chunk][0])
            else:
                raise ValueError(f"action {action}: no lowering for {action.op}")
        return steps + due

    def _gradients(self, action: Action) -> list[Step]:
        """Return the steps of a B or W, with the reductions that overlap the rest of it."""
        steps: list[Step] = []
        first = self.blocks[action.chunk][0]
        each = self.rules.reduce_each and action.op is self.producing
        completes = each or self.final.get(action.chunk) == action
        for block in reversed(self.blocks[action.chunk]):
            if action.op is Op.B and block in self.rules.recomputed:
                steps.append(Step(RECOMPUTE, Action(action.chunk, Op.R, action.micro_batch), block))
            kind = BACKWARD if action.op is Op.B else WEIGHT
            steps.append(Step(kind, action, block, split=self.split and kind == BACKWARD))
            if completes and block != first:
                by = action if self.rules.reduce_each else Action.reduce(action.chunk)
                steps += self._reductions(by, action.chunk, block)
        return steps

    def _reductions(self, action: Action, chunk: int, block: int) -> list[Step]:
        found = [b.index for b in self.buckets if (b.chunk, b.last_block) == (chunk, block)]
        return [Step(REDUCE, action, bucket=index) for index in found]


def _with_gathers(steps: Sequence[Step], buckets: Sequence[BucketPlace], whole_step: bool) -> list[Step]:
    """Return `steps` with each bucket gathered one block ahead of its use, to overlap the block before.

    A bucket is freed when the next block does not use it (with `whole_step`, after its last use).
    """
    places = {(step.kind, step.action.chunk, step.block): step for step in steps}
    found_for = {place: _needs(step, buckets) for place, step in places.items()}
    needs = [found_for[step.kind, step.action.chunk, step.block] for step in steps]
    last = {index: position for position, found in enumerate(needs) for index in found}
    following: list[tuple[int, ...]] = [()] * len(steps)
    after: tuple[int, ...] = ()
    for position in reversed(range(len(steps))):
        following[position] = after
        after = needs[position] or after
    lowered: list[Step] = []
    held: set[int] = set()
    for position, step in enumerate(steps):
        here, ahead = needs[position], following[position]
        if here:
            wanted = [index for index in (*here, *ahead) if index not in held]
            lowered += [Step(GATHER, step.action, bucket=index) for index in dict.fromkeys(wanted)]
            held |= set(wanted)
        lowered.append(step)
        gone = [i for i in here if (last[i] == position if whole_step else i not in ahead)]
        lowered += [Step(FREE, step.action, bucket=index) for index in gone]
        held -= set(gone)
    return lowered


def _needs(step: Step, buckets: Sequence[BucketPlace]) -> tuple[int, ...]:
    """Return the buckets whose parameters a step reads. Weight steps and the embedding's backward need none."""
    reads = step.kind in (FORWARD, RECOMPUTE) or (step.kind == BACKWARD and step.block != 0)
    return tuple(b.index for b in buckets if reads and b.chunk == step.action.chunk and step.block in b.blocks)
