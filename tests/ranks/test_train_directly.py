"""Test `train` without our launcher: the numbers do not depend on the starter, and a refused start leaves nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.preloaded import Started
from tests.ranks.runs import Place, Run, environment, finish, rows, tree, wait_until
from tests.unit.test_mpi import MPIRUNS

TWO = {"parallel.pp": 2, "train.steps": 3, "train.eval_batches": 0, "train.eval_every": 0}
LONG = {**TWO, "train.steps": 1_000_000, "optim.decay": "none"}
SOON = {**TWO, "launch.timeout_s": 2}
WITHOUT_MPI4PY = "import sys; sys.modules['mpi4py'] = None; from dist_gpt.cli import main; main()"
HAND = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
needs_mpirun = pytest.mark.skipif(not MPIRUNS, reason="there is no mpirun")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("directly"))


@pytest.fixture(scope="module")
def local(place: Place) -> Run:
    run = place.run(place.argv("launch", "local", sets=TWO), "local")
    assert run.code == 0, run.err
    return run


@pytest.fixture
def port() -> Iterator[str]:
    """Return a free port, on which rank 0 may listen."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        yield str(server.getsockname()[1])


def curve(run: Run) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in run.metrics()]


def start(place: Place, argv: list[str], **more: str) -> Started:
    """Start `dist-gpt ARGV` with the given variables."""
    return Started("dist_gpt", argv, place.folder, {**environment(), **more})


