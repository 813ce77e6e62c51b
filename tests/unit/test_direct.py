"""Test ranks of `train` without our launcher: their numbers, their meeting place and their run directory."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.rundir import Resume
from launch import lock
from launch.net import port_of
from launch.rank import direct
from launch.rank.direct import RunFolder, rank_of, recognise, speaks
from tests.unit.test_discover import DAEMON, FLUX, MASTER, MPICH, OPEN_MPI, STEP, TORCH, TORCHRUN

TWO = {  # rank 1 of 2, both on this node
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-n1-17@1",
}  # fmt: skip


def entered(environ: dict[str, str]) -> dict[str, str]:
    """Return the environment after a rank has entered."""
    changed = dict(environ)
    recognise(changed).enter(changed)
    return changed


class TestRecognise:
    @pytest.mark.parametrize("name", [
        "PMIX_RANK", "PMI_RANK", "PALS_RANKID", "ALPS_APP_PE", "MPI_LOCALRANKID", "FLUX_TASK_RANK",
        "JSM_NAMESPACE_RANK", "MV2_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK",
    ])  # fmt: skip
    @pytest.mark.parametrize("rank", ["0", "3"])
    def test_one_of_several_but_not_of_how_many(self, name: str, rank: str) -> None:
        with pytest.raises(ConfigError, match=f"^{name}={rank} says that another .* unset {name} to train in one"):
            recognise({name: rank})

    def test_alone(self) -> None:
        assert entered({"PATH": "/bin"}) == {"PATH": "/bin"}

    @pytest.mark.parametrize(("environ", "rank"), [
        (STEP | {"RANK": "0"}, 5), (OPEN_MPI | {"RANK": "0"}, 5), (MPICH, 5), (FLUX, 5), (TORCH, 5), ({}, 0),
        ({"RANK": "x"}, 0), (TORCHRUN | DAEMON, 5),
    ])  # fmt: skip
    def test_rank(self, environ: dict[str, str], rank: int) -> None:
        assert rank_of(environ) == rank

    def test_torchruns_variables_stay_as_they_are(self) -> None:
        for environ in (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"}, TORCH):
            assert entered(environ) == environ

    def test_a_step_gets_torchruns_variables(self) -> None:
        found = entered(STEP | {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "3"})
        assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "8", "1")
        assert found["MASTER_ADDR"] == "node1" and "TORCHELASTIC_RESTART_COUNT" not in found

    @pytest.mark.parametrize("name", direct.STALE)
    def test_what_an_earlier_start_left_is_not_taken_for_ours(self, name: str) -> None:
        assert entered(TORCH | {name: "1"}) == TORCH
        assert not direct.is_restart(TORCH | {name: "1"})

    def test_restarts_are_torchruns(self) -> None:
        assert direct.is_restart(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"})
        assert not direct.is_restart(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "0"})


class TestMeetingPlace:
    def test_without_mpi4py_all_ranks_of_a_node_derive_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(direct.importlib.util, "find_spec", lambda name: None)
        with socket.create_server(("127.0.0.1", 0)) as server:
            uri = {"PMIX_SERVER_URI41": f"{TWO['PMIX_NAMESPACE']}.0;tcp4://127.0.0.1:{server.getsockname()[1]}"}
            ranks = [
                entered(TWO | uri | {"OMPI_COMM_WORLD_RANK": r, "OMPI_COMM_WORLD_LOCAL_RANK": r}) for r in ("0", "1")
            ]
        assert [found["RANK"] for found in ranks] == ["0", "1"]
        for found in ranks:
            assert found["MASTER_ADDR"] == "127.0.0.1"
            assert found["MASTER_PORT"] == str(port_of("prterun-n1-17@1"))

    def test_without_mpi4py_several_nodes_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(direct, "_mpirun_is_there", lambda who, environ: True)
        monkeypatch.setitem(sys.modules, "mpi4py", None)
        with pytest.raises(ConfigError, match="needs mpi4py"):
            entered(OPEN_MPI)

    def test_flux_on_one_node(self) -> None:
        one = FLUX | {"FLUX_JOB_NNODES": "1", "FLUX_TASK_LOCAL_ID": "5", "FLUX_JOB_ID": "f7"}
        assert entered(one)["MASTER_PORT"] == str(port_of("f7"))
        with pytest.raises(ConfigError, match="DIST_GPT_MASTER=HOST:PORT"):
            entered(FLUX | {"FLUX_JOB_ID": "f7"})

    def test_a_given_place_is_taken(self) -> None:
        assert entered(TWO | MASTER)["MASTER_ADDR"] == "10.0.0.1"
        assert entered(FLUX | MASTER)["MASTER_PORT"] == "23456"

    @pytest.mark.parametrize("left", [
        TWO,  # nothing to reach it by
        TWO | {"PMIX_SERVER_URI41": "prterun-n1-17@0.0;tcp4://127.0.0.1:1"},
        TWO | {"PMIX_SERVER_URI41": "tcp4://nonsense", "PMIX_SERVER_URI4": "prterun-n1-17@0.0;tcp4://127.0.0.1:1"},
        MPICH | {"PMI_FD": "987"}, MPICH | {"PMI_FD": "x"}, MPICH | {"PMI_PORT": "127.0.0.1:1"},
        MPICH | {"PMI_PORT": "nonsense"},
    ])  # fmt: skip
    def test_an_mpirun_that_is_gone(self, left: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(direct, "meet", lambda environ: pytest.fail("MPI was started"))
        with pytest.raises(ConfigError, match="the mpirun that set them is gone; unset them"):
            entered(left)


class TestOneVoice:
    @pytest.mark.parametrize(("environ", "shared", "waits", "answer"), [
        (TORCH, True, False, True),  # a terminal of its own
        ({}, True, False, True),
        (TORCHRUN, True, True, True),
        (TORCHRUN | {"RANK": "0"}, True, False, True),
        (OPEN_MPI, True, True, True),
        (STEP, True, True, False),
        (STEP, False, True, True),
        (STEP | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0"}, True, True, True),
    ])  # fmt: skip
    def test_who_prints_an_error(
        self, environ: dict[str, str], shared: bool, waits: bool, answer: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slept: list[float] = []
        monkeypatch.setattr(direct.time, "sleep", slept.append)
        assert speaks(environ, shared) == answer
        assert slept == ([direct.SLURM_QUIET_S if environ.keys() >= STEP.keys() else direct.QUIET_S] if waits else [])

    @pytest.mark.parametrize(("environ", "code", "waits"), [
        (TWO | MASTER, 75, True), (TWO | MASTER, 0, False), (TORCHRUN, 75, False),
        (TWO | MASTER | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, 75, False),
    ])  # fmt: skip
    def test_mpirun_does_not_kill_rank_0_for_another_ranks_code(
        self, environ: dict[str, str], code: int, waits: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slept: list[float] = []
        monkeypatch.setattr(direct.time, "sleep", slept.append)
        recognise(environ).linger(code)
        assert slept == ([direct.LINGER_S] if waits else [])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load("demo", [f"run_dir={tmp_path / 'runs' / 'run'}"])


Made = Callable[..., RunFolder]


@pytest.fixture
def folder(config: Config) -> Any:
    """Return a function that makes the run folder of a start; its lock is held until the test ends."""
    with ExitStack() as held:

        def make(goes_on: bool = False, restarted: bool = False) -> RunFolder:
            return RunFolder(config, lambda again: Resume(goes_on or again), goes_on, restarted, held)

        yield make


class TestRunFolder:
    def test_made_filled_and_locked(self, folder: Made, config: Config) -> None:
        start, run_dir = folder(), Path(str(config.run_dir))
        start.check()
        assert not run_dir.parent.exists(), "looking makes nothing"
        start.make("text")
        assert {path.name for path in run_dir.iterdir()} == {"config.yaml", "plan.json", "logs", "launcher.lock"}
        with pytest.raises(ConfigError, match="in use by another training"):
            lock.look(run_dir)

    def test_of_two_that_looked_at_the_same_moment_one_wins(self, folder: Made, config: Config) -> None:
        for goes_on, told in ((False, "already exists"), (True, "in use by another training")):
            first, second = folder(), folder(goes_on)
            first.check()
            second.check()
            first.make("text")
            before = sorted(Path(str(config.run_dir)).rglob("*"))
            with pytest.raises(ConfigError, match=told):
                second.make("text")
            second.discard()
            assert sorted(Path(str(config.run_dir)).rglob("*")) == before
            first.discard()

    def test_two_that_continue_a_run_that_is_not_there_yet(self, folder: Made, config: Config) -> None:
        first, second = folder(goes_on=True), folder(goes_on=True)
        first.check()
        second.check()
        first.make("text")
        with pytest.raises(ConfigError, match="in use by another training"):
            second.check()
        with pytest.raises(ConfigError, match="in use by another training"):
            second.make("text")
        assert (Path(str(config.run_dir)) / "config.yaml").is_file()

    def test_discarded_leaves_nothing(self, folder: Made, config: Config) -> None:
        start, run_dir = folder(), Path(str(config.run_dir))
        start.check()
        start.make("text")
        start.discard()
        assert list(run_dir.parent.iterdir()) == []

    def test_what_was_there_before_stays(self, folder: Made, config: Config) -> None:
        run_dir = Path(str(config.run_dir))
        run_dir.mkdir(parents=True)
        (run_dir / "metrics.jsonl").write_text("")
        with pytest.raises(ConfigError, match="already exists"):
            folder().check()
        start = folder(goes_on=True)
        start.check()
        start.make("text")
        start.discard()
        assert (run_dir / "metrics.jsonl").is_file() and (run_dir / "config.yaml").is_file()

    def test_a_folder_that_cannot_be_filled_is_removed(
        self, folder: Made, config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*words: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(direct.run, "fill_run_dir", full)
        start = folder()
        start.check()
        with pytest.raises(OSError, match="No space left"):
            start.make("text")
        assert list(Path(str(config.run_dir)).parent.iterdir()) == []

    def test_a_restart_that_this_node_has_not_counted(self, folder: Made, config: Config) -> None:
        run_dir = Path(str(config.run_dir))
        run_dir.mkdir(parents=True)
        start = folder()
        with pytest.raises(ConfigError, match="already exists"):
            start.check()
        start.restart()
        start.check()
        start.make("text")
        assert (run_dir / "config.yaml").is_file()

    def test_a_restart_waits_for_the_lock_of_its_former_self(
        self, folder: Made, config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tries: list[int] = []

        def look(run_dir: Path) -> None:
            tries.append(1)
            if len(tries) < 4:
                raise ConfigError(["in use"])

        monkeypatch.setattr(direct.lock, "look", look)
        monkeypatch.setattr(direct.time, "sleep", lambda seconds: None)
        folder(goes_on=True, restarted=True).check()
        assert len(tries) == 4
        tries.clear()
        with pytest.raises(ConfigError, match="in use"):
            folder(goes_on=True).check()
        assert len(tries) == 1
