"""Test a launcher that is suspended alone (Ctrl-Z): its ranks save and exit, and it says why when it is continued."""

from __future__ import annotations

import signal
import socket
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from dist_gpt.comm.mesh import GlooBackends
from dist_gpt.comm.rendezvous import OUTLAST_S, RankEnv, RendezvousError, make_backends, rank_env
from dist_gpt.config.load import load
from dist_gpt.rundir import committed, ended, step_of
from dist_gpt.train import trainer
from tests.ranks.runs import Place, finish, ranks_below, rows, wait_until

SETS = {"parallel.pp": 2, "train.steps": 1_000_000, "train.eval_batches": 0, "train.eval_every": 0,
        "launch.silence_s": 6}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("suspended"))


def test_the_ranks_of_a_suspended_launcher_save_and_leave(place: Place) -> None:
    process, run_dir = place.start(place.argv("launch", "alone", sets=SETS)), place.folder / "alone"
    try:
        wait_until(lambda: len(rows(run_dir / "metrics.jsonl")) >= 2, process)
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: ended(run_dir), process)
        ranks = ranks_below(process.pid).values()
        wait_until(lambda: all(rank.status() == psutil.STATUS_ZOMBIE for rank in ranks), process)
        process.send_signal(signal.SIGCONT)
        out, error = finish(process)
    finally:
        process.kill()
    assert process.returncode == 75, error
    [newest] = committed(run_dir / "checkpoints")
    step = step_of(newest)
    assert f"s; the 2 ranks saved at step {step} and exited (exit code 75)\n" in error
    assert "the launcher was suspended for " in error and "continuing" not in error
    assert f"saved: {newest.name}; continue with: " in error and "accounting: exact" in out
    end = ended(run_dir)
    assert (end["code"], end["step"]) == (75, step) and "no contact with the launcher" in end["why"]
    more = {**SETS, "train.steps": step + 2}
    again = place.run(place.argv("launch", "alone", "--resume", "auto", sets=more), "alone")
    assert again.code == 0, again.err
    assert [row["step"] for row in rows(run_dir / "metrics.jsonl")] == [*range(1, step + 3)]


VARIABLES = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "1"}  # fmt: skip


@pytest.mark.parametrize("watched", [False, True])
def test_collectives_under_a_launcher_outlast_a_suspension(watched: bool) -> None:
    """Gloo's clock counts a suspension; the launcher's clock, which detects a job without progress, does not."""
    env = replace(rank_env(300.0, VARIABLES), watched=watched)
    made = make_backends(dist.HashStore(), env, torch.device("cpu"), 300.0)
    assert isinstance(made, GlooBackends) and made.timeout_s == 300.0 + (OUTLAST_S if watched else 0.0)


def test_only_a_rank_with_a_heartbeat_leaves_deadlines_to_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`launch --check` runs a program without one: a collective that hangs has to end by its own deadline."""
    assert not rank_env(300.0, {**VARIABLES, "DIST_GPT_WATCH_FD": "7"}).watched
    config = load("demo", [f"run_dir={tmp_path}", "parallel.dp=1", "parallel.tp=1"], world=2)
    seen: list[RankEnv] = []

    def connect(env: RankEnv) -> None:
        seen.append(env)
        raise RendezvousError("far enough")

    monkeypatch.setattr(trainer, "connect_store", connect)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DIST_GPT_WATCH_FD", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as launcher, socket.create_connection(launcher.getsockname()) as line:
        for number in (None, line.detach()):
            if number is not None:
                monkeypatch.setenv("DIST_GPT_WATCH_FD", str(number))
            with pytest.raises(RendezvousError, match="far enough"):
                trainer.main(config)
    assert [env.watched for env in seen] == [False, True]
