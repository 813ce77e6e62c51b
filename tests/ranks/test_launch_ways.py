"""Launching for real: by whom ranks are started changes nothing, and what happens to them is said and survived."""

from __future__ import annotations

import json
import signal

import psutil
import pytest

from tests.patience import PATIENCE_S
from tests.ranks.runs import Place, Run, attempts, finish, ranks_below, rows, until_started_again, wait_until

TWO = {"parallel.pp": 2, "train.eval_batches": 0, "train.eval_every": 0, "train.global_batch": 4}
LONG = {**TWO, "train.steps": 1_000_000}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("ways"))


@pytest.fixture(scope="module")
def local(place: Place) -> Run:
    return place.run(place.argv("launch", "local", sets=TWO), "local")


def curve(run: Run) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in run.metrics()]


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
        ranks = ranks_below(process.pid)
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


def test_asked_to_stop_it_saves_leaves_with_75_and_goes_on(place: Place) -> None:
    """Of more steps than it can do; the rate of a step does not depend on how many there are."""
    flat = {**TWO, "optim.decay": "none"}
    asked = place.ask_to_stop(place.argv("launch", "asked", sets={**flat, "train.steps": 1_000_000}), "asked", steps=1)
    ended = json.loads((place.folder / "asked" / "exit.json").read_text())
    assert asked.code == ended["code"] == 75, asked.err
    assert "2 ranks to save and exit" in asked.err and "preempted: 2 ranks saved and exited" in asked.err
    whole = {**flat, "train.steps": ended["step"] + 3}
    again = place.run(place.argv("launch", "asked", "--resume", "auto", sets=whole), "asked")
    assert again.code == 0, again.err
    in_one_piece = place.run(place.argv("launch", "in_one_piece", sets=whole), "in_one_piece")
    assert in_one_piece.code == 0, in_one_piece.err
    assert curve(again) == curve(in_one_piece) and len(curve(again)) == ended["step"] + 3


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM)], ids=["Ctrl-C", "twice"])
def test_torchruns_ranks_are_ended_at_once(numbers: tuple[signal.Signals, ...], place: Place) -> None:
    """By Ctrl-C, and by a second signal while they are to save, which they cannot: one of them stands still."""
    name = f"ended-{len(numbers)}"
    process = place.start(place.argv("launch", name, "--via", "torchrun", sets=LONG))
    try:
        wait_until(lambda: len(rows(place.folder / name / "metrics.jsonl")) >= 1, process)
        below, ranks = psutil.Process(process.pid).children(recursive=True), ranks_below(process.pid)
        ranks[1].send_signal(signal.SIGSTOP)
        said = ""
        for number in numbers[:-1]:
            process.send_signal(number)
            while "2 ranks to save and exit" not in said:
                assert process.stderr is not None
                line = process.stderr.readline()
                assert line, said
                said += line
        process.send_signal(numbers[-1])
        _, error = finish(process)
    finally:
        process.kill()
    assert process.returncode == 128 + numbers[-1], said + error
    assert f"{numbers[-1].name} received: ending 2 ranks" in error
    gone, alive = psutil.wait_procs(below, timeout=PATIENCE_S)
    assert set(ranks.values()) < set(gone) and not alive, [p.cmdline() for p in alive]


@pytest.mark.parametrize("via", ["local", "torchrun", pytest.param("mpi", marks=pytest.mark.all_cells)])
def test_started_again_from_the_newest_checkpoint(via: str, place: Place) -> None:
    """Nobody has said --resume; every step is there once, and is what it would have been."""
    name, flat = f"again_{via}", {**TWO, "optim.decay": "none"}
    sets = {**flat, "train.steps": 1_000_000, "checkpoint.every": 1, "launch.max_restarts": 1}
    process = place.start(place.argv("launch", name, "--via", via, sets=sets))
    run_dir = place.folder / name
    try:
        wait_until(lambda: any((run_dir / "checkpoints").glob("step_*")), process)
        ranks_below(process.pid)[1].send_signal(signal.SIGKILL)
        until_started_again(run_dir, process)
        process.send_signal(signal.SIGTERM)
        _, error = finish(process)
    finally:
        process.kill()
    assert process.returncode == 75, error
    assert "restart 1 of 1, from step_" in error
    assert via != "local" or "died: killed by SIGKILL" in error
    assert attempts(run_dir / "events.rank0.jsonl") == [0, 1] and not (run_dir / "launcher.lock").exists()
    steps = json.loads((run_dir / "exit.json").read_text())["step"]
    whole = place.run(place.argv("launch", f"whole_{via}", sets={**flat, "train.steps": steps}), f"whole_{via}")
    assert whole.code == 0, whole.err
    assert len(curve(whole)) == steps and curve(Run(0, "", error, run_dir)) == curve(whole)


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
        below, ranks = psutil.Process(process.pid).children(recursive=True), ranks_below(process.pid)
    finally:
        process.kill()
    finish(process)
    assert sorted(ranks) == [0, 1]
    gone, alive = psutil.wait_procs(below, timeout=PATIENCE_S)
    assert not alive, [p.cmdline() for p in alive]
