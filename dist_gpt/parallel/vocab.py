"""Vocabulary-parallel embedding and cross-entropy: each tp rank holds a range of vocabulary rows, of any size.

Cross-entropy takes two collectives in the forward and none in the backward (Megatron-LM's fused form): the row maxima,
then one sum of (sum of exponentials, target logit). The logits' storage becomes the gradient without a second copy
(16-bit logits are copied to float32 first).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dist_gpt.comm.group import Group
from dist_gpt.parallel.linear import gather_tokens, reduce_tokens
from dist_gpt.parallel.matmul import LOW
from dist_gpt.parallel.sink import GradSink


def refuse_outside(ids: Tensor, vocab_size: int, what: str) -> None:
    """Check that ids (N,) are in the vocabulary: raise RuntimeError on a CPU, fail a device assertion on a GPU.

    `what` names the ids in the message. The check runs on the device, so the host never waits for it. Without it, with
    tp 2 or more, every rank would treat such an id as another rank's and train on a row of zeros.
    """
    inside = ((ids >= 0) & (ids < vocab_size)).all()
    torch._assert_async(inside, f"{what} holds a token id outside the vocabulary (model.vocab_size {vocab_size})")


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Parameter, tokens: Tensor, first_row: int, tp: Group, split: bool, sink: GradSink
    ) -> Tensor:
        ctx.weight, ctx.tp, ctx.split, ctx.sink = weight, tp, split, sink
        if tp.size == 1:
            ctx.save_for_backward(tokens)
            return weight.detach()[tokens]
        rows = tokens - first_row
        foreign = (rows < 0) | (rows >= weight.shape[0])
        rows = rows.masked_fill(foreign, 0)
        ctx.save_for_backward(rows, foreign)
        x, pending = reduce_tokens(tp, weight.detach()[rows].masked_fill_(foreign.unsqueeze(1), 0.0), split)
        pending.wait()
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        (grad,) = grads  # (N/tp or N, H)
        if ctx.split:
            grad, gathered = gather_tokens(ctx.tp, grad)
            gathered.wait()
        if ctx.tp.size == 1:
            (rows,) = ctx.saved_tensors
        else:
            rows, foreign = ctx.saved_tensors
            grad = grad.masked_fill(foreign.unsqueeze(1), 0.0)
        weight, sink = ctx.weight, ctx.sink
        given = sink.submit(lambda: (sink.add_rows(weight, rows, grad),), rows, grad)
        return given[0], None, None, None, None, None


def embedding(
    weight: Parameter,
    tokens: Tensor,
    first_row: int,
    vocab_size: int,
    tp: Group,
    sequence_parallel: bool,
    sink: GradSink,
) -> Tensor:
    """Look up rows of the table that is split over tp: tokens (N,) int64 -> (N/tp or N, H).

    `first_row` is the first id in `weight`; `vocab_size` counts the rows on all tp ranks together.
    """
    refuse_outside(tokens, vocab_size, "the embedding's input")
    result: Tensor = _Embedding.apply(weight, tokens, first_row, tp, sequence_parallel, sink)
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first_id: int, scale: float, tp: Group) -> Tensor:
        ctx.dtype = logits.dtype
        if logits.dtype in LOW:
            logits = logits.float()  # sums of thousands of exponentials
        largest = logits.amax(dim=1)  # (N,)
        tp.all_reduce(largest, "max").wait()  # a NaN that MAX may drop is still in the sum below
        shifted = logits.sub_(largest.unsqueeze(1))
        columns = targets - first_id
        own = (columns >= 0) & (columns < logits.shape[1])
        columns = columns.masked_fill(~own, 0)
        sums = shifted.new_empty((2, shifted.shape[0]))  # (sum of exponentials, target logit)
        torch.mul(shifted.gather(1, columns.unsqueeze(1)).squeeze(1), own, out=sums[1])
        exponentials = shifted.exp_()
        torch.sum(exponentials, dim=1, out=sums[0])
        tp.all_reduce(sums).wait()
        ctx.save_for_backward(exponentials, sums[0], columns, own)
        ctx.scale = scale
        return (sums[0].log() - sums[1]).sum() * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        exponentials, denominator, columns, own = ctx.saved_tensors
        weight = grads[0] * ctx.scale
        gradient = exponentials.mul_((weight / denominator).unsqueeze(1))  # softmax x weight
        rows = torch.arange(len(columns), device=columns.device)
        gradient[rows, columns] -= own * weight
        return gradient.to(ctx.dtype), None, None, None, None


def cross_entropy(logits: Tensor, targets: Tensor, first_id: int, vocab_size: int, scale: float, tp: Group) -> Tensor:
    """Return `scale` x the summed negative log-likelihood: logits (N, V/tp), targets (N,) int64 -> scalar.

    The result is equal on all tp ranks. `first_id` is the id of the first column, `vocab_size` is V. `logits` are
    consumed: their storage becomes the gradient.
    """
    refuse_outside(targets, vocab_size, "the loss's targets")
    result: Tensor = _CrossEntropy.apply(logits, targets, first_id, scale, tp)
    return result
