"""Describe collectives the way torch.profiler (Kineto) writes NCCL kernels, as analysers of its traces expect.

HTA looks for `ncclKernel...` on a stream, launched within a ProfilerStep by an event of the same correlation id; PARAM
for the prefix `ncclKernel_` up to a bracket and for numeric group names; TraceLens for a correlation id and groups with
the same name on all ranks. All read these arguments. (NCCL itself has used ncclDevKernel since 2.19; HTA's search for
stragglers has not followed.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dist_gpt.config.schema import DTYPE_BYTES
from dist_gpt.events import EMULATED, OPS
from dist_gpt.report.units import binary

if TYPE_CHECKING:
    from dist_gpt.report.analysis.match import Calls, Channel, Meetings

# Op -> Kineto's "Collective name", and the word in the kernel's name.
_NAMES = {
    "all_reduce": ("allreduce", "AllReduce"),
    "all_gather": ("_allgather_base", "AllGather"),
    "reduce_scatter": ("_reduce_scatter_base", "ReduceScatter"),
    "all_to_all": ("all_to_all", "SendRecv"),
    "broadcast": ("broadcast", "Broadcast"),
    "send": ("send", "SendRecv"),
    "recv": ("recv", "SendRecv"),
    "barrier": ("barrier", "AllReduce"),
}
_DTYPES = {"fp64": "Double", "fp32": "Float", "bf16": "BFloat16", "fp16": "Half"}
_AT_ONCE_NS = 20_000
"""A wait that begins within this time of the issue makes the call synchronous: the caller did nothing in between."""


_RECV = OPS.index("recv")


class Call(NamedTuple):
    """Call with the facts of its meeting. Times are in ns since the origin."""

    row: int  # in the table of calls
    step: int
    entry: int  # of the step list, -1 outside
    gid: int
    op: int
    payload: int  # bytes of the whole tensor; for a receive, those that were sent
    issue: int
    issued: int
    end: int  # as far as this rank knows
    wait: int  # -1 if never waited for, as is waited
    waited: int
    flags: int
    meeting: int  # -1 without one
    arrival: int  # of the last member to come
    culprit: int
    over: int  # the end with the local part; for a receive the sender's, since a receiver knows only when it woke


def calls_at(calls: Calls, meetings: Meetings, rows: np.ndarray) -> list[Call]:
    """Return the calls at `rows`, in that order."""
    meeting, issue = calls.meeting[rows], calls.issue[rows]
    met, at = meeting >= 0, np.maximum(meeting, 0)

    def of_meeting(column: np.ndarray, without: np.ndarray) -> np.ndarray:
        return np.where(met, column[at], without) if len(column) else without

    issued, done, waited = calls.issued[rows], calls.done[rows], calls.waited[rows]
    end = np.maximum(np.where(done >= 0, done, np.where(waited >= 0, waited, issued)), issue)
    sent = of_meeting(meetings.end, end)
    over = np.where((calls.op[rows] == _RECV) & (sent >= 0), sent, end)
    local = np.minimum(np.maximum(end, calls.wait[rows]) + calls.cpu[rows], waited)
    over = np.where((calls.flags[rows] & EMULATED > 0) & (waited >= 0), np.maximum(local, end), over)
    columns = (
        rows, calls.step[rows], calls.index[rows], calls.gid[rows], calls.op[rows],
        of_meeting(meetings.payload, calls.payload[rows]), issue, np.maximum(issued, issue), end, calls.wait[rows],
        waited, calls.flags[rows], meeting, of_meeting(meetings.arrival, issue),
        of_meeting(meetings.culprit, np.full(len(rows), -1)), over,
    )  # fmt: skip
    return list(map(Call._make, zip(*(column.tolist() for column in columns), strict=True)))


class Nccl:
    """Names and arguments of calls. Groups are numbered in the order of `channels`, the same on all ranks."""

    def __init__(self, dtype: str, channels: list[Channel]) -> None:
        self.dtype, self.channels = dtype, channels
        ways = {"": "", "f": " forward", "b": " backward"}
        self.descriptions = [axis + ways.get(way, "") for axis, _, way in channels]
        self.texts = [str(list(ranks)) for _, ranks, _ in channels]

    def header(self, backend: str, rank: int, world: int) -> dict[str, Any]:
        """Return the trace's `distributedInfo`."""
        groups = [
            {"pg_name": str(i), "pg_desc": text, "backend_config": backend, "pg_size": len(ranks), "ranks": list(ranks)}
            for i, (text, (_, ranks, _)) in enumerate(zip(self.descriptions, self.channels, strict=True))
        ]
        counts = {"pg_count": len(groups), "pg_config": groups}
        return {"backend": backend, "rank": rank, "world_size": world, **counts}

    def kernel(self, call: Call, rank: int, stream: int) -> tuple[str, dict[str, Any]]:
        """Return the kernel name and arguments of a call on `rank`."""
        axis, ranks, _ = self.channels[call.gid]
        op, n = OPS[call.op], len(ranks)
        name, word = _NAMES[op]
        dtype = "fp64" if axis == "world" else self.dtype  # a step's statistics are float64 in every run
        typed = call.payload % (DTYPE_BYTES[dtype] * n) == 0
        elements = call.payload // DTYPE_BYTES[dtype] if typed else call.payload
        args: dict[str, Any] = {
            "External id": call.row + 1,
            "device": rank,
            "stream": stream,
            "correlation": call.row + 1,
            "Collective name": name,
            "dtype": _DTYPES[dtype] if typed else "Byte",
            "In msg nelems": elements // n if op == "all_gather" else elements,
            "Out msg nelems": elements // n if op == "reduce_scatter" else elements,
            "In split size": "[]",
            "Out split size": "[]",
            "Group size": n,
            "Process Group Name": str(call.gid),
            "Process Group Description": self.descriptions[call.gid],
            "Process Group Ranks": self.texts[call.gid],
            "Rank": ranks.index(rank) if rank in ranks else -1,
            "Seq": call.meeting,
            "Is asynchronized op": call.wait < 0 or call.wait - call.issued > _AT_ONCE_NS,
            "step": call.step,
            "entry": call.entry,
        }
        if op in ("send", "recv"):
            args |= {"Src Rank": ranks[0], "Dst Rank": ranks[-1]}
        if call.flags & EMULATED:
            args["emulated"] = True
        return f"ncclKernel_{word}({self.descriptions[call.gid]} {op} {binary(call.payload)})", args
