"""Launching for real: by whom ranks are started changes nothing, and what happens to them is said and survived."""

from __future__ import annotations

import json
import signal
import subprocess

import psutil
import pytest

from tests.ranks.runs import Place, Run, finish, rows, wait_until

TWO = {"parallel.pp": 2, "train.eval_batches": 0, "train.eval_every": 0}
LONG = {**TWO, "train.steps": 1_000_000}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("ways"))


@pytest.fixture(scope="module")
def local(place: Place) -> Run:
    return place.run(place.argv("launch", "local", sets=TWO), "local")


def curve(run: Run) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in run.metrics()]


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    return {int(p.environ()["RANK"]): p for p in psutil.Process(process.pid).children()}


@pytest.mark.parametrize("via", ["torchrun", "mpi"])
def test_same_losses_to_the_last_bit(via: str, place: Place, local: Run) -> None:
    run = place.run(place.argv("launch", via, "--via", via, sets=TWO), via)
    assert run.code == 0, run.err
    assert len(curve(local)) == 6 and curve(run) == curve(local)
    assert run.lines[-1] == f"run_dir: {run.run_dir}" and "accounting: exact" in run.lines
    assert "rank 1/2" in (run.run_dir / "logs" / "rank1.log").read_text()


def test_a_stopped_rank_is_named_and_nothing_is_left(place: Place) -> None:
    process = place.start(place.argv("launch", "stopped", sets={**LONG, "launch.silence_s": 4}))
    try:
        wait_until(lambda: len(rows(place.folder / "stopped" / "metrics.jsonl")) >= 2, process)
        ranks = ranks_of(process)
        ranks[0].send_signal(signal.SIGSTOP)  # rank 0: no special part in finding it
        _, error = finish(process)
    finally:
        process.kill()
    assert process.returncode == 1
    first = error.splitlines()[0]
    assert first.startswith("rank 0 (pp 0, dp 0, cp 0, tp 0) on ") and "is stopped: no heartbeat for" in first
    assert "waited for by rank 1 in " in error
    ended = json.loads((place.folder / "stopped" / "exit.json").read_text())  # for who looks later, and the report
    assert (ended["code"], ended["why"]) == (1, first)
    assert not any(p.is_running() for p in ranks.values())


def test_asked_to_stop_it_saves_leaves_with_75_and_goes_on(place: Place, local: Run) -> None:
    slow = {**TWO, "train.steps": 6}
    process = place.start(place.argv("launch", "asked", sets=slow))
    try:
        wait_until(lambda: len(rows(place.folder / "asked" / "metrics.jsonl")) >= 1, process)
        process.send_signal(signal.SIGTERM)
        _, error = finish(process)
    finally:
        process.kill()
    assert (place.folder / "asked" / "exit.json").exists(), error
    ended = json.loads((place.folder / "asked" / "exit.json").read_text())
    if process.returncode != 0:  # it may have been through with its six steps
        assert process.returncode == 75 and ended["code"] == 75, error
        assert "asked to save and leave" in error and "preempted: 2 ranks saved and left" in error
    again = place.run(place.argv("launch", "asked", "--resume", "auto", sets=slow), "asked")
    assert again.code == 0, again.err
    assert curve(again) == curve(local)


def test_started_again_from_the_newest_checkpoint(place: Place, local: Run) -> None:
    sets = {**TWO, "checkpoint.every": 1, "launch.max_restarts": 1}
    process = place.start(place.argv("launch", "again", sets=sets))
    try:
        wait_until(lambda: any((place.folder / "again" / "checkpoints").glob("step_*")), process)
        ranks_of(process)[1].send_signal(signal.SIGKILL)
        out, error = finish(process)
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert "died: killed by SIGKILL" in error and "starting again, 1 of 1, from step_" in error
    assert curve(Run(0, out, error, place.folder / "again")) == curve(local)


def test_other_layout_is_refused_before_anything_is_changed(place: Place, local: Run) -> None:
    run = place.run(place.argv("launch", "saved", sets={**TWO, "checkpoint.every": 3}), "saved")
    assert run.code == 0, run.err
    before = (run.run_dir / "config.yaml").read_text()
    other = place.run(place.argv("launch", "saved", "--resume", "auto", sets={**TWO, "parallel.pp": 1}), "saved")
    assert other.code == 2 and "parallel.pp" in other.err
    assert (run.run_dir / "config.yaml").read_text() == before


def test_check_looks_and_leaves_nothing(place: Place) -> None:
    run = place.run(place.argv("launch", "checked", "--check", sets={"parallel.tp": 2}), "checked")
    assert run.code == 0, run.err
    assert run.lines[-1] == "check passed" and any("tp" in line and "all_reduce" in line for line in run.lines)
    assert not list(place.folder.glob("checked*"))


def test_a_killed_launcher_leaves_no_rank(place: Place) -> None:
    process = place.start(place.argv("launch", "orphans", "--via", "torchrun", sets=LONG))
    try:
        wait_until(lambda: len(rows(place.folder / "orphans" / "metrics.jsonl")) >= 1, process)
        below = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
    finish(process)
    assert len(below) >= 3
    gone, alive = psutil.wait_procs(below, timeout=20)
    assert not alive, [p.cmdline() for p in alive]
