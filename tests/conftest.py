from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Rank processes for the parity cells, started at the first use."""
    processes = Pool()
    yield processes
    processes.close()
