"""Products in the precision of training.

Parameters and activations in 2 bytes are multiplied by the device's own units where it has them. A CPU without: the
operands, already rounded to 2 bytes, are multiplied in float32 and the result is rounded; torch's own kernels for such
a CPU give nothing better and are 12 to 26 times slower.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)


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
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def affine(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """bias (n,) + a (m, k) @ b (k, n)."""
    if in_float(a):
        return torch.addmm(bias.float(), a.float(), b.float()).to(a.dtype)
    return torch.addmm(bias, a, b)


def accumulate(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out (m, n) = or += a (m, k) @ b (k, n); `out` may be of a wider dtype than the factors."""
    if in_float(a):
        a, b = a.float(), b.float()
    if out.dtype == a.dtype:
        if first:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)
        return
    exact = a.is_cuda and a.dtype in LOW and out.dtype == torch.float32  # the unit's sum, not rounded again
    result = torch.mm(a, b, out_dtype=torch.float32) if exact else a @ b
    if first:
        out.copy_(result)
    else:
        out.add_(result)


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
