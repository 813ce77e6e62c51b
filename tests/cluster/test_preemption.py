"""A job that Slurm warns or preempts saves, goes back to the queue and goes on: the curve of a run in one piece."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.jobs import PATIENCE_S, Jobs, numbers
from tests.cluster.virtual import VirtualCluster
from tests.ranks.runs import rows

STEPS, SIGNALLED_AT = 40, 5
SETS = {"train.steps": STEPS, "train.eval_every": 5, "model.seq_len": 64, "model.hidden_size": 64,
        "checkpoint.keep": 2}  # fmt: skip
GONE_S = 60.0


@pytest.fixture
def jobs(cluster: VirtualCluster, tmp_path: Path) -> Jobs:
    return Jobs(cluster, tmp_path)


@pytest.fixture(scope="module")
def expected(holder, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:  # type: ignore[no-untyped-def]
    """What eight processes of one machine find, never interrupted."""
    found = numbers(Jobs(holder.get(), tmp_path_factory.mktemp("local")).local("local", sets=SETS))
    assert [row[0] for row in found if row[1] is not None] == list(range(1, STEPS + 1))
    return found


def submit(jobs: Jobs, via: str, *sbatch: str) -> int:
    """A batch script of a person's own, which says how often it was started before; the job's id."""
    argv = jobs.argv("run", via, "--resume", "auto", sets={**SETS, "launch.ranks_per_node": 4})
    words = " ".join(f"'{word}'" for word in argv)
    return jobs.cluster.sbatch(
        "--nodes=2", "--ntasks-per-node=4", "--requeue", "--open-mode=append", f"--output={jobs.out('run')}",
        "--signal=B:USR1@30", *sbatch, cwd=jobs.folder,
        script=f'echo "restarts before: ${{SLURM_RESTART_COUNT:-0}}"\nexec {words}')  # fmt: skip


def until_step(jobs: Jobs, step: int, said: Any = None) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in jobs.metrics("run")):
        assert time.monotonic() < deadline, said() if said else jobs.said("run")
        time.sleep(0.05)


def start_again(cluster: VirtualCluster, job: int) -> None:
    """Start the requeued job without its wait, but not in the second of its requeue.

    slurmd revokes what was signed in or before that second ("Job credential revoked"), and the job would be FAILED.
    """
    time.sleep(2)
    cluster.start_now(job)


def until_nothing_runs(jobs: Jobs) -> None:
    deadline = time.monotonic() + 30
    while not jobs.nothing_runs():
        assert time.monotonic() < deadline, "ranks are left"
        time.sleep(0.2)


def saved_step(jobs: Jobs) -> int:
    """The step of the only checkpoint, where exit.json and the last step's numbers are too."""
    run = jobs.folder / "run"
    ended = json.loads((run / "exit.json").read_text())
    assert ended["code"] == 75, ended
    saved = [path.parent.name for path in (run / "checkpoints").glob("step_*/manifest.json")]
    assert len(saved) == 1, saved
    step = int(saved[0].removeprefix("step_"))
    assert SIGNALLED_AT <= step < STEPS
    assert ended["step"] == step == jobs.metrics("run")[-1]["step"]
    return step


def check_went_on(jobs: Jobs, step: int, expected: list[tuple]) -> None:
    """The whole curve is that of the run in one piece, and every log has both attempts."""
    run = jobs.folder / "run"
    assert numbers(jobs.metrics("run")) == expected
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    for rank in range(8):
        headers = [row for row in rows(run / f"events.rank{rank}.jsonl") if "host" in row and "pid" in row]
        assert len(headers) == 2, headers
        log = (run / "logs" / f"rank{rank}.log").read_text()
        assert len(re.findall(rf"saved \S*step_0*{step}\b", log)) == (rank == 0), log
    until_nothing_runs(jobs)


@pytest.mark.parametrize("via", ["slurm", "torchrun"])
def test_warned_job_saves_and_comes_back(via: str, jobs: Jobs, expected: list[tuple]) -> None:
    cluster = jobs.cluster
    job = submit(jobs, via)
    until_step(jobs, SIGNALLED_AT)
    cluster.scancel("--signal=USR1", "--batch", job)
    try:
        cluster.wait_restart(job, 1, GONE_S)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{jobs.said('run')}") from None
    until_nothing_runs(jobs)
    step = saved_step(jobs)
    start_again(cluster, job)
    ended = wait_completed(jobs, job)
    assert (ended["ExitCode"], ended["Restarts"]) == ("0:0", "1"), ended
    said = jobs.said("run")
    assert re.findall(r"restarts before: (\d)", said) == ["0", "1"], said
    assert "USR1 received (Slurm's warning: the job's time is nearly over): asking 8 ranks to save" in said, said
    assert f"job {job} is back in the queue" in said, said
    check_went_on(jobs, step, expected)


def wait_completed(jobs: Jobs, job: int) -> dict[str, str]:
    try:
        return jobs.cluster.wait_state(job, {"COMPLETED"}, PATIENCE_S)
    except (RuntimeError, TimeoutError) as error:
        raise AssertionError(f"{error}\n{jobs.said('run')}") from None


def test_preempted_job_comes_back(jobs: Jobs, expected: list[tuple]) -> None:
    cluster = jobs.cluster
    job = submit(jobs, "slurm", "--exclusive")
    until_step(jobs, SIGNALLED_AT)
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.out",
                            script="sleep 600", cwd=jobs.folder)  # fmt: skip
    try:
        cluster.wait_state(urgent, {"RUNNING"}, GONE_S)
    except (RuntimeError, TimeoutError) as error:
        raise AssertionError(f"{error}\n{jobs.said('run')}") from None
    until_nothing_runs(jobs)
    step = saved_step(jobs)
    start_again(cluster, job)
    found = cluster.job(job)
    assert (found["JobState"], found["Restarts"]) == ("PENDING", "1"), found  # once, not by Slurm and by us
    cluster.scancel(urgent)
    cluster.wait_state(job, {"RUNNING"}, GONE_S)
    ended = wait_completed(jobs, job)
    assert (ended["ExitCode"], ended["Restarts"]) == ("0:0", "1"), ended
    said = jobs.said("run")
    assert re.findall(r"restarts before: (\d)", said) == ["0", "1"], said
    check_went_on(jobs, step, expected)


def test_followed_through_a_requeue(jobs: Jobs, expected: list[tuple]) -> None:
    cluster = jobs.cluster
    out = jobs.folder / "follow.out"
    with out.open("w") as stream:
        follower = cluster.popen(0, jobs.argv("run", "slurm", sets=SETS), stdout=stream, stderr=stream,
                                 cwd=jobs.folder)  # fmt: skip
    try:
        until_step(jobs, SIGNALLED_AT, out.read_text)
        match = re.search(r"submitted: job (\d+)", out.read_text())
        assert match, out.read_text()
        job = int(match[1])
        cluster.scancel("--signal=USR1", "--batch", job)
        cluster.wait_restart(job, 1, GONE_S)
        until_nothing_runs(jobs)
        step = saved_step(jobs)
        time.sleep(6)  # it looks at the queue every 5 s: it sees the job wait
        assert follower.poll() is None, out.read_text()
        start_again(cluster, job)
        assert follower.wait(PATIENCE_S) == 0, out.read_text()
    finally:
        follower.kill()
        follower.wait()
    text = out.read_text()
    assert "waiting in the queue" in text.partition("is back in the queue")[2], text
    assert f"\njob {job}: COMPLETED" in text, text
    check_went_on(jobs, step, expected)
