"""Launching inside a Slurm allocation: where the watch listens, what is ended, what goes back to the queue."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import load
from launch import backends
from launch.backends import Allocation
from launch.run import load_for_launch
from launch.spec import JobSpec, train_argv
from launch.starter import NotStartedError
from launch.starters import mpi, slurm
from launch.starters.command import CommandRanks

FIRST, LOGIN = "10.0.0.1", "10.0.9.9"
USR1, TERM, INT = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT


def allocation(via: str = "srun", hosts: tuple[str, ...] = ("node1", "node2"), requeue: bool = True) -> Allocation:
    return Allocation(via, "7", hosts, None, requeue, f"Slurm job 7, by {via}")


def spec(folder: Path, nodes: int = 2) -> JobSpec:
    return JobSpec(train_argv(folder / "config.yaml"), 4 * nodes, folder / "logs", nodes, name="gpt", saves=True)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(starter, watch's host, on_code) of what would be supervised; node1 is FIRST, and this machine is on_node's."""
    found: list[Any] = []

    def supervise(spec: JobSpec, starter: CommandRanks, host: str, on_code: Callable[..., int]) -> int:
        found.append((starter, host, on_code))
        return 0

    monkeypatch.setattr(backends, "supervise", supervise)
    monkeypatch.setattr(backends, "port_on", lambda host, seed: 23456)
    monkeypatch.setattr(slurm, "address_of", lambda host, interface: {"node1": FIRST}[host])
    monkeypatch.setattr(backends, "address_towards", lambda target: {FIRST: LOGIN}[target.rpartition(":")[0]])
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
    monkeypatch.setattr(backends, "address_towards", lambda target: "")
    with pytest.raises(ConfigError, match=r"no route from login1\S* to node1 \(10\.0\.0\.1\)"):
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
    monkeypatch.setattr(slurm, "requeue", lambda job: asked.append(job) or "")
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)  # of an earlier life
    for requeue in (True, False):
        job = allocation(requeue=requeue)
        job.run(spec(tmp_path))
        if saved:
            (tmp_path / "checkpoints" / f"step_000000{20 + requeue}").mkdir()
        assert started[-1][2](code, stops) == code
        assert asked == (["7"] if goes_back and requeue else []), requeue
        asked.clear()
    said = capsys.readouterr().err
    assert ("job 7 is back in the queue" in said) == goes_back
    assert ("continue with: dist-gpt launch " in said) == (code not in (0, 2)), "not requeued in the second round"


@pytest.mark.parametrize(("code", "saved", "goes_back"), [(75, 11, False), (75, 12, True), (138, 11, True)])
def test_a_life_too_short_for_its_own_start_does_not_go_back(
    code: int, saved: int, goes_back: bool, started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Warned at once, it saves after its first step: the next life would do the same."""
    on_node("node1", monkeypatch)
    asked: list[str] = []
    monkeypatch.setattr(slurm, "requeue", lambda job: asked.append(job) or "")
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    allocation().run(spec(tmp_path))
    (tmp_path / "checkpoints" / f"step_{saved:08d}").mkdir()
    assert started[-1][2](code, [USR1]) == code and asked == ["7"] * goes_back
    said = capsys.readouterr().err
    told = "job 7 is not requeued: between its start and Slurm's warning it saved 1 step of"
    assert (told in said) != goes_back and ("saved: step_00000011; continue with: " in said) != goes_back


def test_steps_of_a_first_life_count_from_where_it_branches(tmp_path: Path) -> None:
    assert backends.newest_step(tmp_path) == -1
    (tmp_path / "resume_from").write_text(f"{tmp_path / 'other'}\n")
    (tmp_path / "other" / "checkpoints" / "step_00000040").mkdir(parents=True)
    assert backends.newest_step(tmp_path) == 40
    (tmp_path / "checkpoints" / "step_00000041").mkdir(parents=True)
    assert backends.newest_step(tmp_path) == 41


@pytest.mark.parametrize(("via", "starter", "modules", "missing"), [
    ("mpi", "srun", [], True), ("slurm", "mpi", [], True), ("slurm", "srun", [], False),
    ("slurm", "mpi", ["mpi4py"], False),  # it may come with the module, into the job alone
])  # fmt: skip
def test_mpi4py_is_asked_for_before_anything_starts(
    via: str, starter: str, modules: list[str], missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(mpi.importlib.util, "find_spec", lambda name: None)
    config = load("demo", [f"launch.slurm.starter={starter}", f"launch.modules={modules}"])
    if not missing:
        backends.way_of(via, config)
        return
    with pytest.raises(ConfigError, match=r"needs mpi4py, .* pip install 'dist-gpt\[mpi\]'"):
        backends.way_of(via, config)


@pytest.mark.parametrize(("sets", "nodes"), [
    ([], 2), (["launch.nodes=1"], 1), (["parallel.dp=1", "parallel.tp=1", "launch.ranks_per_node=1"], 1),
    (["parallel.dp=2", "parallel.tp=1"], 2), (["launch.ranks_per_node=2"], 2),
])  # fmt: skip
def test_the_whole_allocation_is_used_where_nobody_says_how_much(
    sets: list[str], nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    base = ["parallel.dp=auto", "parallel.pp=1", "parallel.tp=2", "train.global_batch=8"]
    config, _ = load_for_launch("demo", [*base, *sets], "slurm")
    assert config.launch.nodes == nodes
    assert load_for_launch("demo", [*base, *sets], "local")[0].launch.nodes == 1


def test_an_allocation_that_the_ranks_do_not_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    sets = ["parallel.dp=4", "parallel.pp=1", "parallel.tp=1", "train.global_batch=8"]
    with pytest.raises(ConfigError, match=r"your allocation has 3 nodes \(n1, n2, n3\), and 4 ranks .*--nodes 1 or 2"):
        load_for_launch("demo", sets, "slurm")


def test_what_could_not_be_started_says_so(started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run directory goes then."""
    on_node("login1", monkeypatch)
    monkeypatch.setattr(backends, "address_towards", lambda target: "")
    with pytest.raises(NotStartedError):
        allocation().run(spec(tmp_path))


def test_launches_of_one_name_on_one_machine_look_for_different_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until rank 0 listens nobody holds the port: the same first choice would be taken twice."""
    seeds: list[str] = []

    def port_on(host: str, seed: str) -> int:
        seeds.append(seed)
        return 23456

    monkeypatch.setattr(backends, "port_on", port_on)
    monkeypatch.setattr(backends, "supervise", lambda *_: 0)
    for folder in ("first", "second"):
        assert backends.OneHost("torchrun").run(spec(tmp_path / folder, nodes=1)) == 0
    assert len(set(seeds)) == 2