def by_hand(place: Place, argv: list[str], ranks: int, port: str) -> list[Started]:
    """Start `dist-gpt ARGV` as each of `ranks`."""
    hand = {**HAND, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": port}
    started = [start(place, argv, **{**hand, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]
    for process in started:
        process.read_along()
    return started


def executed(place: Place, argv: list[str], **more: str) -> subprocess.Popen[str]:
    """Execute the same."""
    words = [sys.executable, "-m", "dist_gpt", *argv]
    return subprocess.Popen(words, cwd=place.folder, env={**environment(), **more}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def by_mpirun(
    mpirun: str, ranks: int, place: Place, argv: list[str], how: tuple[str, ...] = ("-m", "dist_gpt")
) -> subprocess.Popen[str]:
    """Start `mpirun python -m dist_gpt ARGV`."""
    words = [mpirun, "--allow-run-as-root", "--oversubscribe", "-np", str(ranks), sys.executable, *how, *argv]
    return subprocess.Popen(words, cwd=place.folder, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)  # fmt: skip


def ended(process: Started | subprocess.Popen[str], place: Place, run_dir: str) -> Run:
    out, err = finish(process)
    return Run(process.wait(), out, err, place.folder / run_dir)


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")
@pytest.mark.parametrize(
    "mpirun", [pytest.param(each, marks=[pytest.mark.all_cells] if more else []) for more, each in enumerate(MPIRUNS)]
)
def test_mpirun_trains_once_and_the_same(mpirun: str, place: Place, local: Run) -> None:
    run_dir = f"mpi{MPIRUNS.index(mpirun)}"
    argv = place.argv("train", run_dir, "--json", sets=TWO)
    run = ended(by_mpirun(mpirun, 2, place, argv), place, run_dir)
    assert run.code == 0, run.err
    assert curve(run) == curve(local) and len(curve(run)) == 3
    assert json.loads(run.out) == {"run_dir": str(run.run_dir), "exit_code": 0}
    assert run.err.count("accounting: exact") == run.err.count("verdict: ") == 1
    assert run.err.count("step 3/3") == 1 and "\x1b" not in run.err, "no bar: mpirun's terminal is not the user's"
    assert len(list(run.run_dir.glob("events.rank*.jsonl"))) == 2
    assert not (run.run_dir / "launcher.lock").exists()


@needs_mpirun
def test_without_mpi4py_on_one_node(place: Place, local: Run) -> None:
    argv = place.argv("train", "derived", sets=TWO)
    run = ended(by_mpirun(MPIRUNS[0], 2, place, argv, ("-c", WITHOUT_MPI4PY)), place, "derived")
    assert run.code == 0, run.err
    assert curve(run) == curve(local)


def test_torchrun_finds_the_same(place: Place, local: Run) -> None:
    run = place.torchrun(place.argv("train", "torchrun", sets=TWO), "torchrun", ranks=2)
    assert run.code == 0, run.err
    assert curve(run) == curve(local)
    assert not (run.run_dir / "launcher.lock").exists()


def test_by_hand_in_two_terminals(port: str, place: Place, local: Run) -> None:
    ranks = by_hand(place, place.argv("train", "hand", sets=TWO), 2, port)
    runs = [ended(rank, place, "hand") for rank in ranks]
    assert [run.code for run in runs] == [0, 0], runs[0].err + runs[1].err
    assert curve(runs[0]) == curve(local)


@pytest.mark.parametrize(("ranks", "sets", "told", "way"), [
    pytest.param(2, {"parallel.pp": 1, "parallel.dp": 1}, "is not parallel.dp 1 x", "mpirun", marks=needs_mpirun),
    (2, {"parallel.pp": 1, "parallel.dp": 1}, "world 2 is not parallel.dp 1 x", "hand"),
    (3, {"parallel.pp": 2}, "world 3 is not a positive multiple of", "hand"),
    (3, {"parallel.pp": 1}, "train.global_batch 8 is not divisible by parallel.dp 3", "hand"),
])  # fmt: skip
def test_a_world_that_does_not_fit(
    ranks: int, sets: dict[str, object], told: str, way: str, port: str, place: Place
) -> None:
    argv = place.argv("train", "misfit", sets={**TWO, **sets, "data.cache": place.folder / "untouched"})
    if way == "mpirun":
        started: list[Any] = [by_mpirun(MPIRUNS[0], ranks, place, argv)]
    else:
        started = by_hand(place, argv, ranks, port)
    runs = [ended(process, place, "misfit") for process in started]
    said = "".join(run.err for run in runs)
    assert {run.code for run in runs} == {2} and told in said and "Traceback" not in said
    assert not runs[0].run_dir.exists() and not (place.folder / "untouched").exists()


STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "gone", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
}  # fmt: skip
LEFT_OVER = [
    ({"RANK": "0"}, "WORLD_SIZE is not set"),
    ({"WORLD_SIZE": "2"}, "RANK is not set"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "set DIST_GPT_MASTER=HOST:PORT (or MASTER_ADDR and MASTER_PORT)"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_PORT": "29500", **HAND}, "rank 2 of 2"),
    ({"RANK": "-1", "WORLD_SIZE": "2", "MASTER_PORT": "29500", **HAND}, "RANK='-1'"),
    ({"RANK": "0", "WORLD_SIZE": "two", "MASTER_PORT": "29500", **HAND}, "WORLD_SIZE='two'"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "0", **HAND}, "MASTER_PORT=0"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "rank 0 of 0"),
    ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is not set"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500", **HAND, "LOCAL_RANK": "2"}, "local rank 2 of 2"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "LOCAL_RANK and LOCAL_"),
    ({"PMIX_RANK": "1"}, "PMIX_RANK=1 says that another program"),
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID is not set"),
    ({f"OMPI_COMM_WORLD_{name}": str(value) for name, value in
      (("RANK", 0), ("SIZE", 2), ("LOCAL_RANK", 0), ("LOCAL_SIZE", 2))}, "the mpirun that set them is gone"),
    ({**STEP, "SLURM_PROCID": "x"}, "SLURM_PROCID='x'"),
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "3"}, "does not fit SLURM_STEP_NUM_TASKS=2"),
    # The peers never come.
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "PORT", **HAND}, "1 of 2 ranks did not appear in time: 1"),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "PORT", **HAND, "LOCAL_RANK": "1"}, "rank 1: no store at 127."),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500", **HAND, "LOCAL_RANK": "1",
      "MASTER_ADDR": "no-such-host.invalid"}, "no store at no-such-host.invalid:29500"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500", **HAND, "MASTER_ADDR": "192.0.2.7"}, "cannot listen on"),
    (STEP, "1 of 2 ranks did not appear in time: 1"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "told"), LEFT_OVER, ids=[told for _, told in LEFT_OVER])
