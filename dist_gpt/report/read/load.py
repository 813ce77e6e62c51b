"""Read a run directory: the plan that it followed and the records of every rank.

    run = load("runs/demo")
    run.ranks[3].calls[:, CALL_COLUMNS.index("issue")]      # int64, ns since that rank's header

Files are read one at a time, in blocks, and never trusted: unusable content is left out and reported in
`Run.problems`. `load` raises only if there is nothing at all to show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from dist_gpt.config import explain, yaml_io
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import resolve
from dist_gpt.config.schema import Config
from dist_gpt.events import moved_by_engine
from dist_gpt.layout import AXES, BASE_AXES, Layout
from dist_gpt.plan.steps import RankPlan, layout_of
from dist_gpt.protocol import PREEMPTED
from dist_gpt.report.read.event_file import Attempt, SchemaError, parse, read_attempt
from dist_gpt.report.read.event_schema import fits
from dist_gpt.report.units import count_of, size

_NAME = re.compile(r"events\.rank(0|[1-9][0-9]{0,8})\.jsonl")
MOST_RANKS = 1 << 17
ENDED_WELL = (None, 0, PREEMPTED)
"""Codes of exit.json without a failure: not ended yet, finished, saved after a request to stop."""


class RunError(ConfigError):
    """Error for a run directory of which nothing can be shown."""


@dataclass
class RankLog:
    """Records of one rank's last attempt. Times are in ns since its header's `base_ns`, on its own clock."""

    rank: int
    header: dict[str, Any]
    attempts: int
    steps: list[dict[str, Any]]
    calls: np.ndarray
    """(n, 12) int64, columns CALL_COLUMNS; done, wait and waited are -1 where unknown."""
    spans: np.ndarray
    """(n, 5) int64, columns SPAN_COLUMNS."""
    clocks: list[dict[str, int]]
    memory: dict[str, Any] | None
    kernels: list[dict[str, Any]]
    ceiling: dict[str, Any] | None
    samples: list[dict[str, Any]]
    torch_traces: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    end: dict[str, Any] | None
    engine: dict[str, Any] | None = None
    """Traffic of an engine that communicates by itself, by its own count; None without such an engine."""


@dataclass
class Run:
    """Contents of a run directory. `problems` are sentences: what is missing, cut off, left out or still running."""

    folder: Path
    config: Config
    plan: dict[str, Any]
    layout: Layout
    ranks: dict[int, RankLog] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    failed: str = ""
    """Why the last attempt failed; empty if it did not. See launch.run_files.note_failure."""
    _plans: dict[tuple[int, int], RankPlan] = field(default_factory=dict, repr=False)

    def plan_of(self, rank: int) -> RankPlan:
        """Return the plan of the ranks at `rank`'s place in pipeline and tensor group, which share one step list."""
        at = self.layout.coords(rank)
        if (at.pp, at.tp) not in self._plans:
            self._plans[at.pp, at.tp] = RankPlan(self.config, self.layout.rank(at.pp, 0, 0, at.tp))
        return self._plans[at.pp, at.tp]


def load(folder: str | Path) -> Run:
    """Read a run directory. Raises RunError if nothing in it can be shown."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError([f"{folder}: no such folder; expected a run directory"])
    for name in ("config.yaml", "plan.json", "metrics.jsonl"):
        if (folder / name).exists() and not (folder / name).is_file():
            raise RunError([f"{folder / name}: not a regular file"])
    config = _config(folder / "config.yaml")
    if config.world_size > MOST_RANKS:
        raise RunError([f"{folder}: config.yaml has {config.world_size:,} ranks; a report has at most {MOST_RANKS:,}"])
    run = Run(folder, config, _plan(folder / "plan.json"), layout_of(config))
    if any(run.plan["layout"].get(axis) != getattr(run.layout, axis) for axis in BASE_AXES):
        run.problems.append(f"plan.json and config.yaml have different layouts; config.yaml's is used: {run.layout}")
    end = _end(folder / "exit.json")
    run.failed = _failure(end)
    if run.failed:
        run.problems.append(f"the run failed: {run.failed}")
    run.problems += _stopped(end, config.train.steps)
    _ranks(run)
    run.problems += engine_sentences(run)
    run.metrics = _metrics(folder / "metrics.jsonl", run.problems)
    return run


def engine_sentences(run: Run) -> list[str]:
    """Return a sentence on the unaccounted traffic that another engine moved, by its own count; none without one."""
    log = next((log for log in run.ranks.values() if log.engine is not None), None)
    if log is None or log.engine is None:
        return []
    moved = [
        f"{axis} {op} {calls:.3g} calls, {size(payload)} of payload"
        for axis, op, calls, payload, _ in moved_by_engine(log.engine)
    ]
    return [
        f"{log.engine['name']} {log.engine['version']} has its own communication, on rank {log.rank} in a training "
        f"step: {'; '.join(moved) or 'none'}. That traffic, counted where the engine issues it, is in no table here "
        "and in no accounting, and its time counts as backward and optimizer"
    ]


def _end(path: Path) -> dict[str, Any]:
    """Return the contents of exit.json; empty if it is missing or unreadable."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    return {}


