"""Clocks, power and temperature of a GPU, sampled on a thread while the window is open; none on a CPU."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

import torch

PERIOD_S = 0.5
MAX_SAMPLES = 2_000


class DeviceSampler:
    """Sampler of NVML every PERIOD_S seconds from `start` to `stop`; `samples` are (CLOCK_MONOTONIC ns, reading)."""

    def __init__(self, device: torch.device) -> None:
        self.samples: list[tuple[int, dict[str, float]]] = []
        self._handle = _handle(device)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the sampling thread, once, if NVML knows the device."""
        if self._handle is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="device sampler", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the sampling; wait for its thread for at most 2 x PERIOD_S."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * PERIOD_S)

    def _run(self) -> None:
        with suppress(Exception):  # a reading the driver refuses ends the sampling, not the run
            while len(self.samples) < MAX_SAMPLES and not self._stop.wait(PERIOD_S):
                self.samples.append((time.perf_counter_ns(), _read(self._handle)))


def _handle(device: torch.device) -> Any:
    """Return NVML's handle of the device, by its UUID (CUDA_VISIBLE_DEVICES renumbers); None if NVML has none."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # no driver, no NVML (AMD), not permitted: the run continues without samples
        return None


def _read(handle: Any) -> dict[str, float]:
    import pynvml

    return {
        "sm_clock_hz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) * 1e6,
        "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "temperature_c": float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
    }
