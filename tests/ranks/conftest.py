"""Runs shared between tests: starting torch is what costs time."""

from __future__ import annotations

import pytest

from tests.ranks.runs import Killed, Place, Run


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="session")
def eight(place: Place) -> Run:
    """`launch` on dp 2 x tp 2 x pp 2, everything on."""
    split = {"parallel.dp": 2, "parallel.tp": 2, "parallel.pp": 2, "parallel.sequence_parallel": "true"}
    return place.run(place.argv("launch", "eight", sets=split), "eight")


@pytest.fixture(scope="session")
def alone(place: Place) -> Run:
    """`launch --json` on one process, with Weights & Biases offline."""
    return place.run(place.argv("launch", "alone", "--json", sets={"log.wandb.mode": "offline"}), "alone")


@pytest.fixture(scope="session")
def by_torchrun(place: Place) -> Run:
    """`torchrun --nproc-per-node 2 -m dist_gpt train` on dp 2 without sharding, kept to no processors."""
    sets = {"parallel.dp": "auto", "optim.sharding": "none", "launch.bind": "off"}
    return place.torchrun(place.argv("train", "by_torchrun", sets=sets), "by_torchrun", ranks=2)


@pytest.fixture(scope="session")
def killed(place: Place) -> Killed:
    """`launch` on pp 2; rank 1 is killed in the middle."""
    return place.kill_one_of_two("killed", victim=1)
