"""`launch` into a run directory: from where it goes on, who may write into it, and that a job of Slurm's does the same.

Slurm's tools are small scripts here, which run the job on this machine; tests/cluster has the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from dist_gpt import cli
from tests.ranks.resuming import curve
from tests.ranks.runs import STEPS, Place, Run, environment, finish, ranks_below, rows, until_started_again, wait_until

ONE = {"train.eval_batches": 0, "train.eval_every": 0}
LONG = {**ONE, "train.steps": 1_000_000}
TOOLS = {
    "sbatch": """for script; do :; done
        export SLURM_JOB_ID=7 SLURM_JOB_NODELIST=$(hostname)
        (bash "$script" >"$(dirname "$script")/logs/slurm-7.out" 2>&1; echo $? >"$HERE/code") >/dev/null 2>&1 &
        echo 7""",
    "squeue": """[ -f "$HERE/code" ] && exit
        case "$*" in *--steps*) ;; *) echo "RUNNING|None|N/A";; esac""",
    "scontrol": """code=$(cat "$HERE/code"); state=FAILED; [ "$code" = 0 ] && state=COMPLETED
        echo "JobState=$state ExitCode=$code:0" """,
    "scancel": "",
    "srun": """while case "$1" in --*) ;; *) false;; esac; do shift; done
        export SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE=1
        export SLURM_NODEID=0 SLURM_STEP_NUM_NODES=1
        exec "$@" """,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def saved(place: Place) -> Run:
    """A whole run, all of its steps saved."""
    sets = {**ONE, "checkpoint.every": 1, "checkpoint.keep": STEPS}
    run = place.run(place.argv("launch", "saved", sets=sets), "saved")
    assert run.code == 0, run.err
    return run


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in TOOLS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\nHERE={tmp_path}\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{environment()['PATH']}")


def step(run: Run, number: int) -> Path:
    return run.run_dir / "checkpoints" / f"step_{number:08d}"


def test_a_branch_that_is_started_again_before_it_has_saved(place: Place, saved: Run) -> None:
    """It begins once more where it branches from, not at the beginning, and does not need the command line for it."""
    sets = {**LONG, "optim.decay": "none", "launch.max_restarts": 1}
    first = place.run(place.argv("launch", "first", sets={**sets, "train.steps": 3, "checkpoint.every": 3}), "first")
    assert first.code == 0, first.err
    origin = step(first, 3)
    process = place.start(place.argv("launch", "branch", "--resume", str(origin), sets=sets))
    run_dir = place.folder / "branch"
    try:
        wait_until(lambda: len(rows(run_dir / "metrics.jsonl")) >= 3, process)
        ranks_below(process.pid)[0].send_signal(signal.SIGKILL)
        until_started_again(run_dir, process)
        process.send_signal(signal.SIGTERM)
        out, error = finish(process)
    finally:
        process.kill()
    assert process.returncode == 75, error
    assert f"restart 1 of 1, from {origin}" in error
    assert f"resumed at step 3 from {origin}" in out and (run_dir / "resume_from").read_text() == f"{origin}\n"
    steps = json.loads((run_dir / "exit.json").read_text())["step"]
    whole = place.run(place.argv("launch", "whole", sets={**sets, "train.steps": steps}), "whole")
    assert whole.code == 0, whole.err
    assert curve(run_dir) == curve(whole.run_dir)[3:] and len(curve(run_dir)) == steps - 3 > 0


def test_back_in_its_own_past_and_on(place: Place, saved: Run) -> None:
    before = curve(saved.run_dir)
    again = place.run(place.argv("launch", "saved", "--resume", str(step(saved, 2)),
                                 sets={**ONE, "checkpoint.keep": STEPS}), "saved")  # fmt: skip
    assert again.code == 0, again.err
    assert f"{step(saved, 6)} is of a later step: moved to aside-step_00000006-" in again.out
    assert f"resumed at step 2 from {step(saved, 2)}" in again.lines
    assert curve(saved.run_dir) == before and not (saved.run_dir / "launcher.lock").exists()


@pytest.mark.parametrize("verb", ["launch", "train"])
def test_an_unrelated_folder_is_not_written_into(
    verb: str, place: Place, saved: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DIST_GPT_RUN_DIR", raising=False)
    (place.folder / "precious").mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as left:
        cli.main(place.argv(verb, "precious", "--resume", str(step(saved, 1)), sets=ONE))
    assert left.value.code == 2 and "precious already exists and is never overwritten" in capsys.readouterr().err
    assert os.listdir(place.folder / "precious") == []


def test_two_launchers_do_not_share_a_run_directory(place: Place) -> None:
    """The second one is told who is there, and has changed nothing."""
    process = place.start(place.argv("launch", "shared", sets=LONG))
    run_dir = place.folder / "shared"
    try:
        wait_until(lambda: len(rows(run_dir / "metrics.jsonl")) >= 1, process)
        before = (run_dir / "config.yaml").read_text()
        holder = json.loads((run_dir / "launcher.lock").read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), process.pid)
        for verb, *way in (["launch"], ["launch", "--via", "slurm"], ["train"]):
            sets = {**LONG, "log.every": 7}
            second = place.run(place.argv(verb, "shared", *way, "--resume", "auto", sets=sets), "shared")
            assert second.code == 2 and f"in use by another training run, process {process.pid} on " in second.err
        dry = place.run(place.argv("launch", "shared", "--resume", "auto", "--dry-run", sets=LONG), "shared")
        assert dry.code == 0, dry.err
        assert (run_dir / "config.yaml").read_text() == before and process.poll() is None
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
    finish(process)
    other = place.run(place.argv("launch", "shared", "--resume", "auto", sets=ONE), "shared")
    assert other.code == 2 and "no checkpoint to resume from, and its steps are of another" in other.err
    assert (run_dir / "config.yaml").read_text() == before
    (run_dir / "metrics.jsonl").unlink()
    again = place.run(place.argv("launch", "shared", "--resume", "auto", sets=ONE), "shared")
    assert again.code == 0 and not (run_dir / "launcher.lock").exists(), again.err


def test_a_submitted_job_goes_on_from_the_path(slurm: None, place: Place, saved: Run) -> None:
    origin = step(saved, 2)
    argv = place.argv("launch", "submitted", "--via", "slurm", "--resume", str(origin), sets=ONE)
    run = place.run(argv, "submitted")
    assert run.code == 0, run.err + run.out
    assert f"resumed at step 2 from {origin}" in run.lines
    assert [row["step"] for row in curve(run.run_dir)] == [3, 4, 5, 6]
    assert curve(run.run_dir) == curve(saved.run_dir)[2:]


def test_a_submitted_check_trains_nothing_and_leaves_nothing(slurm: None, place: Place) -> None:
    argv = place.argv("launch", "looked", "--via", "slurm", "--check", sets=ONE)
    run = place.run(argv, "looked")
    assert run.code == 0, run.err + run.out
    assert run.lines.count("check passed") == 1 and run.lines[-1] == "check passed"
    assert not list(place.folder.glob("looked*")) and "loss" not in run.out


def test_a_submitted_check_that_fails_leaves_its_logs(slurm: None, place: Place) -> None:
    sets = {**ONE, "launch.backend": "nccl"}
    run = place.run(place.argv("launch", "doubted", "--via", "slurm", "--check", sets=sets), "doubted")
    assert run.code in (1, 2), run.err + run.out
    [folder] = place.folder.glob("doubted*")
    assert run.lines[-1] == f"check failed (exit code {run.code}); logs in {folder}/logs"


def test_a_check_is_not_left_alone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(place.argv("launch", "alone", "--via", "slurm", "--check", "--detach", sets=ONE))
    assert left.value.code == 2 and "--check --detach: " in capsys.readouterr().err
