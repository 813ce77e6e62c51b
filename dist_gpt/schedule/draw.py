"""Schedules as text: one row per rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dist_gpt.schedule.action import COMPUTE, MESSAGES, Action, Op

if TYPE_CHECKING:
    from dist_gpt.schedule.simulate import Timeline

LETTER = {Op.F: "F", Op.B: "B", Op.W: "W", Op.R: "R", Op.REDUCE: "+", Op.STEP: "="}
IDLE = "."


def draw_orders(
    orders: Sequence[Sequence[Action]], marks: Mapping[int, tuple[int, str]] | None = None, window: int = 12
) -> str:
    """Return one row of actions per rank.

    `marks` maps a rank to (position, text): its row shows only that action, in [brackets], the `window` actions on each
    side of it, and the text at the end. Rows of other ranks are then cut to as many actions.
    """
    marks = marks or {}
    rows = []
    for rank, order in enumerate(orders):
        words = [str(action) for action in order]
        if rank in marks:
            position, text = marks[rank]
            words[position : position + 1] = [f"[{words[position]}]" if position < len(words) else "[]"]
            before, after = max(0, position - window), position + window + 1
            words = ["..."] * (before > 0) + words[before:after] + ["..."] * (after < len(words)) + [text]
        elif marks and len(words) > 2 * window:
            words = [*words[: 2 * window], "..."]
        rows.append(f"rank {rank}: {' '.join(words)}")
    return "\n".join(rows)


def draw_text(timeline: Timeline, width: int = 100) -> str:
    """Return one row per rank, with time from left to right in `width` columns.

    If there is room, actions read `F0-` (with their chunk, `2F0-`, if a rank holds several), else they are a run of
    their letter, lower-case for odd micro-batches; `+` is REDUCE, `=` STEP, `.` idle. Sends and receives run beside the
    compute and are not drawn.
    """
    rows = [[s for s in rank if s.action.op not in MESSAGES and s.end > s.start] for rank in timeline.spans]
    start = min((s.start for row in rows for s in row), default=0.0)
    scale = width / timeline.makespan if timeline.makespan > 0 else 0.0
    several = any(len({s.action.chunk for s in row if s.action.op in COMPUTE}) > 1 for row in rows)

    def label(action: Action) -> str:
        if action.op not in COMPUTE:
            return LETTER[action.op]
        return str(action) if several else f"{action.op}{action.micro_batch}"

    # A label needs one column more than its letters, else neighbours run together.
    fits = all(len(label(s.action)) < int((s.end - s.start) * scale + 1e-9) for row in rows for s in row)
    lines = []
    for rank, row in enumerate(rows):
        line = [IDLE] * width
        for span in row:
            left, right = round((span.start - start) * scale), round((span.end - start) * scale)
            odd = span.action.micro_batch % 2 == 1
            letter = LETTER[span.action.op].lower() if odd else LETTER[span.action.op]
            line[left:right] = label(span.action).ljust(right - left, "-") if fits else letter * (right - left)
        lines.append(f"rank {rank:<3d} |{''.join(line)}| {timeline.bubble_by_rank[rank]:6.1%} idle")
    return "\n".join(lines)
