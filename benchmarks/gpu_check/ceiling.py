"""Measure the peak performance of the device: matmuls of several sizes and dtypes, and a large copy."""

from __future__ import annotations

import torch

from benchmarks.gpu_check.section import Context

SIZES, SMALL_SIZES = (1024, 2048, 4096, 8192, 16384), (64, 128)
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
COPIED, SMALL_COPIED = 1 << 30, 1 << 20
RUN_S = 0.25
"""Seconds of one measurement; the fastest of three counts."""


def run(context: Context) -> None:
    """Measure matmuls, small sizes first, and then the copy."""
    found: dict[str, dict[str, float]] = {name: {} for name in DTYPES}
    for size in SMALL_SIZES if context.small else SIZES:
        for name in DTYPES:
            if context.left_s() > 5:
                found[name][str(size)] = matmul_tflops(context, name, size)
        context.put("tflops", found)
    context.put("best_tflops", {name: max(sizes.values(), default=0.0) for name, sizes in found.items()})
    context.put("copy_gb_per_s", copy_speed(context))


def matmul_tflops(context: Context, name: str, size: int) -> float:
    """Return the TFLOP/s of (size, size) matmuls in the precision `name`."""
    device, before = context.device, torch.get_float32_matmul_precision()
    a = torch.randn(size, size, device=device.torch_device).to(DTYPES[name])
    b, out = torch.randn_like(a), torch.empty_like(a)
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        seconds = fastest(context, lambda: torch.mm(a, b, out=out))
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / seconds / 1e12


def copy_speed(context: Context) -> float:
    """Return the GB/s of a copy on the device, counting bytes read and bytes written."""
    nbytes = SMALL_COPIED if context.small else COPIED
    source = torch.ones(nbytes, dtype=torch.uint8, device=context.device.torch_device)
    target = torch.empty_like(source)
    return 2 * nbytes / fastest(context, lambda: target.copy_(source)) / 1e9


def fastest(context: Context, work: object) -> float:
    """Return the seconds per call of `work`, issued back to back: the best of three measurements."""
    assert callable(work)
    run_s = 0.01 if context.small else RUN_S
    context.device.seconds(work, 2)
    once = max(context.device.seconds(work, 2), 1e-7)
    times = max(3, min(2000, int(run_s / once)))
    return min(context.device.seconds(work, times) for _ in range(3))
