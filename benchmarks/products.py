"""Our products for who trains with `torch.nn.functional.linear`: where `sharding` compares what is sent and kept, and
`one-process` and `layouts` what the machinery costs, nobody shall win by a faster matmul.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_gpt.heap import prepare_heap
from dist_gpt.parallel.matmul import affine, column_sums, onednn_is_faster, product


class _Linear(torch.autograd.Function):
    """x (..., in) times weight (out, in) transposed, plus bias (out,)."""

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
    """As `torch.nn.functional.linear`."""
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


def share_products() -> None:
    """From now on every linear layer of this process makes its products as ours does, if ours are not torch's."""
    if onednn_is_faster():
        torch.nn.functional.linear = linear  # type: ignore[assignment]


def stand_as_ours() -> None:
    """Give this process the C heap and the products that ours has: 10 to 15 % of a peer's processor time went into
    faulting freed pages in again, and half of what is left into a slower matmul."""
    prepare_heap()
    share_products()
