"""Traces of a run by torch.profiler: the operators of every kind of action, and lanes for the report's own trace.

The run wraps every training step and every entry of its step list in an annotation ('dist_gpt step 12', 'forward 0F0
block 1'). An operator belongs to the entry that was active on the annotating thread when it began, on whatever thread
(on a GPU, autograd has its own); a kernel to the entry active when it was launched. An operator counts with its self
time, without that of nested ones. Where there are kernels, they are listed instead of operators.

The steps' starts are known on the run's clock as well (`anchors`), which ties the two time lines together.

Files are streamed and not trusted: what cannot be read is reported as a problem.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dist_gpt.report.analysis.replay import flatten
from dist_gpt.report.units import number

if TYPE_CHECKING:
    from dist_gpt.report.analysis.clocks import Clocks
    from dist_gpt.report.read.load import Run

MAX_EVENTS, MAX_CHARACTERS = 1_000_000, 2_000_000_000
"""Limits on one file; anything beyond them is not read."""
MAX_LANE_EVENTS = 50_000
"""Most events of one rank in the report's own trace; the longest are kept."""
TOP = 12
"""Number of operators or kernels listed for each kind of action."""
BLOCK, LONGEST_EVENT = 1 << 20, 1 << 23
FIRST_LANE = 1000
"""First lane (tid) of a torch trace's threads and streams; the report's own lanes are below."""
STEP = re.compile(r"dist_gpt step (\d{1,9})")
ACTIONS = {
    "forward": "forward", "backward": "backward", "weight": "weight", "recompute": "recompute", "data": "data",
    "reduce": "optimizer", "update": "optimizer", "gather": "optimizer", "free": "optimizer",
    "send": "send", "recv": "recv",
}  # fmt: skip
"""First word of an entry's annotation -> its kind."""
OTHER = "other"
_OPERATORS, _LAUNCHES = frozenset({"cpu_op"}), frozenset({"cuda_runtime", "cuda_driver"})
_KERNELS = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_FAR = 1e14
"""Limit on times in microseconds (three years), so that their ns fit into int64."""
_OPENING, _SEPARATORS = re.compile(r'"traceEvents"\s*:\s*\['), re.compile(r"[\s,]*")


@dataclass
class TorchProfile:
    """Contents of the traces of all ranks.

    `kernels`: {rank, action, name, s, calls} per step, the longest first of each rank; `lanes`: events for
    `trace.write_trace`; `problems`: sentences.
    """

    kernels: list[dict[str, Any]] = field(default_factory=list)
    lanes: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Event(NamedTuple):
    """Complete event of a trace; times in microseconds of the trace's own clock."""

    start: float
    duration: float
    name: str
    category: str
    lane: tuple[str, str]
    correlation: int

    @property
    def end(self) -> float:
        """End of the event, in microseconds of the trace's own clock."""
        return self.start + self.duration


def read(run: Run, clocks: Clocks) -> TorchProfile:
    """Read every trace that the ranks' event files name; report failures in the result's `problems`."""
    profile = TorchProfile()
    for rank, log in run.ranks.items():
        for fact in log.torch_traces:
            name = str(fact.get("file") or "")
            where = f"rank {rank}: {name or 'torch trace'}"
            if not name or Path(name).name != name:
                profile.problems.append(f"{where}: not the name of a file in the run directory")
                continue
            trace = read_file(run.folder / name)
            profile.problems += [f"{where}: {problem}" for problem in trace.problems]
            if not trace.steps:
                profile.problems.append(f"{where}: it has no annotated step of this run")
                continue
            profile.kernels += [{"rank": rank, **row} for row in trace.top()]
            if (to_run := trace.to_run(fact.get("anchors"))) is None:
                profile.problems.append(
                    f"{where}: no anchor relates its clock to the run's; it is left out of the trace"
                )
            elif clocks.usable(rank):
                profile.lanes += trace.lanes(rank, clocks, to_run)
    return profile


