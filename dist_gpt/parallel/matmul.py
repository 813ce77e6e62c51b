"""Products in the precision of training.

Parameters and activations in 2 bytes are multiplied by the device's own units where it has them. A CPU without: the
operands, already rounded to 2 bytes, are multiplied in float32 and the result is rounded; torch's own kernels for such
a CPU give nothing better and are 12 to 26 times slower.

In float32 on a CPU torch asks MKL, which leaves the wide units of processors that are not Intel's unused: oneDNN, which
torch brings as well, was 2.2 times as fast on an AMD EPYC. Products that are large enough go there (`asks_onednn`).
torch has no switch for just that. It asks oneDNN for float32 where that may round operands to 2 bytes, which oneDNN
does on units for such tiles (AMX) alone: there, and where a product comes out rounded, it is left alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)
WORTH_ONEDNN = 1 << 21
"""Multiplications of a product below which oneDNN's call, 12 us, takes longer than it saves."""
ROUNDED = 1e-3
"""Error of a product of 128 x 128 numbers up to 1: in float32 below 0.0001, in TF32 0.01, in bf16 0.1."""
_SETTING: Any = getattr(torch.backends.mkldnn, "matmul", None)
"""Of torch 2.9 and later."""
UNSET = "none"


@lru_cache(maxsize=4)
def _native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies `dtype` itself."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if dtype == torch.bfloat16 else (
        "_is_amx_fp16_supported",)  # fmt: skip
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def in_float(tensor: Tensor) -> bool:
    """Whether products with `tensor` are made in float32 and rounded."""
    return tensor.dtype in LOW and tensor.device.type == "cpu" and not _native(tensor.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) @ b (k, n)."""
    if in_float(a):
        return product(a.float(), b.float()).to(a.dtype)
    with _chosen(a, b):
        return a @ b


def affine(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """bias (n,) + a (m, k) @ b (k, n)."""
    if in_float(a):
        return affine(bias.float(), a.float(), b.float()).to(a.dtype)
    with _chosen(a, b):
        return torch.addmm(bias, a, b)


def accumulate(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out (m, n) = or += a (m, k) @ b (k, n); `out` may be of a wider dtype than the factors."""
    on_cpu = a.device.type == "cpu" and a.dtype in LOW
    if in_float(a) or (on_cpu and out.dtype != a.dtype):  # a CPU's own units would round what is to be added up
        a, b = a.float(), b.float()
    if out.dtype == a.dtype:
        with _chosen(a, b):
            if first:
                torch.mm(a, b, out=out)
            else:
                out.addmm_(a, b)
        return
    exact = a.is_cuda and a.dtype in LOW and out.dtype == torch.float32  # the unit's sum, not rounded again
    result = torch.mm(a, b, out_dtype=torch.float32) if exact else product(a, b)
    if first:
        out.copy_(result)
    else:
        out.add_(result)


def asks_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN makes the product a (m, k) @ b (k, n)."""
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[0] * a.shape[1] * b.shape[1] >= WORTH_ONEDNN
        and onednn_is_faster()
    )


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether this is a processor for which MKL has no wide kernels, oneDNN's products are in float32, and nobody has
    said by which kernels torch shall make them."""
    cpus = ""
    with suppress(OSError):
        cpus = Path("/proc/cpuinfo").read_text()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if "AuthenticAMD" not in cpus or "amx" in cpus or not wide or not there:
        return False
    try:
        if _SETTING.fp32_precision != UNSET:
            return False
        a = torch.linspace(-1, 1, 128 * 128, dtype=torch.float32, device="cpu").view(128, 128)
        exact = torch.stack([(row[:, None].double() * a).sum(0) for row in a])  # by no product: that is on trial
        with OneDNN():
            found = torch.addmm(a, a, a) - a
        return torch.allclose(found.double(), exact, atol=ROUNDED)
    except (AttributeError, RuntimeError):
        return False


class OneDNN:
    """Within it torch asks oneDNN for products in float32 on a CPU. It is a setting of the process: of threads that
    are within it, the last one to leave changes it back."""

    _within = 0
    _turn = Lock()

    def __enter__(self) -> None:
        with OneDNN._turn:
            OneDNN._within += 1
            _SETTING.fp32_precision = "bf16"

    def __exit__(self, *error: object) -> None:
        with OneDNN._turn:
            OneDNN._within -= 1
            if not OneDNN._within:
                _SETTING.fp32_precision = UNSET


def _chosen(a: Tensor, b: Tensor) -> AbstractContextManager[None]:
    """Around the product a @ b: who makes it."""
    return OneDNN() if asks_onednn(a, b) else nullcontext()


def sum_rows(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count, n): row r is the sum of those of x (m, n) whose number in `rows` (m,) is r; in float32 at least, since a
    GPU adds one after the other in the result's dtype."""
    wide = x.float() if x.dtype in LOW else x
    return wide.new_zeros((count, x.shape[1])).index_add_(0, rows, wide)


def column_sums(x: Tensor) -> Tensor:
    """Sums of x (m, n) over rows, in float32 at least. As a product with ones: on a CPU that is twice as fast."""
    if x.dtype in LOW:
        return x.sum(0, dtype=torch.float32)
    return torch.mv(x.t(), x.new_ones(x.shape[0]))
