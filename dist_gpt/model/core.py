"""Attention core that is computed again in the backward (train.recompute: selective; arXiv:2205.05198, section 5).

Of softmax(q k^T) v only q, k and v are kept. In the backward the output projection needs the core's output first and
computes it again; the core's own backward then goes through that second computation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dist_gpt.model.functions import attention_core


class CoreAgain:
    """Attention core of one layer and micro-batch. `again` is entered around the second computation."""

    def __init__(self, rate: float, seed: int, again: Callable[[], AbstractContextManager[object]]) -> None:
        self.rate, self.seed, self.again = rate, seed, again
        self._second: tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the result of `attention_core` without keeping anything for the backward."""
        result: Tensor = _Core.apply(q, k, v, self)
        return result

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute the output a second time and return it as the projection takes it, (tokens, heads x K)."""
        leaves = (q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_())
        with torch.enable_grad(), self.again():
            out = attention_core(*leaves, self.rate, self.seed)
        self._second = leaves, out
        return merge_heads(out.detach())

    def gradients(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of q, k and v and release the second computation; RuntimeError if there was none."""
        if self._second is None:
            raise RuntimeError("the backward of an attention core came before that of the projection behind it")
        leaves, out = self._second
        self._second = None
        return torch.autograd.grad(out, leaves, gradient)


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, core: CoreAgain) -> Tensor:
        ctx.core = core
        return attention_core(q, k, v, core.rate, core.seed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.core.gradients(grads[0]), None)


def merge_heads(y: Tensor) -> Tensor:
    """Reshape y (B, heads, T, K) to (B x T, heads x K)."""
    batch, heads, time, width = y.shape
    return y.transpose(1, 2).reshape(batch * time, heads * width)
