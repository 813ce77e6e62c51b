"""Our matmuls for models that use `torch.nn.functional.linear`.

`sharding` compares communication and memory, `one-process` and `layouts` the overhead of our code: a faster matmul
kernel must not decide any of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_gpt.heap import prepare_heap
from dist_gpt.parallel.matmul import affine, column_sums, onednn_is_faster, product


class _Linear(torch.autograd.Function):
    """Compute x (..., in) @ weight (out, in).T + bias (out,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        rows = x.reshape(-1, x.shape[-1])
        y = affine(bias, rows, weight.t()) if bias is not None else product(rows, weight.t())
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_out = grads[0].reshape(-1, weight.shape[0])
        grad_x = product(grad_out, weight).view(x.shape)
        grad_weight = product(grad_out.t(), x.reshape(-1, x.shape[-1]))
        return grad_x, grad_weight, column_sums(grad_out) if ctx.has_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same as `torch.nn.functional.linear`, with our matmuls."""
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


def share_products() -> None:
    """Make every linear layer of this process use our matmuls from now on, if they differ from torch's."""
    if onednn_is_faster():
        torch.nn.functional.linear = linear  # type: ignore[assignment]


def stand_as_ours() -> None:
    """Give this process the same C heap and matmuls as ours.

    Without them, 10 to 15 % of a peer's CPU time went into page faults on freed memory, and half of the rest into a
    slower matmul.
    """
    prepare_heap()
    share_products()
