"""Column- and row-parallel linear layers.

    column   W (out/tp, in)   y = x W^T + b        forward: nothing, or an all-gather of x (sequence parallel)
    row      W (out, in/tp)   y = sum_tp x W^T + b  forward: an all-reduce, or a reduce-scatter (sequence parallel)

The backward of each communicates as the forward of the other. The column layer's backward starts a collective, runs
the matmul that does not need it, then waits. Source: Megatron-LM (arXiv:1909.08053; sequence parallel:
arXiv:2205.05198). Activations are (tokens, features); sequence parallelism splits the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from dist_gpt.comm.group import Group, Pending
from dist_gpt.parallel.matmul import affine, product
from dist_gpt.parallel.sink import GradSink


def gather_tokens(group: Group, x: Tensor) -> tuple[Tensor, Pending]:
    """Start to gather the tokens of all ranks: return the result of x (N/tp, F) -> (N, F) and its `Pending`."""
    if group.size == 1:
        return x, Pending()
    x = x.contiguous()
    full = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    return full, group.all_gather(full, x)


def scatter_tokens(group: Group, x: Tensor) -> tuple[Tensor, Pending]:
    """Start to sum x (N, F) over the group: return this rank's tokens of the sum, (N/tp, F), and their `Pending`."""
    if group.size == 1:
        return x, Pending()
    x = x.contiguous()
    part = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    return part, group.reduce_scatter(part, x)


