"""Whole runs through the command line, each started once for all tests that look at it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from launch.spec import WORKER
from tests.ranks.preloaded import Started, environment

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600.0
"""Limit against hanging only: how long a run takes depends on the machine."""
STEPS, EVAL_EVERY = 6, 3
CONFIG: dict[str, Any] = {
    "name": "tiny",
    # dropout inside attention is keyed per rank; everything else must not depend on the layout
    "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "seq_len": 32, "dropout": 0.1,
              "attention_dropout": 0.0},
    "optim": {"lr": 1e-2, "warmup": 2, "clip": 1.0},
    "train": {"steps": STEPS, "global_batch": 8, "dtype": "fp64", "eval_every": EVAL_EVERY, "eval_batches": 1},
}  # fmt: skip
TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer, take one down\n" for i in range(250))


@dataclass
class Run:
    """A command that has ended."""

    code: int
    out: str
    err: str
    run_dir: Path

    @property
    def lines(self) -> list[str]:
        """Lines of standard output."""
        return self.out.splitlines()

    def metrics(self) -> list[dict[str, Any]]:
        return rows(self.run_dir / "metrics.jsonl")

    def events(self, rank: int) -> list[dict[str, Any]]:
        return rows(self.run_dir / f"events.rank{rank}.jsonl")


@dataclass
class Killed(Run):
    """A run of two ranks of which one was killed, and what was seen before."""

    victim: int = 0
    listening: set[str] = field(default_factory=set)
    left: list[int] = field(default_factory=list)


class Place:
    """A folder with the configuration, a text and a cache, in which commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "text.txt").write_text(TEXT)
        data = {"source": str(folder / "text.txt"), "cache": str(folder / "cache")}
        self.config = folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump({**CONFIG, "data": data}))

    def argv(self, verb: str, run_dir: str, *options: str, sets: Mapping[str, object] | None = None) -> list[str]:
        """`VERB CONFIG` with its options."""
        pairs = {"run_dir": self.folder / run_dir, **(sets or {})}
        words = [word for key, value in pairs.items() for word in ("--set", f"{key}={value}")]
        return [verb, str(self.config), *options, *words]

    def start(self, argv: list[str], module: str = "dist_gpt") -> Started:
        """`python -m MODULE ARGV`, started."""
        return Started(module, argv, self.folder, environment())

    def run(self, argv: list[str], run_dir: str, module: str = "dist_gpt") -> Run:
        """The same, to its end."""
        process = self.start(argv, module)
        out, err = finish(process)
        return Run(process.wait(), out, err, self.folder / run_dir)

    def ask_to_stop(self, argv: list[str], run_dir: str, steps: int) -> Run:
        """Start a run that would not end, send its launcher SIGTERM after `steps` steps, and see it to its end."""
        process = self.start(argv)
        try:
            wait_until(lambda: len(rows(self.folder / run_dir / "metrics.jsonl")) >= steps, process)
            process.send_signal(signal.SIGTERM)
            out, err = finish(process)
        finally:
            process.kill()
        return Run(process.wait(), out, err, self.folder / run_dir)

    def torchrun(self, argv: list[str], run_dir: str, ranks: int) -> Run:
        """`torchrun --nproc-per-node RANKS -m dist_gpt ARGV`, on a free port."""
        started = ["--standalone", "--nproc-per-node", str(ranks), "-m", "dist_gpt", *argv]
        return self.run(started, run_dir, module="torch.distributed.run")

    def kill_one_of_two(self, run_dir: str, victim: int) -> Killed:
        """Start a run that would not end on two pipeline ranks, look at it, kill rank `victim`."""
        sets = {"parallel.pp": 2, "train.steps": 1_000_000, "train.eval_batches": 0, "train.eval_every": 0}
        process = self.start(self.argv("launch", run_dir, sets=sets))
        path = self.folder / run_dir
        try:
            wait_until(lambda: len(rows(path / "metrics.jsonl")) >= 2, process)
            ranks = ranks_below(process.pid)
            assert sorted(ranks) == [0, 1]
            sockets = [c for p in ranks.values() for c in p.net_connections(kind="inet")]
            ranks[victim].send_signal(signal.SIGKILL)
            out, err = finish(process)
        finally:
            process.kill()
        return Killed(
            process.wait(), out, err, path, victim,
            listening={c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN},
            left=[p.pid for p in ranks.values() if p.is_running()],
        )  # fmt: skip


def run_ranks(folder: Path, module: str, *arguments: object, ranks: int, preload: tuple[str, ...] = ("torch",)) -> str:
    """Run `python -m MODULE ARGUMENTS` as each of `ranks` forked processes; returns rank 0's log."""
    env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    code, _ = launch_ranks(folder, [module, *map(str, arguments)], ranks, env, preload)
    logs = [(folder / "logs" / f"rank{rank}.log").read_text() for rank in range(ranks)]
    assert code == 0, "\n".join(logs)
    return logs[0]


def launch_ranks(
    folder: Path, program: list[str], ranks: int, env: dict[str, str], preload: tuple[str, ...]
) -> tuple[int, str]:
    """Launch `program`, a module or a file and its arguments, with logs in `folder`; returns code and output."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    spec = folder / "logs" / "spec.json"
    fields = {"argv": [sys.executable, *WORKER, *program], "ranks": ranks, "log_dir": str(folder / "logs"), "env": env}
    spec.write_text(json.dumps({**fields, "preload": preload}))
    process = Started("tests.ranks.launching", [str(spec)], ROOT, environment())
    out, err = finish(process)
    return process.wait(), out + err


def ranks_below(pid: int) -> dict[int, psutil.Process]:
    """Processes that descend from process `pid` and run ranks, by rank: their entry names them so."""
    below = psutil.Process(pid).children(recursive=True)
    return {int(found[1]): p for p in below if (found := re.fullmatch(r"rank(\d+)", p.name()))}


def finish(process: Started | subprocess.Popen[str]) -> tuple[str, str]:
    """Both streams to the end; a process that does not end is killed and fails the test."""
    try:
        return process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        end(process)
        with suppress(subprocess.TimeoutExpired):  # a process that nobody knows of may keep a stream open
            process.communicate(timeout=10)
        out, err = process.so_far() if isinstance(process, Started) else ("", "")
        raise AssertionError(f"did not end in {PATIENCE_S:.0f} s\n{out}\n{err}") from None


def end(process: Started | subprocess.Popen[Any]) -> None:
    """Kill a command, and what it has started, unless it has ended."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()


def wait_until(condition: Any, process: Started | subprocess.Popen[str]) -> None:
    """Until `condition()` holds; fails when `process` has ended before."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def rows(path: Path) -> list[dict[str, Any]]:
    """Finished lines of a JSONL file; none where there is no file yet."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def attempts(events: Path) -> list[int]:
    """Numbers of the attempts in a file of events, without what a killed rank left cut off."""
    found = []
    for line in events.read_text().splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if "schema" in row:
                found.append(row["attempt"])
    return found


def until_started_again(run_dir: Path, process: Started) -> None:
    """Until the second attempt of a run has made a step."""
    wait_until(lambda: attempts(run_dir / "events.rank0.jsonl") == [0, 1], process)
    made = len(rows(run_dir / "metrics.jsonl"))
    wait_until(lambda: len(rows(run_dir / "metrics.jsonl")) > made, process)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below `folder`, with its size and when it was changed."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}
