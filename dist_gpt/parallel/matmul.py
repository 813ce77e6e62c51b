"""Matmuls in the training precision.

16-bit parameters and activations are multiplied by the device's native 16-bit units if it has them. On a CPU without
them the operands, already rounded to 16 bits, are multiplied in float32 and the result is rounded; torch's own kernels
for such a CPU are no more accurate and 12 to 26 times slower.

For float32 on a CPU torch calls MKL, which leaves the wide units of CPUs other than Intel's unused. oneDNN, which torch
also ships, was 2.2 times as fast on an AMD EPYC, so matmuls that are large enough go there (`asks_onednn`). torch has
no switch for just that: it calls oneDNN for float32 only where rounding operands to 16 bits is allowed. oneDNN rounds
only on AMX units, so it is not used on a CPU with AMX, nor if a trial matmul comes out rounded.
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
"""Multiplications in a matmul below which the overhead of a oneDNN call, 12 us, exceeds its gain."""
ROUNDED = 1e-3
"""Error allowed in a matmul of 128 x 128 numbers up to 1; float32 has below 0.0001, TF32 0.01, bf16 0.1."""
_SETTING: Any = getattr(torch.backends.mkldnn, "matmul", None)
"""Precision setting of oneDNN matmuls, in torch 2.9 and later."""
UNSET = "none"


@lru_cache(maxsize=4)
def _native(dtype: torch.dtype) -> bool:
    """Return whether this CPU has matmul units for `dtype`."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if dtype == torch.bfloat16 else (
        "_is_amx_fp16_supported",)  # fmt: skip
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def in_float(tensor: Tensor) -> bool:
    """Return whether matmuls with `tensor` run in float32 and are rounded afterwards."""
    return tensor.dtype in LOW and tensor.device.type == "cpu" and not _native(tensor.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a (m, k) @ b (k, n)."""
    if in_float(a):
        return product(a.float(), b.float()).to(a.dtype)
    with _chosen(a, b):
        return a @ b


def affine(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return bias (n,) + a (m, k) @ b (k, n)."""
    if in_float(a):
        return affine(bias.float(), a.float(), b.float()).to(a.dtype)
    with _chosen(a, b):
        return torch.addmm(bias, a, b)


def accumulate(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Write (if `first`) or add a (m, k) @ b (k, n) to out (m, n), whose dtype may be wider than the factors'."""
    on_cpu = a.device.type == "cpu" and a.dtype in LOW
    if in_float(a) or (on_cpu and out.dtype != a.dtype):  # a CPU's 16-bit units would round the summand
        a, b = a.float(), b.float()
    if out.dtype == a.dtype:
        with _chosen(a, b):
            if first:
                torch.mm(a, b, out=out)
            else:
                out.addmm_(a, b)
        return
    exact = a.is_cuda and a.dtype in LOW and out.dtype == torch.float32  # the unit's float32 sum, not rounded
    result = torch.mm(a, b, out_dtype=torch.float32) if exact else product(a, b)
    if first:
        out.copy_(result)
    else:
        out.add_(result)


def asks_onednn(a: Tensor, b: Tensor) -> bool:
    """Return whether the matmul a (m, k) @ b (k, n) goes to oneDNN."""
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[0] * a.shape[1] * b.shape[1] >= WORTH_ONEDNN
        and onednn_is_faster()
    )


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Return whether large float32 matmuls should go to oneDNN on this CPU.

    True if MKL has no wide kernels for this CPU, oneDNN computes in float32 without rounding (by a trial), and the
    user has not set torch's matmul precision.
    """
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
        exact = torch.stack([(row[:, None].double() * a).sum(0) for row in a])  # without a matmul, which is on trial
        with OneDNN():
            found = torch.addmm(a, a, a) - a
        return torch.allclose(found.double(), exact, atol=ROUNDED)
    except (AttributeError, RuntimeError):
        return False


class OneDNN:
    """Context in which torch leaves float32 matmuls on a CPU to oneDNN.

    The setting belongs to the process: of the threads inside the context, the last one to exit resets it.
    """

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
    """Return the context that selects the kernels for the matmul a @ b."""
    return OneDNN() if asks_onednn(a, b) else nullcontext()


def sum_rows(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return (count, n), whose row r is the sum of the rows x[i] of x (m, n) with rows[i] == r; `rows` is (m,).

    The result is at least float32, since a GPU adds one row after the other in the result's dtype.
    """
    wide = x.float() if x.dtype in LOW else x
    return wide.new_zeros((count, x.shape[1])).index_add_(0, rows, wide)


def column_sums(x: Tensor) -> Tensor:
    """Return the sums of x (m, n) over its rows, (n,), in float32 at least."""
    if x.dtype in LOW:
        return x.sum(0, dtype=torch.float32)
    return torch.mv(x.t(), x.new_ones(x.shape[0]))  # twice as fast as sum() on a CPU