def reduce_tokens(group: Group, x: Tensor, sequence_parallel: bool) -> tuple[Tensor, Pending]:
    """Start to sum x (N, F): return (N/tp, F) with sequence parallelism, else (N, F) in place, and its `Pending`."""
    if sequence_parallel:
        return scatter_tokens(group, x)
    return x, group.all_reduce(x)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Parameter, bias: Parameter | None, tp: Group, split: bool, sink: GradSink
    ) -> Tensor:
        ctx.save_for_backward(x)  # the split tokens: backward gathers them again
        ctx.weight, ctx.bias, ctx.tp, ctx.split, ctx.sink = weight, bias, tp, split, sink
        full = x
        if split:
            full, pending = gather_tokens(tp, x)
            pending.wait()
        return affine(bias, full, weight.t()) if bias is not None else product(full, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads  # (N, out/tp)
        (x,) = ctx.saved_tensors
        weight, bias, tp, split, sink = ctx.weight, ctx.bias, ctx.tp, ctx.split, ctx.sink

        if not split:
            grad_x, sum_x = reduce_tokens(tp, product(grad_out, weight), False)
            given = sink.submit(lambda: _weight_gradients(sink, weight, bias, grad_out, x), grad_out, x)
            sum_x.wait()
            return grad_x, *given, None, None, None

        if sink.deferring:  # the gather belongs to the weight step
            grad_x, sum_x = scatter_tokens(tp, product(grad_out, weight))
            given = sink.submit(lambda: _gathered_weight_gradients(sink, weight, bias, grad_out, x, tp), grad_out, x)
        else:
            full, gathered = gather_tokens(tp, x)
            partial = product(grad_out, weight)
            gathered.wait()
            grad_x, sum_x = scatter_tokens(tp, partial)
            given = _weight_gradients(sink, weight, bias, grad_out, full)
        sum_x.wait()
        return grad_x, *given, None, None, None


class Again(Protocol):
    """Computation before a row-parallel layer that is repeated in the backward instead of kept."""

    def compute(self, *kept: Tensor) -> Tensor:
        """Return the layer's input (N, in/tp), computed from the tensors kept instead of it."""


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Parameter,
        bias: Parameter | None,
        tp: Group,
        split: bool,
        sink: GradSink,
        skip: bool,
        before: Again | None,
        *kept: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*(kept if before is not None else (x,)))  # x: (N, in/tp)
        ctx.weight, ctx.bias, ctx.tp, ctx.split, ctx.sink, ctx.before = weight, bias, tp, split, sink, before
        if skip:
            return x.new_empty((x.shape[0] // (tp.size if split else 1), weight.shape[0]))
        if tp.size == 1:
            return affine(bias, x, weight.t()) if bias is not None else product(x, weight.t())
        y, pending = reduce_tokens(tp, product(x, weight.t()), split)
        pending.wait()
        if bias is not None:
            y += bias  # once, after the sum
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads  # (N/tp, out) with sequence parallel, else (N, out)
        kept = ctx.saved_tensors
        weight, bias, sink = ctx.weight, ctx.bias, ctx.sink
        given_bias = sink.deliver_column_sums(bias, grad_out) if bias is not None else None
        if ctx.split:
            grad_out, gathered = gather_tokens(ctx.tp, grad_out)
            gathered.wait()
        x = kept[0] if ctx.before is None else ctx.before.compute(*kept)
        grad_x = product(grad_out, weight)
        given = sink.submit(lambda: (sink.add_product(weight, grad_out, x),), grad_out, x)
        return (grad_x, given[0], given_bias, *[None] * (5 + (len(kept) if ctx.before is not None else 0)))


def _weight_gradients(
    sink: GradSink, weight: Parameter, bias: Parameter | None, grad_out: Tensor, inputs: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    of_weight = sink.add_product(weight, grad_out, inputs)
    return of_weight, sink.add_column_sums(bias, grad_out) if bias is not None else None


def _gathered_weight_gradients(
    sink: GradSink, weight: Parameter, bias: Parameter | None, grad_out: Tensor, x: Tensor, tp: Group
) -> tuple[Tensor | None, Tensor | None]:
    full, gathered = gather_tokens(tp, x)
    gathered.wait()
    return _weight_gradients(sink, weight, bias, grad_out, full)


def column_linear(
    x: Tensor, weight: Parameter, bias: Parameter | None, tp: Group, sequence_parallel: bool, sink: GradSink
) -> Tensor:
    """Map x (N/tp or N, in) to (N, out/tp); `weight` (out/tp, in) and `bias` (out/tp) are this rank's rows."""
    result: Tensor = _Column.apply(x, weight, bias, tp, sequence_parallel, sink)
    return result


def row_linear(
    x: Tensor,
    weight: Parameter,
    bias: Parameter | None,
    tp: Group,
    sequence_parallel: bool,
    sink: GradSink,
    skip: bool = False,
    before: Again | None = None,
    kept: Sequence[Tensor] = (),
) -> Tensor:
    """Map x (N, in/tp) to (N/tp or N, out); `weight` (out, in/tp) is this rank's columns, `bias` (out) is whole.

    With `skip`, only what the backward needs is done and the result is uninitialised. With `before`, x is not kept but
    computed again from `kept`.
    """
    result: Tensor = _Row.apply(x, weight, bias, tp, sequence_parallel, sink, skip, before, *kept)
    return result


class ColumnLinear(torch.nn.Module):
    """Column-parallel linear layer with its weights."""

    def __init__(self, weight: Parameter, bias: Parameter | None, tp: Group, sequence_parallel: bool, sink: GradSink):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.tp, self.sequence_parallel, self.sink = tp, sequence_parallel, sink

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N/tp or N, in) to (N, out/tp)."""
        return column_linear(x, self.weight, self.bias, self.tp, self.sequence_parallel, self.sink)


class RowLinear(torch.nn.Module):
    """Row-parallel linear layer with its weights."""

    def __init__(self, weight: Parameter, bias: Parameter | None, tp: Group, sequence_parallel: bool, sink: GradSink):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.tp, self.sequence_parallel, self.sink = tp, sequence_parallel, sink

    def forward(
        self, x: Tensor, skip: bool = False, before: Again | None = None, kept: Sequence[Tensor] = ()
    ) -> Tensor:
        """Map x (N, in/tp) to (N/tp or N, out); the other arguments are those of `row_linear`."""
        return row_linear(x, self.weight, self.bias, self.tp, self.sequence_parallel, self.sink, skip, before, kept)