@dataclass
class TorchTrace:
    """One trace file; `annotations`: of the thread that annotates steps; `steps`: (number, start, end) in order."""

    events: list[Event] = field(default_factory=list)
    annotations: list[Event] = field(default_factory=list)
    steps: list[tuple[int, float, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def top(self) -> list[dict[str, Any]]:
        """Return {action, name, s, calls} per step: kernels by device time if any, else operators by self time."""
        kernels = [event for event in self.events if event.category in _KERNELS]
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        calls: dict[tuple[str, str], int] = defaultdict(int)
        action = self._actions()
        for begun, event, own in self._launched(kernels) if kernels else self._self_times():
            kind = action(begun)
            if kind is not None:
                seconds[kind, event.name] += own
                calls[kind, event.name] += 1
        n = len(self.steps)
        listed: dict[str, int] = defaultdict(int)
        rows = []
        for (kind, name), spent in sorted(seconds.items(), key=lambda item: (-item[1], item[0])):
            listed[kind] += 1
            if listed[kind] <= TOP:
                rows.append({"action": kind, "name": name, "s": spent / n / 1e6, "calls": calls[kind, name] / n})
        return rows

    def _actions(self) -> Callable[[float], str | None]:
        """Return a function from a time in microseconds to the kind of the entry active then; None outside of steps."""
        spans = [(round(start * 1000), round(end * 1000), OTHER) for _, start, end in self.steps]
        for event in self.annotations:
            words = event.name.split(maxsplit=1)
            if words and words[0] in ACTIONS:
                spans.append((round(event.start * 1000), round(event.end * 1000), ACTIONS[words[0]]))
        pieces = flatten(spans)
        starts = [piece.start for piece in pieces]

        def at(moment: float) -> str | None:
            ns = round(moment * 1000)
            place = bisect_right(starts, ns) - 1
            return pieces[place].label if place >= 0 and ns < pieces[place].end else None

        return at

    def _launched(self, kernels: list[Event]) -> Iterator[tuple[float, Event, float]]:
        """Yield (launch time, kernel, duration); a kernel whose launch was not seen counts from its own start."""
        launched = {e.correlation: e.start for e in self.events if e.category in _LAUNCHES and e.correlation >= 0}
        for kernel in kernels:
            yield launched.get(kernel.correlation, kernel.start), kernel, kernel.duration

    def _self_times(self) -> Iterator[tuple[float, Event, float]]:
        """Yield (start, operator, self time without nested operators)."""
        lanes: dict[tuple[str, str], list[Event]] = defaultdict(list)
        for event in self.events:
            if event.category in _OPERATORS:
                lanes[event.lane].append(event)
        for events in lanes.values():
            own = [event.duration for event in events]
            stack: list[int] = []
            order = sorted(range(len(events)), key=lambda i: (events[i].start, -events[i].duration))
            for i in order:
                while stack and events[stack[-1]].end <= events[i].start:
                    stack.pop()
                if stack:
                    own[stack[-1]] -= events[i].duration
                stack.append(i)
            for i in order:
                yield events[i].start, events[i], max(0.0, own[i])

    def to_run(self, anchors: Any) -> Callable[[np.ndarray], np.ndarray] | None:
        """Return the map from the trace's microseconds to the run's int64 ns since the rank's header.

        It interpolates between the steps' starts; None where no step is anchored.
        """
        known = {}
        for anchor in anchors if isinstance(anchors, list) else []:
            if isinstance(anchor, list) and len(anchor) == 2 and all(type(x) is int for x in anchor):
                known[anchor[0]] = anchor[1]
        ties = sorted((start, known[step] - start * 1000) for step, start, _ in self.steps if step in known)
        if not ties:
            return None
        at, offset = (np.array(column) for column in zip(*ties, strict=True))
        return lambda t: np.rint(t * 1000 + np.interp(t, at, offset)).astype(np.int64)

    def lanes(self, rank: int, clocks: Clocks, to_run: Callable[[np.ndarray], np.ndarray]) -> list[dict[str, Any]]:
        """Return the steps' longest MAX_LANE_EVENTS events as lanes of process `rank`, in us since the origin."""
        first, last = self.steps[0][1], self.steps[-1][2]
        inside = [event for event in self.events if first <= event.start and event.end <= last]
        inside = sorted(inside, key=lambda event: -event.duration)[:MAX_LANE_EVENTS]
        inside.sort(key=lambda event: (event.lane, event.start, -event.duration))
        edges = np.array([(event.start, event.end) for event in inside]).reshape(-1, 2)
        start, end = (clocks.to_origin(rank, to_run(column)) for column in edges.T)
        tids: dict[tuple[str, str], int] = {}
        made: list[dict[str, Any]] = []
        for event, begin, until in zip(inside, start.tolist(), end.tolist(), strict=True):
            if event.lane not in tids:
                tids[event.lane] = FIRST_LANE + len(tids)
                what = "stream" if event.category in _KERNELS else "thread"
                named = {"ph": "M", "pid": rank, "tid": tids[event.lane], "ts": 0}
                made.append({**named, "name": "thread_name", "args": {"name": f"torch {what} {event.lane[1]}"}})
                made.append({**named, "name": "thread_sort_index", "args": {"sort_index": tids[event.lane]}})
            # A category of its own, so that tools that read kernels from the report's trace do not find them twice.
            place = {"ph": "X", "cat": f"torch {event.category}", "pid": rank, "tid": tids[event.lane]}
            made.append({**place, "name": event.name, "ts": begin / 1000, "dur": (until - begin) / 1000, "args": {}})
        return made


# --- reading -----------------------------------------------------------------------------------------------------


def read_file(path: Path) -> TorchTrace:
    """Read what a trace file holds of this run; report failures in its `problems` instead of raising."""
    trace = TorchTrace()
    try:
        for count, raw in enumerate(_stream(path)):
            if count >= MAX_EVENTS:
                trace.problems.append(f"more than {MAX_EVENTS:,} events; the rest is not read")
                break
            event = _event(raw)
            if event is None:
                continue
            if event.category == "user_annotation":
                trace.annotations.append(event)
            elif event.category in _OPERATORS | _LAUNCHES | _KERNELS:
                trace.events.append(event)
    except FileNotFoundError:
        trace.problems.append("no such file")
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        trace.problems.append(f"cannot be read to its end ({error or type(error).__name__}); the part before is shown")
    marks = [(int(m[1]), event) for event in trace.annotations if (m := STEP.fullmatch(event.name))]
    trace.steps = sorted(((n, event.start, event.end) for n, event in marks), key=lambda step: step[1])
    lanes = {event.lane for _, event in marks}
    trace.annotations = [event for event in trace.annotations if event.lane in lanes]
    return trace


def _event(raw: Any) -> Event | None:
    """Return `raw` as an Event if it is a complete event with sound times, else None."""
    if not isinstance(raw, dict) or raw.get("ph") != "X":
        return None
    start, duration, args = number(raw.get("ts")), number(raw.get("dur")), raw.get("args")
    if start is None or duration is None or duration < 0 or not (abs(start) < _FAR and duration < _FAR):
        return None
    correlation = args.get("correlation") if isinstance(args, dict) else None
    name, category = sys.intern(str(raw.get("name"))[:200]), sys.intern(str(raw.get("cat"))[:40])
    lane = (sys.intern(str(raw.get("pid"))[:40]), sys.intern(str(raw.get("tid"))[:40]))
    return Event(start, duration, name, category, lane, correlation if type(correlation) is int else -1)


def _stream(path: Path) -> Iterator[Any]:
    """Yield the elements of `traceEvents` in little memory; raise ValueError if they are cut off or too large."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = gzip.GzipFile(fileobj=raw) if packed else raw
        text = io.TextIOWrapper(file, encoding="utf-8", errors="replace")
        buffer, place = _behind_opening(text)
        decoder, seen = json.JSONDecoder(), len(buffer)
        while True:
            place = _SEPARATORS.match(buffer, place).end()  # type: ignore[union-attr]
            if buffer.startswith("]", place):
                return
            try:
                value, place = decoder.raw_decode(buffer, place)
            except ValueError:
                more = text.read(BLOCK)
                seen += len(more)
                buffer, place = buffer[place:] + more, 0
                if not more:
                    raise ValueError("the file is truncated") from None
                if len(buffer) > LONGEST_EVENT or seen > MAX_CHARACTERS:
                    raise ValueError("an event without an end" if seen <= MAX_CHARACTERS else "too large") from None
                continue
            yield value


def _behind_opening(text: io.TextIOWrapper) -> tuple[str, int]:
    """Return the text read so far and where in it the first event begins; raise ValueError without `traceEvents`."""
    buffer = ""
    while len(buffer) <= LONGEST_EVENT:
        more = text.read(BLOCK)
        buffer += more
        if (opening := _OPENING.search(buffer)) is not None:
            return buffer, opening.end()
        if not more:
            break
    raise ValueError("no traceEvents in the file")
