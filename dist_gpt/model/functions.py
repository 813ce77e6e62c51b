"""Pure functions of a block: normalisation, SwiGLU, rotary positions, attention core, dropout.

They have no groups, no parameters of their own and no generator state.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_gpt.parallel.matmul import LOW, in_float


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) x weight over the last dim: (N, H) -> (N, H). Source: arXiv:1910.07467."""
    result: Tensor = _RmsNorm.apply(x, weight, eps)
    return result


class _RmsNorm(torch.autograd.Function):
    """RMSNorm that keeps x and one number per row; autograd of the formula would keep three more activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(_wide(x).square().mean(dim=-1, keepdim=True) + eps)  # per row, in float32 at least
        ctx.save_for_backward(x, inverse)
        ctx.weight = weight
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse = ctx.saved_tensors
        normal = x * inverse
        grad_normal = grads[0] * ctx.weight
        projection = (grad_normal * normal).mean(dim=-1, keepdim=True)
        grad_x = (grad_normal - normal * projection).mul_(inverse)
        return grad_x.to(x.dtype), (grads[0] * normal).sum(0), None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in LOW else x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) x weight + bias over the last dim, (N, H). Source: arXiv:1607.06450."""
    if x.dtype in LOW and x.device.type == "cpu":
        result: Tensor = _LayerNorm.apply(x, weight, bias, eps)
        return result
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    """LayerNorm of 16-bit activations on a CPU.

    torch's own kernel there sums the gradients of weight and bias over the rows in 16 bits, an error of one percent;
    this one computes in float32 and keeps the same tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        shift = bias.float() if bias is not None else None
        y, mean, inverse = torch.native_layer_norm(x.float(), (x.shape[-1],), weight.float(), shift, eps)
        ctx.save_for_backward(x, mean, inverse)
        ctx.weight, ctx.bias = weight, bias
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, mean, inverse = ctx.saved_tensors
        shift = ctx.bias.float() if ctx.bias is not None else None
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grads[0].float(), x.float(), (x.shape[-1],), mean, inverse, ctx.weight.float(), shift,
            [True, True, shift is not None],
        )  # fmt: skip
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


class _SwiGlu(torch.autograd.Function):
    """SwiGLU that keeps gate and up only; the activated gate is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        torch.mul(grads[0], gate * sigmoid, out=grad_up)
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        torch.mul(grads[0] * up, slope, out=grad_gate)
        return grad_x


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) x up with x = [gate | up]: (N, 2F) -> (N, F). Source: arXiv:2002.05202."""
    result: Tensor = _SwiGlu.apply(x)
    return result


@lru_cache(maxsize=8)
def rotary_table(seq_len: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return cos and sin of position x theta^(-2i/K), each half repeated: (2, T, K), computed in float64."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequencies).repeat(1, 2)
    wide = torch.float32 if dtype in LOW else dtype
    return torch.stack((angles.cos(), angles.sin())).to(device=device, dtype=wide)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Apply rotary positions, half-split form: x (B, T, heads, K), table (2, T, K). Source: arXiv:2104.09864."""
    result: Tensor = _Rotate.apply(x, table)
    return result


class _Rotate(torch.autograd.Function):
    """Rotation that keeps only the table: the transpose of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.table = table
        return _turn(x, table[0], table[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _turn(grads[0], ctx.table[0], -ctx.table[1]), None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    if x.dtype != cos.dtype:
        return (x * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)).to(x.dtype)
    return torch.addcmul(x * cos.unsqueeze(1), swapped, sin.unsqueeze(1))


def attention_core(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """Return causal softmax(q k^T / sqrt(K)) v, (B, heads, T, K): q of that shape, k and v (B, kv_heads, T, K).

    With dropout the mask depends on `seed` alone, not on the generator's state before the call.
    """
    if q.is_meta:
        result: Tensor = _MetaAttention.apply(q, k, v)
        return result
    if in_float(q):
        return attention_core(q.float(), k.float(), v.float(), dropout, seed).to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    if dropout == 0.0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    with torch.random.fork_rng(devices=[q.device] if q.is_cuda else []):
        # torch.manual_seed also prepares GPUs, with a stack trace each time: 3 ms where there is none
        torch.manual_seed(seed) if q.is_cuda else torch.default_generator.manual_seed(seed)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=grouped)


class _MetaAttention(torch.autograd.Function):
    """Stand-in for a fused kernel in dry runs: it computes and keeps as much.

    It has two matmuls forward and four backward, and keeps q, k, v, the output and one log-sum-exp per row.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ _expand(k, q).transpose(-1, -2)
        batch, heads, time, width = q.shape
        out = q.new_empty((batch, time, heads, width)).transpose(1, 2)
        out.copy_(scores @ _expand(v, q))
        ctx.save_for_backward(q, k, v, out, q.new_empty((batch, heads, time), dtype=log_sum_exp_dtype(q.dtype)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        grad_scores = grads[0] @ _expand(v, q).transpose(-1, -2)
        grad_v = grad_scores.transpose(-1, -2) @ grads[0]
        grad_q = grad_scores @ _expand(k, q)
        grad_k = grad_scores.transpose(-1, -2) @ q
        return grad_q, grad_k[:, : k.shape[1]], grad_v[:, : v.shape[1]]


def _expand(kv: Tensor, q: Tensor) -> Tensor:
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def log_sum_exp_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of fused attention's statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- dropout ------------------------------------------------------------------------------------------------------

_LOW = 0xFFFFFFFF


def dropout(x: Tensor, rate: float, key: tuple[int, ...], first_row: int, skip: bool = False) -> Tensor:
    """Apply inverted dropout to x (N, H), rows `first_row` .. of the global batch.

    The mask is a hash of `key` and the global element index: the same for every layout, for a recomputed forward and
    after a resume. The backward computes it again, so nothing is kept. With `skip`, return x as it is, with the same
    backward.
    """
    if rate == 0.0:
        return x
    result: Tensor = _Dropout.apply(x, rate, seed_of(key), first_row, skip)
    return result


def seed_of(key: tuple[int, ...]) -> int:
    """Hash a tuple of integers to a 63-bit seed."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, seed: int, first_row: int, skip: bool) -> Tensor:
        ctx.key = (rate, seed, first_row)
        return x.view_as(x) if skip else (x * _keep(x, rate, seed, first_row)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return (grads[0] * _keep(grads[0], *ctx.key)).to(grads[0].dtype), None, None, None, None


def _keep(x: Tensor, rate: float, seed: int, first_row: int) -> Tensor:
    """Return 0 or 1/(1 - rate) per element, from MurmurHash3's 32-bit finaliser (fmix32) over index and seed."""
    if x.is_meta:
        return torch.empty_like(x)  # a dry run only counts; twenty operations on no data would be most of its time
    rows, columns = x.shape
    index = torch.arange(first_row * columns, (first_row + rows) * columns, device=x.device, dtype=torch.int64)
    bits = _fmix32((index & _LOW) ^ (seed & _LOW))
    bits = _fmix32(bits ^ ((index >> 32) & _LOW) ^ (seed >> 32))
    keep = bits >= int(rate * 2**32)
    return keep.view(rows, columns).to(_wide(x).dtype).mul_(1.0 / (1.0 - rate))


def _fmix32(h: Tensor) -> Tensor:
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _LOW
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _LOW
    return h ^ (h >> 16)
