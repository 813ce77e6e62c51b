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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line over all certificates taken: how many, and the worst of each measure with its cell."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])]
    rows = [value for r in reports for key, value in r.user_properties if key == "parity" and r.when == "call"]
    if not rows:
        return
    worst = {m: max(rows, key=lambda row, m=m: row[m]) for m in rows[0] if m != "cell"}  # type: ignore[misc]
    text = ", ".join(f"worst {m.replace('_', ' ')} {row[m]:.1e}" for m, row in worst.items())
    terminalreporter.write_line(f"parity: {len(rows)} cells, {text}")
