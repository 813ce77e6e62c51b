from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.ranks.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Rank processes for the parity cells, started at the first use."""
    from tests.ranks.pool import Pool

    processes = Pool()
    yield processes
    processes.close()


SHARED = {"pool": "pool", "eight": "runs", "alone": "runs", "by_torchrun": "runs", "killed": "runs"}
"""Fixtures of the session that are costly to start -> the group of tests that stays on one worker of pytest-xdist."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share something costly on one worker: a session's rank processes and runs, else a file."""
    for item in items:
        names = getattr(item, "fixturenames", ())
        group = next((SHARED[name] for name in names if name in SHARED), item.nodeid.split("::")[0])
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line over all certificates taken: how many, and the worst of each measure with its cell."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])]
    rows = [value for r in reports for key, value in r.user_properties if key == "parity" and r.when == "call"]
    if not rows:
        return
    worst = {m: max(rows, key=lambda row, m=m: row[m]) for m in rows[0] if m != "cell"}  # type: ignore[misc]
    text = ", ".join(f"worst {m.replace('_', ' ')} {row[m]:.1e}" for m, row in worst.items())
    terminalreporter.write_line(f"parity: {len(rows)} cells, {text}")
