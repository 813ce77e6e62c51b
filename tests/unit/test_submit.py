"""Submitting a job and following it to its end, against recorded answers of Slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dist_gpt.config.errors import ConfigError
from dist_gpt.rundir import note_end
from dist_gpt.skips import CHANGE, CHANGE_SCALE
from launch.run_files import go_on
from launch.starter import NotStartedError
from launch.starters.slurm_submit import Ended, Following, Guard, Stopped, cancel, final_state, follow, run_job, submit
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
INVALID = (1, "", "slurm_load_jobs error: Invalid job id specified")
PENDING = "JobId=7 JobName=x\n   JobState=PENDING Reason=BeginTime\n   Requeue=1 Restarts=1 ExitCode=0:0"
DONE = "JobId=7 JobName=x\n   JobState=COMPLETED Reason=None\n   ExitCode=0:0"


class Slurm:
    """Answers by tool, one after the other (the last one again and again), and a clock of its own."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers, self.now = answers, 0.0
        self.calls: list[tuple[str, ...]] = []
        self.at: list[tuple[float, Callable[[], None]]] = []

    def run(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.calls.append(tuple(argv))
        left = self.answers.get(argv[0], [(127, "", f"{argv[0]}: not found")])
        answer = left.pop(0) if len(left) > 1 else left[0]
        code, out, err = (0, answer, "") if isinstance(answer, str) else answer
        return subprocess.CompletedProcess(list(argv), code, out, err)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self.at and self.at[0][0] <= self.now:
            self.at.pop(0)[1]()

    def clock(self) -> float:
        return self.now


def test_submitting() -> None:
    assert submit(Path("job.sbatch"), Slurm(sbatch=["4711;cluster\n"]).run) == "4711"
    with pytest.raises(ConfigError, match="sbatch was not found.*--via local"):
        submit(Path("job.sbatch"), Slurm().run)
    refused = (1, "", "sbatch: error: invalid partition specified: gpux\nsbatch: error: Batch job submission failed")
    with pytest.raises(ConfigError, match="invalid partition specified: gpux"):
        submit(Path("job.sbatch"), Slurm(sbatch=[refused]).run)
    with pytest.raises(ConfigError, match="no message") as unknown:
        submit(Path("job.sbatch"), Slurm(sbatch=["what?"]).run)
    with pytest.raises(ConfigError, match="did not answer.*squeue --me") as late:
        submit(Path("job.sbatch"), Slurm(sbatch=[(124, "", "sbatch did not answer within 60 s")]).run)
    assert not any(isinstance(one.value, NotStartedError) for one in (unknown, late)), "it may well run"


def test_a_refusal_is_said_once() -> None:
    said = "sbatch: error: invalid partition specified: gpux\nsbatch: error: Batch job submission failed: Invalid name"
    with pytest.raises(NotStartedError) as caught:
        submit(Path("job.sbatch"), Slurm(sbatch=[(1, "", said)]).run)
    assert str(caught.value) == ("Slurm refuses the job: invalid partition specified: gpux; sinfo -s lists the "
                                 "partitions (launch.slurm.partition)")  # fmt: skip
    only = (1, "", "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy")
    with pytest.raises(NotStartedError, match="violates accounting"):
        submit(Path("job.sbatch"), Slurm(sbatch=[only]).run)


def test_a_job_that_never_starts_is_given_up_by_hand(tmp_path: Path) -> None:
    fake = Slurm(squeue=["PENDING|PartitionConfig|N/A\n", "RUNNING|None|x\n", INVALID], scontrol=[DONE])
    _, said, _ = followed(fake, tmp_path)
    assert "will never start; sinfo -s lists the partitions. Press Ctrl-C to cancel it" in said[0]
    assert not any("Ctrl-C" in line for line in said[1:])


@pytest.mark.parametrize(("state", "told"), [("TIMEOUT", True), ("CANCELLED", True), ("FAILED", False)])
def test_who_follows_a_job_that_said_nothing_is_told_how_to_go_on(
    state: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that ended by itself has said it in its log."""
    monkeypatch.setattr("launch.starters.slurm_submit.follow", lambda *given, **more: Ended(state, 1, ""))
    (tmp_path / "checkpoints" / "step_00000095").mkdir(parents=True)
    fake = Slurm(sbatch=["7\n"])
    assert run_job(tmp_path / "job.sbatch", tmp_path / "x.out", tmp_path, go_on=go_on, run=fake.run) == 1
    words = f"saved: step_00000095; continue with: dist-gpt launch {tmp_path}/config.yaml --via slurm --resume auto"
    assert (words in capsys.readouterr().err) == told


@pytest.mark.parametrize(("change", "ends"), [
    (CHANGE, "and start a new run: dist-gpt launch {0}/config.yaml --via local --set run_dir={0}-2 --set KEY=VALUE"),
    (CHANGE_SCALE, "and continue: dist-gpt launch {0}/config.yaml --via local --resume auto --set KEY=VALUE"),
])  # fmt: skip
def test_a_run_that_would_end_the_same_is_told_what_to_change(change: str, ends: str, tmp_path: Path) -> None:
    note_end(tmp_path, 1, "6 of 6 steps skipped", 6, change)
    said = go_on(tmp_path, "local")
    assert said.startswith("there is no checkpoint; continuing unchanged would end the same way. ") and change in said
    assert said.endswith(ends.format(tmp_path))


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert go_on(tmp_path, "local").startswith("no checkpoint yet; start again with: dist-gpt")


def followed(fake: Slurm, folder: Path) -> tuple[Any, list[str], str]:
    said: list[str] = []
    shown: list[str] = []
    ended = follow("7", folder / "slurm-%j.out", said.append, shown.append, folder, run=fake.run, sleep=fake.sleep,
                   clock=fake.clock)  # fmt: skip
    return ended, said, "".join(shown)


def test_following_through_queue_and_requeue(tmp_path: Path) -> None:
    log = tmp_path / "slurm-7.out"
    fake = Slurm(
        squeue=["PENDING|Priority|2026-11-24T12:00:00\n", "PENDING|Priority|N/A\n", "RUNNING|None|x\n",
                "PREEMPTED|None|x\n", "PENDING|BeginTime|N/A\n", "RUNNING|None|x\n", INVALID],
        scontrol=[PENDING, DONE],
    )  # fmt: skip

    def write(text: bytes) -> Callable[[], None]:
        def now() -> None:
            with open(log, "ab") as file:
                file.write(text)

        return now

    fake.at = [(11.0, write("step 1 ü".encode()[:-1])), (12.0, write("ü\n".encode()[1:])), (26.0, write(b"step 2\n")),
               (31.0, write(b"last words\n"))]  # fmt: skip
    ended, said, shown = followed(fake, tmp_path)
    assert shown == "step 1 ü\nstep 2\nlast words\n"
    assert (ended.state, ended.code) == ("COMPLETED", 0)
    text = "\n".join(said)
    for part in ("jobs of higher priority come first; Slurm expects to start it at 2026-11-24 12:00:00",
                 "RUNNING: running", "about two minutes", "COMPLETED: done"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(("scontrol", "sacct", "exit_file", "code"), [
    ("JobState=FAILED Reason=x ExitCode=2:0", "", None, 2),
    ("JobState=FAILED Reason=x ExitCode=3:0", "", None, 1),
    ("JobState=TIMEOUT Reason=x ExitCode=0:15", "", None, 1),
    ("JobState=FAILED Reason=x ExitCode=75:0", "", {"code": 75, "job": "7"}, 75),
    ("JobState=FAILED Reason=x ExitCode=1:0", "", {"code": 2, "job": "7"}, 2),
    ("JobState=FAILED Reason=x ExitCode=1:0", "", {"code": 0}, 1),  # of a run that was no job
    ("JobState=FAILED Reason=x ExitCode=1:0", "", {"code": 0, "job": "6"}, 1),  # of the job before
    ("JobState=NODE_FAIL Reason=x ExitCode=0:0", "", {"code": 0, "job": "7"}, 1),  # of an earlier life
    ("JobState=TIMEOUT Reason=x ExitCode=0:15", "", {"code": 75, "job": "7"}, 1),
    ("JobState=FAILED Reason=x ExitCode=1:0", "", {"what": 1}, 1),
    (INVALID, "CANCELLED by 0|0:15\n", None, 1),
    (INVALID, "COMPLETED|0:0\n", None, 0),
])  # fmt: skip
def test_how_it_ended(tmp_path: Path, scontrol: Any, sacct: str, exit_file: Any, code: int) -> None:
    if exit_file is not None:
        (tmp_path / "exit.json").write_text(json.dumps(exit_file))
    fake = Slurm(squeue=["RUNNING|None|x", ""], scontrol=[scontrol], sacct=[sacct])
    assert followed(fake, tmp_path)[0].code == code


def test_slurm_that_is_away(tmp_path: Path) -> None:
    away = (1, "", "slurm_load_jobs error: Unable to contact slurm controller")
    back = Slurm(squeue=["RUNNING|None|x", *[away] * 20, ""], scontrol=[DONE])
    assert followed(back, tmp_path)[0].code == 0
    with pytest.raises(ConfigError, match=r"has not answered about job 7 for 120 s"):
        followed(Slurm(squeue=["RUNNING|None|x", away]), tmp_path)
    assert final_state("7", Slurm().run) is None


def test_a_log_that_was_cut_is_shown_from_its_start(tmp_path: Path) -> None:
    log = tmp_path / "x.out"
    shown: list[str] = []
    log.write_text("before\n")
    one = Following("7", log, print, shown.append)
    one.show_more()
    log.write_text("new\n")
    one.show_more()
    assert shown == ["before\n", "new\n"]


def test_cancelling() -> None:
    fake = Slurm(scancel=[""], squeue=["RUNNING\n", "COMPLETING\n", INVALID])
    assert cancel("7", fake.run, fake.sleep, fake.clock)
    assert fake.calls[0] == ("scancel", "7")
    fake = Slurm(scancel=[""], squeue=["COMPLETING\n"])
    assert not cancel("7", fake.run, fake.sleep, fake.clock)


def test_what_runs_is_interrupted_once() -> None:
    """Two signals may come before the first one's exception has arrived where it is caught."""
    guard, cleaned_up = Guard(), False
    with pytest.raises(Stopped), guard.interrupted():
        try:
            guard.on_signal(signal.SIGINT, None)
        finally:
            guard.on_signal(signal.SIGTERM, None)
            cleaned_up = True
    assert cleaned_up and guard.number == signal.SIGINT
    reached = False
    with pytest.raises(Stopped), guard.interrupted():  # asked before
        reached = True
    assert not reached


TOOLS = {
    "sbatch": "touch submitting; sleep $SLOW; echo 7",
    "squeue": """if [ -e cancelled ]; then echo "Invalid job id specified" >&2; exit 1; fi; echo 'RUNNING|None|x'""",
    "scontrol": "echo JobState=RUNNING ExitCode=0:0",
    "scancel": "touch cancelling; sleep $SLOW; echo $1 > cancelled",
}
FOLLOWER = """
    import signal, sys
    from pathlib import Path
    from launch.starters.slurm_submit import run_job
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what runs in the background
    sys.exit(run_job(Path("job.sbatch"), Path("slurm-%j.out"), Path()))
"""


@pytest.mark.parametrize(("first", "slow"), [("running", "0.5"), ("submitting", "0.5")])
def test_ctrl_c_twice_cancels_the_job(tmp_path: Path, first: str, slow: str) -> None:
    """The whole terminal's process group gets each, as from a keyboard: while the job runs, or before its number is
    known; and again while it is being cancelled."""
    (tmp_path / "bin").mkdir()
    for name, text in TOOLS.items():
        tool = tmp_path / "bin" / name
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "SLOW": slow}
    follower = subprocess.Popen([sys.executable, "-c", textwrap.dedent(FOLLOWER)], cwd=tmp_path, env=env, text=True,
                                stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    assert follower.stderr is not None
    said = ""
    try:
        if first == "running":
            while "RUNNING" not in said:
                line = follower.stderr.readline()
                assert line, said
                said += line
        else:
            until((tmp_path / "submitting").exists)
        os.killpg(follower.pid, signal.SIGINT)
        until((tmp_path / "cancelling").exists)
        os.killpg(follower.pid, signal.SIGINT)
        said += follower.communicate(timeout=PATIENCE_S)[1]
    finally:
        follower.kill()
        follower.wait()
    assert (follower.returncode, (tmp_path / "cancelled").read_text()) == (130, "7\n"), said
    assert "cancelling job 7\njob 7 is gone\n" in said and "Traceback" not in said


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