def test_variables_of_an_earlier_job(variables: dict[str, str], told: str, port: str, place: Place) -> None:
    """Expect one line and code 2; neither the run directory nor the data is made."""
    variables = {name: port if value == "PORT" else value for name, value in variables.items()}
    (place.folder / "alone").mkdir(exist_ok=True)
    before = tree(place.folder)
    sets = {**SOON, "data.cache": place.folder / "untouched"}
    argv = place.argv("train", "alone/run", sets=sets)
    begin = executed if told == LEFT_OVER[0][1] else start  # once with the noise of imports, if there is any
    run = ended(begin(place, argv, **variables), place, "alone/run")
    assert run.code == 2 and told in run.err, run.err
    assert len(run.err.splitlines()) == 1 and run.err.startswith("dist-gpt: ") and run.out == ""
    assert tree(place.folder) == before


@pytest.mark.parametrize("options", [(), ("--resume", "auto")], ids=["new", "resume"])
def test_two_trainings_that_start_together_are_one(options: tuple[str, ...], place: Place) -> None:
    """This happens if a starter is not recognised or ssh is called in a loop: each process is a world of its own."""
    name = f"together{len(options)}"
    sets = {**TWO, "parallel.pp": 1, "train.steps": 40}
    both = [start(place, place.argv("train", name, *options, sets=sets)) for _ in range(2)]
    runs = [ended(process, place, name) for process in both]
    assert sorted(run.code for run in runs) == [0, 2], runs[0].err + runs[1].err
    refused = next(run for run in runs if run.code == 2)
    whys = "in use by another training", "already exists", "its training is finished"  # the last: one came late
    assert any(why in refused.err for why in whys), refused.err
    assert [row["step"] for row in rows(place.folder / name / "metrics.jsonl")] == list(range(1, 41))
    assert json.loads((place.folder / name / "exit.json").read_text())["code"] == 0


@needs_mpirun
def test_asked_by_mpirun_it_saves_and_is_continued(place: Place) -> None:
    """Meanwhile a second training in its folder is refused and changes nothing."""
    argv = place.argv("train", "asked", "--resume", "auto", sets=LONG)
    run_dir = place.folder / "asked"
    process = by_mpirun(MPIRUNS[0], 2, place, argv)
    try:
        wait_until(lambda: len(rows(run_dir / "metrics.jsonl")) >= 1, process)
        before = (run_dir / "config.yaml").read_bytes()
        for verb in ("train", "launch"):
            other = place.argv(verb, "asked", "--resume", "auto", sets={**LONG, "parallel.pp": 1, "log.every": 7})
            second = ended(start(place, other), place, "asked")
            assert second.code == 2 and "in use by another training run, process " in second.err, second.err
        assert (run_dir / "config.yaml").read_bytes() == before and not (run_dir / "exit.json").exists()
        process.send_signal(signal.SIGUSR1)
        _, error = finish(process)
    finally:
        process.kill()
    assert process.returncode == 75, error
    left = json.loads((run_dir / "exit.json").read_text())
    assert left["code"] == 75 and not (run_dir / "launcher.lock").exists()
    sets = {**LONG, "train.steps": left["step"] + 2}
    again = place.run(place.argv("launch", "asked", "--resume", "auto", sets=sets), "asked")
    assert again.code == 0, again.err
    assert [row["step"] for row in again.metrics()] == list(range(1, left["step"] + 3))
    shutil.rmtree(Path(run_dir))
