"""2 nodes x 4 ranks, data x tensor x pipeline 2 x 2 x 2: whoever starts them, the same numbers to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.jobs import Jobs, numbers
from tests.cluster.virtual import VirtualCluster
from tests.ranks.runs import STEPS


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
