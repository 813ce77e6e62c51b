"""Launching inside a Slurm allocation: where the watch listens, what is ended, what goes back to the queue."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_gpt.config.errors import ConfigError
from launch import mpi, slurm, ways
from launch.command import CommandRanks
from launch.spec import JobSpec, train_argv
from launch.ways import Allocation

FIRST, LOGIN = "10.0.0.1", "10.0.9.9"
USR1, TERM, INT = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT


def allocation(via: str = "srun", hosts: tuple[str, ...] = ("node1", "node2"), requeue: bool = True) -> Allocation:
    return Allocation(via, "7", hosts, None, requeue, f"Slurm job 7, by {via}")


def spec(folder: Path, nodes: int = 2) -> JobSpec:
    return JobSpec(train_argv(folder / "config.yaml"), 4 * nodes, folder / "logs", nodes, name="gpt")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(starter, watch's host, on_code) of what would be supervised; node1 is FIRST, and this machine is on_node's."""
    found: list[Any] = []

    def supervise(spec: JobSpec, starter: CommandRanks, host: str, on_code: Callable[..., int]) -> int:
        found.append((starter, host, on_code))
        return 0

    monkeypatch.setattr(ways, "supervise", supervise)
    monkeypatch.setattr(ways, "port_on", lambda host, seed: 23456)
    monkeypatch.setattr(slurm, "address_of", lambda host, interface: {"node1": FIRST}[host])
    monkeypatch.setattr(ways, "address_towards", lambda target: {FIRST: LOGIN}[target.rpartition(":")[0]])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return found


def on_node(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    monkeypatch.setattr(slurm.socket, "gethostname", lambda: f"{name}.example.org")


@pytest.mark.parametrize(("here", "hosts", "watch", "master"), [
    ("node1", ("node1", "node2"), FIRST, f"{FIRST}:23456"),
    ("node1", ("node1",), "127.0.0.1", "127.0.0.1:23456"),
    ("login1", ("node1", "node2"), LOGIN, f"{FIRST}:{slurm.port_of('7')}"),
    ("login1", ("node1",), LOGIN, f"127.0.0.1:{slurm.port_of('7')}"),
    ("node2", ("node1", "node2"), LOGIN, f"{FIRST}:{slurm.port_of('7')}"),
])  # fmt: skip
def test_where_the_ranks_meet_and_where_they_are_watched_from(
    here: str, hosts: tuple[str, ...], watch: str, master: str, started: list[Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    on_node(here, monkeypatch)
    assert allocation(hosts=hosts).run(spec(tmp_path, len(hosts))) == 0
    [(starter, host, _)] = started
    assert (host, starter.env["DIST_GPT_MASTER"]) == (watch, master)
    assert f"--nodelist={','.join(hosts)}" in starter.argv and f"--nodes={len(hosts)}" in starter.argv


def test_the_nodes_own_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    on_node("x123", monkeypatch)
    assert not slurm.is_here("node1")
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    assert slurm.is_here("node1") and not slurm.is_here("node2")


def test_no_way_to_the_nodes(started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_node("login1", monkeypatch)
    monkeypatch.setattr(ways, "address_towards", lambda target: "")
    with pytest.raises(ConfigError, match=r"no route leads from login1\S* to node1 \(10\.0\.0\.1\)"):
        allocation().run(spec(tmp_path))


@pytest.mark.parametrize("via", ["srun", "torchrun"])
def test_a_launch_ends_its_own_steps(
    via: str, started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_node("node1", monkeypatch)
    ended: list[Any] = []
    monkeypatch.setattr(slurm, "end_steps", lambda job, ours: ended.append((job, ours)))
    names = []
    for _ in range(2):
        allocation(via).run(spec(tmp_path))
        starter = started[-1][0]
        names += [word.removeprefix("--job-name=") for word in starter.argv if word.startswith("--job-name=")]
        starter.end_elsewhere()
    assert len(set(names)) == 2, names
    for (job, ours), name in zip(ended, names, strict=True):
        assert job == "7"
        assert [one for one in (*names, "bash", "dist-gpt") if ours("7.0", one)] == [name]


def test_mpiruns_daemons_are_its_own_unless_they_were_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "steps", lambda job: {"7.0": "orted", "7.1": "bash"})
    ours = allocation("mpi")._ours("dist-gpt-1a")
    seen = {"7.0": "orted", "7.1": "bash", "7.2": "orted", "7.3": "prted", "7.4": "hydra_pmi_proxy", "7.5": "sleep"}
    assert [step for step, name in seen.items() if ours(step, name)] == ["7.2", "7.3", "7.4"]
    assert "bash" not in mpi.DAEMONS


@pytest.mark.parametrize(("code", "stops", "saved", "goes_back"), [
    (75, [USR1], True, True),
    (75, [USR1, TERM], True, True),
    (75, [TERM], True, False),  # Slurm requeues what it preempts by itself
    (1, [USR1], True, True),  # a rank failed after the warning: there is a newer checkpoint all the same
    (138, [USR1], True, True),  # a step longer than grace_s
    (1, [USR1], False, False),  # it would come to the same point again and again
    (1, [], True, False),
    (2, [USR1], True, False),
    (0, [USR1], True, False),
    (130, [USR1, INT], True, False),  # somebody wants it to end
    (130, [INT, USR1], True, False),
])  # fmt: skip
def test_what_goes_back_to_the_queue(
    code: int, stops: list[int], saved: bool, goes_back: bool, started: list[Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    on_node("node1", monkeypatch)
    asked: list[str] = []
    monkeypatch.setattr(slurm, "requeue", lambda job: asked.append(job) or "done")
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)  # of an earlier life
    for requeue in (True, False):
        job = allocation(requeue=requeue)
        job.run(spec(tmp_path))
        if saved:
            (tmp_path / "checkpoints" / f"step_000000{20 + requeue}").mkdir()
        assert started[-1][2](code, stops) == code
        assert asked == (["7"] if goes_back and requeue else []), requeue
        asked.clear()
    assert ("goes back to the queue: done" in capsys.readouterr().err) == goes_back
