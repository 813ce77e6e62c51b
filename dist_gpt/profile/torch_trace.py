"""Trace of torch.profiler over the profiling window, written next to the events and aligned with their clock.

Every training step and every entry of the step list is an annotation in the trace, so operators and kernels are
attributed by what encloses them; the steps' starts on our clock align the two time lines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function


class TorchTrace:
    """Trace that starts at the window's first step and is exported after its last."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.anchors: list[tuple[int, int]] = []
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._profile = profile(activities=activities)

    def start(self) -> None:
        """Start the profiler."""
        self._profile.start()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Annotate the context as training step `number`, and keep its start on our clock."""
        with record_function(f"dist_gpt step {number}"):
            self.anchors.append((number, time.perf_counter_ns()))
            yield

    def stop(self) -> None:
        """Stop the profiler and export its trace to `path`."""
        self._profile.stop()
        self._profile.export_chrome_trace(str(self.path))

    def fact(self, base_ns: int) -> dict[str, Any]:
        """Return the row of the events file; times are in ns since `base_ns`."""
        return {"file": self.path.name, "anchors": [[step, start - base_ns] for step, start in self.anchors]}