def _failure(end: dict[str, Any]) -> str:
    """Return why the attempt failed, by exit.json; empty if it did not fail or has not ended."""
    return _why(end, f"exit code {end['code']}") if end.get("code") not in ENDED_WELL else ""


def _stopped(end: dict[str, Any], steps: int) -> list[str]:
    """Return a sentence if the run was asked to stop before its last step, else nothing."""
    if end.get("code") != PREEMPTED:
        return []
    return [f"not finished: stopped after step {end.get('step')} of {steps}: {_why(end, 'asked to stop')}; saved"]


def _why(end: dict[str, Any], otherwise: str) -> str:
    """Return the reason that exit.json gives, or `otherwise`, on one line."""
    return " ".join(str(end.get("why") or otherwise).split())[:400]


def _config(path: Path) -> Config:
    """Return config.yaml, resolved. The run exists, so whether this version would run it is not checked."""
    try:
        tree, _ = yaml_io.read(path)
        if not isinstance(tree, dict):
            raise RunError([f"{path}: not a configuration"])
        return resolve(Config.model_validate(tree))
    except ValidationError as error:
        raise RunError([f"{path}: {message}" for message, _ in explain.explain(error, tree).values()]) from None
    except ConfigError as error:
        raise RunError(error.problems) from None


def _plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(path.read_bytes().decode("utf-8", "replace"))
    except FileNotFoundError:
        raise RunError([f"{path}: no such file; a run directory contains one"]) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError([f"{path}: cannot be read ({error})"]) from None
    if not fits(plan, {"layout": dict}):
        raise RunError([f"{path}: not a plan; expected an object with a layout"])
    return dict(plan)


def _metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that name their step; add the unreadable ones to `problems`."""
    try:
        lines = [line for line in path.read_bytes().decode("utf-8", "replace").split("\n") if line]
    except OSError:
        problems.append("metrics.jsonl: no such file; losses are not known")
        return []
    found = [row for row in parse(lines) if fits(row, {"step": int})]
    if len(found) < len(lines):
        problems.append(f"metrics.jsonl: {len(lines) - len(found)} of {len(lines)} lines cannot be read")
    return found


# --- ranks ----------------------------------------------------------------------------------------------------------


def _ranks(run: Run) -> None:
    """Read every event file into `run`. Raises RunError if none can be used or one has another schema."""
    problems = _Problems()
    files = {int(m[1]): path for path in run.folder.iterdir() if (m := _NAME.fullmatch(path.name))}
    for rank, path in sorted(files.items()):
        if not path.is_file():
            problems.add(rank, "the event file is not a regular file; it is left out")
            continue
        if rank >= run.layout.world:
            problems.add(rank, f"not in the plan of {count_of(run.layout.world, 'rank')}; the event file is left out")
            continue
        try:
            attempt = read_attempt(path)
        except SchemaError as error:
            raise RunError([f"{path}: {error}"]) from None
        except OSError as error:
            problems.add(rank, f"the event file cannot be read ({error.strerror})")
            continue
        if misfit := _misfit(run, rank, attempt):
            problems.add(rank, misfit)
        else:
            run.ranks[rank] = _log(run, rank, attempt, problems)
    for rank in sorted(set(range(run.layout.world)) - set(files)):
        problems.add(rank, "no event file")
    _leave_out_earlier_attempts(run, problems)
    run.problems += problems.sentences()
    if not run.ranks:
        nothing = ["no events.rank*.jsonl; no rank has started, or this is not a run directory"]
        raise RunError([f"{run.folder}: {problem}" for problem in (run.problems if files else nothing)])


def _misfit(run: Run, rank: int, attempt: Attempt) -> str:
    """Return why a file cannot be used as rank `rank`'s; empty if it can."""
    if attempt.lines == 0:
        return "the event file is empty"
    if not attempt.header:
        return "the event file has no readable header; it is left out"
    given, at, world = attempt.header, run.layout.coords(rank), run.layout.world
    place = {axis: getattr(at, axis) for axis in BASE_AXES}
    if given["rank"] != rank or given["world"] not in (None, world) or given["coords"] not in (None, place):
        return "the event file belongs to another rank or another layout and is left out"
    for channel in given["channels"]:
        pair = channel.get("ranks")
        if channel["axis"] not in (*AXES, "shard", "replica", "embed") or (
            pair is not None and not _is_pair(pair, rank, world)
        ):
            return "the event file names groups that this layout does not have; it is left out"
    return ""


