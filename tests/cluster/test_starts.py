"""2 nodes x 4 ranks, data x tensor x pipeline 2 x 2 x 2: whoever starts them, the same numbers to the last bit."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cluster.jobs import PATIENCE_S, Jobs, numbers
from tests.cluster.virtual import VirtualCluster
from tests.ranks.runs import STEPS, tree

SRUN = "srun --ntasks-per-node=4"
MPIRUN = "mpirun --allow-run-as-root --oversubscribe -np 8 --map-by ppr:4:node"


@pytest.fixture
def jobs(cluster: VirtualCluster, tmp_path: Path) -> Jobs:
    return Jobs(cluster, tmp_path)


@pytest.fixture(scope="module")
def expected(holder, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:  # type: ignore[no-untyped-def]
    """What eight processes of one machine find."""
    found = numbers(Jobs(holder.get(), tmp_path_factory.mktemp("local")).local("local"))
    assert [row[0] for row in found if row[1] is not None][-1] == STEPS
    return found


@pytest.mark.parametrize("via", ["slurm", "torchrun", "mpi"])
def test_batch_script_trains(via: str, jobs: Jobs, expected: list[tuple]) -> None:
    assert numbers(jobs.train("run", via)) == expected, jobs.said("run")
    assert jobs.nothing_runs()
    hosts = [line for line in jobs.said("run").splitlines() if "node1" in line and "node2" in line]
    assert hosts, jobs.said("run")
    probed = jobs.said("run").partition("probe: 1 MiB along every axis")[2].splitlines()[2:7]
    assert [line.split()[0] for line in probed] == ["data", "embed", "tp", "pp", "pp"], jobs.said("run")


@pytest.mark.parametrize("starter", ["srun", "torchrun"])
def test_submitted_from_the_head(starter: str, jobs: Jobs, expected: list[tuple]) -> None:
    argv = jobs.argv("run", "slurm", sets={"launch.slurm.starter": starter})
    done = jobs.cluster.run(0, argv, timeout=200, cwd=jobs.folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert numbers(jobs.metrics("run")) == expected
    assert jobs.nothing_runs()


def by_hand(jobs: Jobs, run_dir: str, starter: str, sets: Mapping[str, object] | None = None) -> str:
    """Run `STARTER python -m dist_gpt train CONFIG` in a batch script, without our launcher; return its output."""
    pairs = {"run_dir": jobs.folder / run_dir, **(sets or {})}
    words = [word for key, value in pairs.items() for word in ("--set", f"{key}={value}")]
    train = shlex.join([sys.executable, "-m", "dist_gpt", "train", str(jobs.config), *words])
    job = jobs.cluster.sbatch("--nodes=2", "--ntasks-per-node=4", f"--output={jobs.out(run_dir)}", cwd=jobs.folder,
                              script=f"{starter} {train}\necho left with $?")  # fmt: skip
    jobs.cluster.wait_state(job, {"COMPLETED"}, PATIENCE_S)
    return jobs.said(run_dir)


@pytest.mark.parametrize("starter", [SRUN, MPIRUN], ids=["srun", "mpirun"])
def test_train_without_a_launcher(starter: str, jobs: Jobs, expected: list[tuple]) -> None:  # type: ignore[type-arg]
    if starter == MPIRUN and shutil.which("mpirun") is None:
        pytest.skip("no mpirun in PATH")
    said = by_hand(jobs, "run", starter)
    assert "left with 0" in said, said
    assert numbers(jobs.metrics("run")) == expected, said
    assert jobs.nothing_runs()
    assert said.count("accounting: exact") == said.count("verdict: ") == 1, said
    assert sorted(path.name for path in (jobs.folder / "run").glob("events.rank*.jsonl")) == [
        f"events.rank{rank}.jsonl" for rank in range(8)
    ]
    assert not (jobs.folder / "run" / "launcher.lock").exists()
    assert json.loads((jobs.folder / "run" / "exit.json").read_text())["code"] == 0


def test_a_world_that_does_not_fit_is_refused_by_srun(jobs: Jobs) -> None:
    """At most one message comes from each node, nothing is made, and the exit code is 2."""
    before = tree(jobs.folder)
    said = by_hand(jobs, "run", SRUN, sets={"parallel.dp": 1})
    assert "left with 2" in said and "world 8 is not parallel.dp 1 x " in said, said
    assert 1 <= said.count("dist-gpt: ") <= 2, said
    after = {name: at for name, at in tree(jobs.folder).items() if name != os.path.basename(jobs.out("run"))}
    assert after == before
