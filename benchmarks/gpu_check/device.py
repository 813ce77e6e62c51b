"""Give sections access to a device. Only `Cuda` touches torch.cuda; `StandIn` uses the CPU, for tests."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

ROOT = Path(__file__).resolve().parents[2]
WAITED = "called a synchronizing CUDA operation"
"""Text of torch's warning about a wait; torch also warns once that the feature is a prototype."""
Work = Callable[[], object]


class Device(Protocol):
    """A GPU or its stand-in."""

    torch_device: torch.device

    def facts(self) -> dict[str, Any]:
        """Return name, memory and the like."""

    def count(self) -> int:
        """Return the number of devices."""

    def synchronize(self) -> None:
        """Wait until all work is done."""

    def empty(self) -> None:
        """Release cached memory."""

    def reset_peak(self) -> int:
        """Measure the memory peak from now on; return the bytes in use."""

    def peak(self) -> int | None:
        """Return the largest number of bytes in use since then; None if it is not known."""

    def seconds(self, work: Work, times: int) -> float:
        """Return the seconds that each of `times` calls of `work` takes, issued back to back."""

    def waits(self, work: Work) -> dict[str, int]:
        """Do `work` and return how often the host waited for the device, by place in the code."""

    def total_memory(self) -> int | None:
        """Return the bytes of memory; None if it is not known."""


class StandIn:
    """The CPU in place of a GPU."""

    torch_device = torch.device("cpu")

    def facts(self) -> dict[str, Any]:
        """Return a name, and 0 as the number of GPUs."""
        return {"name": "cpu (stands in for a GPU)", "count": 0}

    def count(self) -> int:
        """Return 1, for the CPU."""
        return 1

    def synchronize(self) -> None:
        """Do nothing: the CPU never runs behind."""

    def empty(self) -> None:
        """Do nothing: there is no cached memory."""

    def reset_peak(self) -> int:
        """Return 0: the peak is not measured."""
        return 0

    def peak(self) -> int | None:
        """Return None: the peak is not measured."""
        return None

    def seconds(self, work: Work, times: int) -> float:
        """Return the seconds per call of `work` over `times` calls."""
        started = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - started) / times

    def waits(self, work: Work) -> dict[str, int]:
        """Do `work`, which never waits for a device, and return no places."""
        work()
        return {}

    def total_memory(self) -> int | None:
        """Return None: the limit of memory is not known."""
        return None


class Cuda:
    """GPU number `index`. `cuda` is torch.cuda by default; tests replace it."""

    def __init__(self, cuda: Any = None, index: int = 0) -> None:
        self.cuda = cuda if cuda is not None else torch.cuda
        self.torch_device = torch.device("cuda", index)

    def facts(self) -> dict[str, Any]:
        """Return name, number of GPUs, compute capability, memory in bytes and the like."""
        properties = self.cuda.get_device_properties(self.torch_device)
        free, total = self.cuda.mem_get_info(self.torch_device)
        return {
            "name": properties.name,
            "count": self.cuda.device_count(),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "memory_free_bytes": free,
            "memory_driver_bytes": total,
            "bf16": self.cuda.is_bf16_supported(),
            "mig_slice": "MIG" in properties.name,
        }

    def count(self) -> int:
        """Return the number of visible GPUs."""
        return int(self.cuda.device_count())

    def synchronize(self) -> None:
        """Wait until the GPU has done all work."""
        self.cuda.synchronize(self.torch_device)

    def empty(self) -> None:
        """Release the allocator's cached memory."""
        self.cuda.empty_cache()

    def reset_peak(self) -> int:
        """Reset the allocator's peak and return the bytes allocated now."""
        self.cuda.reset_peak_memory_stats(self.torch_device)
        return int(self.cuda.memory_allocated(self.torch_device))

    def peak(self) -> int | None:
        """Return the allocator's peak in bytes."""
        return int(self.cuda.max_memory_allocated(self.torch_device))

    def seconds(self, work: Work, times: int) -> float:
        """Return the seconds per call of `work` over `times` calls, by CUDA events."""
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / times

    def waits(self, work: Work) -> dict[str, int]:
        """Do `work` and count torch's warnings about waits of the host, by place in the code."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                self.cuda.set_sync_debug_mode("default")
        places: Counter[str] = Counter()
        for warning in caught:
            if WAITED in str(warning.message):
                path = Path(warning.filename)
                name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
                places[f"{name}:{warning.lineno}"] += 1
        return dict(places)

    def total_memory(self) -> int | None:
        """Return the bytes of the GPU's memory."""
        return int(self.cuda.get_device_properties(self.torch_device).total_memory)