def _is_pair(ranks: list[int], rank: int, world: int) -> bool:
    return len(ranks) == 2 and ranks[0] != ranks[1] and rank in ranks and all(0 <= r < world for r in ranks)


def _log(run: Run, rank: int, attempt: Attempt, problems: _Problems) -> RankLog:
    """Return the log of `rank`, and add what is wrong with it to `problems`."""
    calls, spans = attempt.rows(len(run.plan_of(rank).steps))
    end = attempt.last("end")
    if attempt.broken:
        what = f"{attempt.broken} {'line' if attempt.broken == 1 else 'lines'}"
        what += f", the first is line {attempt.first_broken}" if attempt.first_broken else ""
        steps = f"step{'s' if len(attempt.gaps) > 1 else ''} {ranges(attempt.gaps)}"
        what += f"; rows of {steps} are left out too" if attempt.gaps else ""
        problems.add(rank, "unreadable lines of the event file are left out", what)
    if attempt.cut:
        problems.add(rank, "the last line of the event file is cut off")
    if end is None:
        problems.add(rank, "the event file has no end: the run is still in progress, or it died")
    elif end["dropped"]:
        problems.add(rank, "rows were dropped because there were too many", str(end["dropped"]))
    return RankLog(
        rank, attempt.header, attempt.number, attempt.steps, calls, spans, attempt.facts["clock"],
        attempt.last("memory"), attempt.facts["kernel"], attempt.last("ceiling"), attempt.facts["sample"],
        attempt.facts["torch_trace"], attempt.facts["difference"], end, attempt.last("engine"),
    )  # fmt: skip


def _leave_out_earlier_attempts(run: Run, problems: _Problems) -> None:
    """Remove the ranks that recorded nothing of the latest attempt."""
    latest = max((log.header["attempt"] for log in run.ranks.values()), default=0)
    for rank in [rank for rank, log in run.ranks.items() if log.header["attempt"] < latest]:
        problems.add(rank, f"no records of attempt {latest}; those of earlier attempts are left out")
        del run.ranks[rank]


class _Problems:
    """Problems by kind and rank, one sentence per kind, so that 1,024 missing files give one line."""

    SHOWN = 3

    def __init__(self) -> None:
        self._found: dict[str, dict[int, str]] = {}

    def add(self, rank: int, what: str, detail: str = "") -> None:
        self._found.setdefault(what, {})[rank] = detail

    def sentences(self) -> list[str]:
        lines = []
        for what, ranks in self._found.items():
            details = [f"rank {rank}: {detail}" for rank, detail in ranks.items() if detail]
            more = [f"{len(details) - self.SHOWN} more"] if len(details) > self.SHOWN else []
            said = f" ({'; '.join(details[: self.SHOWN] + more)})" if details else ""
            lines.append(f"rank{'s' if len(ranks) > 1 else ''} {ranges(ranks)}: {what}{said}")
        return lines


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as text in ascending ranges, such as "0-3, 7"; at most ten pieces."""
    pieces: list[list[int]] = []
    for n in sorted(numbers):
        if pieces and n == pieces[-1][1] + 1:
            pieces[-1][1] = n
        else:
            pieces.append([n, n])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in pieces]
    return ", ".join(texts[:10] + ([f"... ({len(texts) - 10} more)"] if len(texts) > 10 else []))
