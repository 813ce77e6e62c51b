from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.ranks.pool import Pool


with suppress(ImportError):  # on a GPU machine there may be pytest alone
    from hypothesis import HealthCheck, settings

    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")  # how long an example takes depends on how busy the machine is


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """Rank processes for the parity cells, started at the first use."""
    from tests.ranks.pool import Pool

    processes = Pool(dry_everywhere="not all_cells" not in request.config.option.markexpr)
    yield processes
    processes.close()


GROUPS = {
    "rank processes": ("test_parity", "test_plants", "test_one_process"),
    "whole runs": ("test_train", "test_rendezvous"),
}
"""Files that share something of the session that takes long to start: they stay in one process of pytest-xdist."""


LONGEST_FIRST = (
    *GROUPS["rank processes"], "test_launch_ways", "test_launch_resume", "test_train_directly", "test_resume",
    "test_report_truths", "test_restart", "test_report_page", "test_precision", "test_deepspeed",
    "test_pretended_device", "test_gpu_check", *GROUPS["whole runs"], "test_deepspeed_memory", "test_report_command",
    "test_supervise", "test_sharding_peers", "test_readme", "test_probe",
)  # fmt: skip
"""Files with which processes begin, so that none is left alone with a long one at the end."""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Keep pytest-xdist from beginning with the files that have the most tests."""
    node.config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a process whole files, and files that share something together.

    (`--dist loadgroup` would do, but pytest-xdist 3.8 finds no groups under pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    group_of = {file: name for name, files in GROUPS.items() for file in files}

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            return group_of.get(path.rsplit("/", 1)[-1].removesuffix(".py"), path)

    return ByFile(config, log)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through all that was imported, again and again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line over all certificates taken: how many, and the worst of each measure with its cell."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])]
    rows = [value for r in reports for key, value in r.user_properties if key == "parity" and r.when == "call"]
    if not rows:
        return
    worst = {m: max(rows, key=lambda row, m=m: row[m]) for m in rows[0] if m != "cell"}  # type: ignore[misc]
    text = ", ".join(f"worst {m.replace('_', ' ')} {row[m]:.1e}" for m, row in worst.items())
    terminalreporter.write_line(f"parity: {len(rows)} cells, {text}")
