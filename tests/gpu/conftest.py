"""Tests in this folder need a GPU; without one they are skipped. They use no pytest: `benchmarks.gpu_check` calls them
on machines that have none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none here"))
