"""A rank is killed or stopped, a link goes down: the job ends in time, the culprit is named, nothing is left."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from dist_gpt.train.heartbeat import BEAT_S
from tests.cluster.jobs import Jobs
from tests.cluster.virtual import VirtualCluster
from tests.ranks.runs import ROOT, rows

SILENCE_S = 6
NAMED_S = 60.0
VICTIM = 6
"""On node2, neither first nor last of it: pp 1, dp 1, tp 0."""
LONG = {"train.steps": 100_000, "train.eval_every": 0, "train.eval_batches": 0, "launch.silence_s": SILENCE_S,
        "launch.ranks_per_node": 4}  # fmt: skip
ENDED = {"FAILED", "CANCELLED", "COMPLETED", "NODE_FAIL", "TIMEOUT"}


@pytest.fixture
def jobs(cluster: VirtualCluster, tmp_path: Path) -> Jobs:
    return Jobs(cluster, tmp_path)


def training(jobs: Jobs, via: str) -> int:
    """A job that has done some steps, and said so: a heartbeat comes twice a second. Its id."""
    job = jobs.submit("run", via, sets=LONG)
    deadline = time.monotonic() + 120
    while len(jobs.metrics("run")) < 3:
        assert time.monotonic() < deadline, jobs.said("run")
        time.sleep(0.2)
    time.sleep(3 * BEAT_S)
    return job


def pid_of(jobs: Jobs, rank: int) -> int:
    header = rows(jobs.folder / "run" / f"events.rank{rank}.jsonl")[0]
    assert header["host"] == f"node{1 + rank // 4}"
    return int(header["pid"])


def until_said(jobs: Jobs, words: str) -> float:
    """Seconds until the job says `words`."""
    began = time.monotonic()
    while words not in jobs.said("run"):
        assert time.monotonic() - began < NAMED_S, jobs.said("run")
        time.sleep(0.1)
    return time.monotonic() - began


def until_nothing_runs(jobs: Jobs) -> None:
    deadline = time.monotonic() + 60
    while not jobs.nothing_runs():
        left = [Path(f"/proc/{pid}/cmdline") for node in (1, 2) for pid in jobs.cluster.processes(node, str(ROOT))]
        assert time.monotonic() < deadline, [path.read_bytes() for path in left if path.exists()]
        time.sleep(0.2)


@pytest.mark.parametrize("via", ["slurm", "torchrun", "mpi"])
@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "is stopped: no heartbeat")])
def test_a_rank_is_named(via: str, number: signal.Signals, words: str, jobs: Jobs) -> None:
    job = training(jobs, via)
    pid = pid_of(jobs, VICTIM)
    os.kill(pid, number)
    took = until_said(jobs, f"rank {VICTIM} (pp 1, dp 1, cp 0, tp 0) on node2, pid {pid}")
    until_said(jobs, f"end of {jobs.folder / 'run' / 'logs' / f'rank{VICTIM}.log'}")
    said = jobs.said("run")
    first = next(line for line in said.splitlines() if line.startswith("rank ") and "node" in line and "pid" in line)
    assert first.startswith(f"rank {VICTIM} (") and words in first, said
    assert "in step " in said and " number " in said and "waited for by rank" in said, said
    print(f"{via} {number.name}: named after {took:.1f} s")
    jobs.cluster.wait_state(job, ENDED, 60)
    until_nothing_runs(jobs)


def test_a_link_that_is_down_is_named_as_a_link(jobs: Jobs) -> None:
    job = training(jobs, "slurm")
    jobs.cluster.link(2, False)
    try:
        took = until_said(jobs, "link down: node1 and node2 cannot reach each other")
        print(f"link: named after {took:.1f} s")
        said = jobs.said("run")
        assert "died" not in said and "is stopped" not in said, said
        until_nothing_runs(jobs)  # also on the node that nobody reaches: its ranks leave by themselves
    finally:
        jobs.cluster.link(2, True)
        jobs.cluster.scancel(str(job))
    ended = json.loads((jobs.folder / "run" / "exit.json").read_text())
    assert ended["code"] == 1 and ended["why"].startswith("link down: node1 and node2"), ended
