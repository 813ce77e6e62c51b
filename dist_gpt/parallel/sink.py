"""Where weight gradients go.

Layers hand their weight gradients to a `GradSink` instead of leaving them to autograd. So a gradient is accumulated
straight into its place in a flat buffer, the first write of a step overwrites (nothing is zeroed), and a schedule that
computes weight gradients apart from input gradients (W apart from B) queues them as jobs.

What a job delivers it also returns, and a layer's backward returns that: nothing here, the gradients themselves with an
`AutogradSink`, for an engine that finds them in autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from dist_gpt.parallel.matmul import LOW, accumulate, column_sums, product, sum_rows

Job: TypeAlias = Callable[[], tuple[Tensor | None, ...]]
"""Delivers gradients of some parameters; returns what autograd is to have of them."""
NOTHING = (None, None)
"""What it is to have where jobs are run later: nothing of a weight, nothing of a bias."""


class GradSink:
    """Accumulates gradients into bound buffers; parameters that are not bound use their `.grad`."""

    def __init__(self) -> None:
        self._buffers: dict[Parameter, Tensor] = {}
        self._written: set[Parameter] = set()
        self._missing: set[Parameter] = set()
        self.finishes_later = False  # where weight gradients come apart, so do those that are finished before
        self._queue: dict[Hashable, list[tuple[Job, list[object]]]] = {}
        self._deferred_to: Hashable | None = None
        self.hold: Callable[[Tensor], object] = lambda tensor: tensor  # the dry run counts what queued jobs keep
        self.again: Callable[[], AbstractContextManager[object]] = nullcontext  # around forwards that run once more

    def bind(self, parameter: Parameter, buffer: Tensor) -> None:
        """Gradients of `parameter` go to `buffer` (same shape); `parameter.grad` views it where it is of its dtype."""
        self._buffers[parameter] = buffer
        if buffer.dtype == parameter.dtype:
            parameter.grad = buffer

    def begin(self) -> None:
        """Start of a step: the next write to each gradient overwrites."""
        self._written.clear()
        self._missing = set(self._buffers)

    def expect(self, parameters: Iterable[Parameter]) -> None:
        """The next write to each of `parameters` overwrites."""
        self._written.difference_update(parameters)

    def unwritten(self) -> list[Parameter]:
        """Bound parameters that got no gradient since `begin`."""
        return list(self._missing)

    # --- what layers call in their backward --------------------------------------------------------------------

    def add(self, parameter: Parameter, gradient: Tensor) -> Tensor | None:
        """gradient of `parameter` += `gradient`."""
        buffer, first = self._target(parameter)
        if first:
            buffer.copy_(gradient)
        else:
            buffer.add_(gradient)
        return None

    def add_product(self, parameter: Parameter, grad_out: Tensor, inputs: Tensor) -> Tensor | None:
        """gradient of a weight (out, in) += grad_out (tokens, out)^T @ inputs (tokens, in)."""
        buffer, first = self._target(parameter)
        accumulate(buffer, grad_out.t(), inputs, first)
        return None

    def add_column_sums(self, parameter: Parameter, grad_out: Tensor) -> Tensor | None:
        """gradient of a bias (out,) += the sum of grad_out (tokens, out) over tokens."""
        buffer, first = self._target(parameter)
        sums = column_sums(grad_out)
        if first:
            buffer.copy_(sums)
        else:
            buffer.add_(sums)
        return None

    def add_rows(self, parameter: Parameter, rows: Tensor, gradient: Tensor) -> Tensor | None:
        """gradient[rows[i]] += gradient[i]: the gradient of a lookup."""
        buffer, first = self._target(parameter)
        if first:
            buffer.zero_()
        if buffer.dtype in LOW:
            buffer.add_(sum_rows(gradient, rows, buffer.shape[0]))
        else:
            buffer.index_add_(0, rows, gradient.to(buffer.dtype))
        return None

    def submit(self, job: Job, *needs: Tensor) -> tuple[Tensor | None, ...]:
        """Run `job`, which delivers weight gradients from `needs`, now, or queue it if the running step defers them."""
        if self._deferred_to is None:
            return job()
        kept = [self.hold(tensor) for tensor in needs]
        self._queue.setdefault(self._deferred_to, []).append((job, kept))
        return NOTHING

    def deliver(self, job: Job, *needs: Tensor) -> tuple[Tensor | None, ...]:
        """As `submit` for what is finished in the backward of inputs: queued only where the place of gradients is not
        there before the weight step."""
        return self.submit(job, *needs) if self.finishes_later else job()

    def deliver_column_sums(self, parameter: Parameter, grad_out: Tensor) -> Tensor | None:
        """`add_column_sums`, of which only the sums are queued where they have to be."""
        if self.finishes_later and self.deferring:
            sums = column_sums(grad_out).to(grad_out.dtype)
            return self.submit(lambda: (self.add(parameter, sums),), sums)[0]
        return self.add_column_sums(parameter, grad_out)

    @property
    def deferring(self) -> bool:
        """Whether jobs are being queued: the running backward leaves weight gradients to a later step."""
        return self._deferred_to is not None

    # --- what the executor calls ---------------------------------------------------------------------------------

    def defer(self, key: Hashable | None) -> None:
        """Queue jobs under `key` from now on; None runs them at once again."""
        self._deferred_to = key

    def run(self, key: Hashable) -> None:
        """Run the jobs queued under `key`, in the order they came."""
        with torch.no_grad():  # as in the backward that queued them: saved inputs still require gradients
            for job, _ in self._queue.pop(key):
                job()

    def _target(self, parameter: Parameter) -> tuple[Tensor, bool]:
        buffer = self._buffers.get(parameter)
        if buffer is None:
            buffer = torch.empty_like(parameter, requires_grad=False)
            self.bind(parameter, buffer)
        first = parameter not in self._written
        self._written.add(parameter)
        self._missing.discard(parameter)
        return buffer, first


class AutogradSink(GradSink):
    """Leaves gradients to autograd: whoever accumulates, reduces and keeps them finds them there."""

    def add(self, parameter: Parameter, gradient: Tensor) -> Tensor:
        return gradient

    def add_product(self, parameter: Parameter, grad_out: Tensor, inputs: Tensor) -> Tensor:
        return product(grad_out.t(), inputs)

    def add_column_sums(self, parameter: Parameter, grad_out: Tensor) -> Tensor:
        return column_sums(grad_out).to(grad_out.dtype)

    def add_rows(self, parameter: Parameter, rows: Tensor, gradient: Tensor) -> Tensor:
        return sum_rows(gradient, rows, parameter.shape[0]).to(gradient.dtype)


class _Use(torch.autograd.Function):
    """Identity on a parameter; its gradient goes to the sink."""

    @staticmethod
    def forward(ctx: Any, parameter: Parameter, sink: GradSink) -> Tensor:
        ctx.parameter, ctx.sink = parameter, sink
        return parameter.data  # detach() would count a second gather of it as a change between forward and backward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        parameter, sink, gradient = ctx.parameter, ctx.sink, grads[0]
        return sink.deliver(lambda: (sink.add(parameter, gradient),), gradient)[0], None


def use(parameter: Parameter, sink: GradSink) -> Tensor:
    """`parameter` for an ordinary differentiable function, its gradient delivered to `sink`."""
    result: Tensor = _Use.apply(parameter, sink)
    return result
