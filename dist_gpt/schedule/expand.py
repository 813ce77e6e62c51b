"""The second level of lowering: every action of a rank's list becomes steps, one per block.

    F   forward(block) ...                       B   backward(block) ..., last block first
    W   weight(block) ...                        REDUCE  reduce(bucket) ...

A bucket's reduction starts right after the step that completes it, under the rest of the last backward. Only what the
chunk's first block completes waits for REDUCE, behind the SEND that a neighbour waits for.

The executor runs exactly this list; `plan.steps.declare` says what each step communicates, computes and keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_gpt.schedule.action import Action, Op

FORWARD, BACKWARD, WEIGHT, SEND, RECV, REDUCE, UPDATE = (
    "forward", "backward", "weight", "send", "recv", "reduce", "update",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a rank's list. `block` of a forward, backward or weight step; `bucket` of a reduce.

    `split` marks a backward whose weight gradients come later, as a weight step.
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


def expand(
    actions: Sequence[Action],
    blocks: Mapping[int, tuple[int, ...]],
    buckets: Sequence[tuple[int, int, int]],
) -> list[Step]:
    """Steps of one rank. `blocks` gives the blocks of each of its chunks; `buckets` lists (index, chunk, last_block).

    The step that completes a bucket is the backward (or, where weight gradients are split off, the weight step) of its
    `last_block`, in the chunk's last such action.
    """
    split = any(a.op is Op.W for a in actions)
    producing = Op.W if split else Op.B
    final = {a.chunk: a for a in actions if a.op is producing}  # the last one of each chunk wins
    steps: list[Step] = []
    for action in actions:
        if action.op is Op.F:
            steps += [Step(FORWARD, action, block) for block in blocks[action.chunk]]
        elif action.op in (Op.B, Op.W):
            kind = BACKWARD if action.op is Op.B else WEIGHT
            for block in reversed(blocks[action.chunk]):
                steps.append(Step(kind, action, block, split=split and kind == BACKWARD))
                if final.get(action.chunk) == action and block != blocks[action.chunk][0]:
                    steps += _reductions(action.chunk, block, buckets)
        elif action.op in (Op.SEND_F, Op.SEND_B):
            steps.append(Step(SEND, action))
        elif action.op in (Op.RECV_F, Op.RECV_B):
            steps.append(Step(RECV, action))
        elif action.op is Op.STEP:
            steps.append(Step(UPDATE, action))
        elif action.op is Op.REDUCE:
            steps += _reductions(action.chunk, blocks[action.chunk][0], buckets)
        else:
            raise ValueError(f"action {action}: no lowering for {action.op}")
    return steps


def _reductions(chunk: int, block: int, buckets: Sequence[tuple[int, int, int]]) -> list[Step]:
    action = Action.reduce(chunk)
    return [Step(REDUCE, action, bucket=i) for i, c, last_block in buckets if (c, last_block) == (chunk, block)]
