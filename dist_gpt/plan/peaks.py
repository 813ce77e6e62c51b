"""Published peak speeds of devices, the denominators of MFU and HFU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of dense matmuls, by dtype, and bytes/s of device memory."""

    name: str
    flops_per_s: dict[str, float]
    bytes_per_s: float
    source: str


_NVIDIA = "NVIDIA's data sheet, dense, without sparsity"
PEAKS = (
    Peak("H200", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12, "fp64": 67e12}, 4.8e12, _NVIDIA),
    Peak("H100", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12, "fp64": 67e12}, 3.35e12, _NVIDIA + ", SXM5"),
    Peak("A100", {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12, "fp64": 19.5e12}, 2.0e12, _NVIDIA),
    Peak("V100", {"fp16": 125e12, "fp32": 15.7e12, "fp64": 7.8e12}, 0.9e12, _NVIDIA),
    Peak("MI300X", {"bf16": 1300e12, "fp16": 1300e12}, 5.3e12, "AMD's data sheet, dense"),
    Peak("MI250X", {"bf16": 191.5e12, "fp16": 191.5e12}, 1.64e12, "AMD's data sheet, dense, one GCD"),
)


def published_peak(device: str) -> Peak | None:
    """Return the row whose name occurs in `device` (as torch names it); None for an unlisted device, such as a CPU."""
    return next((peak for peak in PEAKS if peak.name in device), None)
