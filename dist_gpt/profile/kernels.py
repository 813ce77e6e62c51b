"""Matmuls of a rank measured alone, and the peak rates of its device: the two sides of a roofline.

Each is the fastest of several runs, since a disturbance only makes a run longer. Matmuls run as in training
(`parallel.matmul`): on a CPU without 16-bit units in float32, whose speed is then the ceiling.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dist_gpt.config.schema import Config
from dist_gpt.parallel.buckets import TORCH_DTYPE
from dist_gpt.parallel.matmul import accumulate, in_float, product
from dist_gpt.plan.kernels import ATTENTION, Kernel, rank_kernels

BUDGET_S, TOTAL_S = 0.12, 3.0
"""Seconds for all runs of one matmul, and for all matmuls: the other ranks wait meanwhile."""
LEAST_RUNS = 4
LARGE = {"cpu": (512, 1024), "cuda": (4096,)}
"""Sides of the square matmuls behind the ceiling: the faster one counts."""
COPIED = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Bytes of the copy behind the bandwidth: far more than any cache."""


def kernel_facts(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """Return rows of the events file: `ceiling`, then a `kernel` for each matmul that fits into the time."""
    dtype, started = TORCH_DTYPE[config.train.dtype], time.perf_counter()
    best = ceiling(device, dtype)
    facts: list[dict[str, Any]] = [{"ceiling": {**best, "dtype": config.train.dtype}}]
    for kernel in rank_kernels(config):
        left = TOTAL_S - (time.perf_counter() - started)
        if LEAST_RUNS * kernel.flops / best["flops_per_s"] > left:
            continue
        seconds = fastest(runner(kernel, device, dtype), device)
        shape = [kernel.m, kernel.k, kernel.n]
        row = {"name": kernel.name, "shape": shape, "batch": kernel.batch, "flops": kernel.flops, "bytes": kernel.bytes}
        facts.append({"kernel": {**row, "seconds": seconds}})
    return facts


def ceiling(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure FLOP/s of a large square matmul, and bytes per second of a large copy (read and written)."""
    speed = max(2 * side**3 / fastest(_square(side, device, dtype), device) for side in LARGE[device.type])
    source = torch.empty(COPIED[device.type], dtype=torch.uint8, device=device).fill_(1)
    copy = torch.empty_like(source)
    moved = fastest(lambda: copy.copy_(source), device)
    return {"flops_per_s": speed, "bytes_per_s": 2 * source.nbytes / moved}


def _square(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    square = torch.randn(side, side, device=device).to(dtype)
    if in_float(square):
        square = square.float()
    out = torch.empty_like(square)
    return lambda: accumulate(out, square, square, first=True)


def runner(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that runs `kernel` once, on operands made here."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    if kernel.name == ATTENTION:
        q = random(1, kernel.batch, kernel.m, kernel.k)
        k, v = (random(1, kernel.kv_batch, kernel.m, kernel.k) for _ in range(2))
        grouped = kernel.kv_batch != kernel.batch
        if in_float(q):
            q, k, v = q.float(), k.float(), v.float()
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    a, weight = random(kernel.m, kernel.k), random(kernel.n, kernel.k)
    if in_float(a):
        return lambda: product(a, weight.t())
    out = torch.empty(kernel.m, kernel.n, dtype=dtype, device=device)
    return lambda: accumulate(out, a, weight.t(), first=True)


def fastest(run: Callable[[], object], device: torch.device, budget_s: float = BUDGET_S) -> float:
    """Return the seconds of the fastest of at least three runs, as many as fit into `budget_s`."""
    best, ran, started = float("inf"), 0, time.perf_counter()
    with torch.no_grad():
        while ran < LEAST_RUNS or time.perf_counter() - started < budget_s:
            _settle(device)
            began = time.perf_counter()
            run()
            _settle(device)
            if ran:  # the first run is a warm-up
                best = min(best, time.perf_counter() - began)
            ran += 1
    return best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
