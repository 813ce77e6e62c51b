"""Products in the precision of training.

Parameters and activations in 2 bytes are multiplied by the device's own units where it has them. A CPU without: the
operands, already rounded to 2 bytes, are multiplied in float32 and the result is rounded; torch's own kernels for such
a CPU give nothing better and are 12 to 26 times slower.

In float32 on a CPU torch asks MKL, which leaves the wide units of processors that are not Intel's unused: oneDNN, which
torch brings as well, was 2.2 times as fast on an AMD EPYC. Products that are large enough go there (`asks_onednn`).
"""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)
WORTH_ONEDNN = 1 << 21
"""Multiplications of a product below which oneDNN's call, 15 us, takes longer than it saves."""
WIDE = 4
"""How much larger the left operand may be than the right one before it is the other one that is copied, if that saves
more than it costs to have the result transposed."""


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
    """a (m, k) @ b (k, n); its rows need not lie one behind the other."""
    if in_float(a):
        return product(a.float(), b.float()).to(a.dtype)
    if asks_onednn(a, b):
        return _onednn(a, b)
    return a @ b


def affine(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """bias (n,) + a (m, k) @ b (k, n)."""
    if in_float(a):
        return affine(bias.float(), a.float(), b.float()).to(a.dtype)
    if asks_onednn(a, b):
        return _onednn(a, b, bias)
    return torch.addmm(bias, a, b)


def accumulate(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out (m, n) = or += a (m, k) @ b (k, n); `out` may be of a wider dtype than the factors."""
    on_cpu = a.device.type == "cpu" and a.dtype in LOW
    if in_float(a) or (on_cpu and out.dtype != a.dtype):  # a CPU's own units would round what is to be added up
        a, b = a.float(), b.float()
    if out.dtype == a.dtype and not asks_onednn(a, b):
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
    """Whether oneDNN makes the product a (m, k) @ b (k, n): not where autograd would have to know of it, nor where `b`
    has gaps, for which it has slow kernels alone."""
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[0] * a.shape[1] * b.shape[1] >= WORTH_ONEDNN
        and (b.is_contiguous() or b.t().is_contiguous())
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        and onednn_is_faster()
    )


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether this is a processor for which MKL has no wide kernels, and torch has oneDNN's product. That is one of
    torch's inner operations: it is tried once, and left alone where it is not what it was."""
    cpus = ""
    with suppress(OSError):
        cpus = Path("/proc/cpuinfo").read_text()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not ("AuthenticAMD" in cpus and wide and torch.backends.mkl.is_available()):
        return False
    a, b, bias = (torch.arange(n, dtype=torch.float32, device="cpu") for n in (12, 8, 2))
    a, b = a.view(3, 4), b.view(4, 2)
    try:
        return torch.allclose(_onednn(a, b, bias), torch.addmm(bias, a, b))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (m, k) @ b (k, n), plus bias (n,). It copies `a` where that is a view with other strides."""
    (m, k), n = a.shape, b.shape[1]
    if bias is None and a.t().is_contiguous() and m > WIDE * n and k > n:
        return _onednn(b.t(), a.t()).t()  # of a head's gradient: copies the hidden states, not the logits
    bias = bias.contiguous() if bias is not None else None  # it reads on from the first, whatever the strides
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return result


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
