from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.virtual import VirtualCluster, missing

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(240))


class Holder:
    """The session's cluster: started when first asked for, and again when a test has stopped it."""

    def __init__(self) -> None:
        self.cluster: VirtualCluster | None = None

    def get(self) -> VirtualCluster:
        if self.cluster is None or self.cluster.stopped:
            self.cluster = VirtualCluster(nodes=2, cpus=8)
        return self.cluster


@pytest.fixture(scope="session")
def holder() -> Iterator[Holder]:
    if reason := missing():
        pytest.skip(reason)  # of a missing package it is a failure in CI: .ci/run looks for it
    found = Holder()
    yield found
    if found.cluster is not None:
        found.cluster.stop()


@pytest.fixture
def cluster(holder: Holder) -> Iterator[VirtualCluster]:
    """The session's cluster, as fresh as a started one."""
    found = holder.get()
    yield found
    if not found.stopped:
        found.reset()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """What the queue and the daemons said, below a failure."""
    report = yield
    found = item.funcargs.get("cluster") if hasattr(item, "funcargs") else None
    if report.failed and found is not None and not found.stopped:
        report.sections.append(("cluster", found.squeue("--states=all") + "\n" + found.log_tails()))
    return report
