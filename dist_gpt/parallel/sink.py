"""Sinks for weight gradients.

Layers hand their weight gradients to a `GradSink` instead of leaving them to autograd. A gradient is thus accumulated
directly in its place in a flat buffer, the first write of a step overwrites (nothing is zeroed), and a schedule that
computes weight gradients (W) apart from input gradients (B) queues them as jobs.

A job returns the gradients that autograd is to receive, and the layer's backward returns them: none with a `GradSink`,
the gradients themselves with an `AutogradSink`, for an engine that reads them from autograd.
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
"""Function that delivers gradients of some parameters and returns those that autograd is to receive."""
NOTHING = (None, None)
"""Result of a queued job: autograd receives no gradient of the weight and none of the bias."""


class GradSink:
    """Accumulator of gradients in bound buffers; a parameter that is not bound uses its `.grad`."""

    def __init__(self) -> None:
        self._buffers: dict[Parameter, Tensor] = {}
        self._written: set[Parameter] = set()
        self._missing: set[Parameter] = set()
        self.finishes_later = False  # ZeRO-2, -3: W opens the buffers, so gradients finished in a split B wait too
        self._queue: dict[Hashable, list[tuple[Job, list[object]]]] = {}
        self._deferred_to: Hashable | None = None
        self.hold: Callable[[Tensor], object] = lambda tensor: tensor  # hook to count what queued jobs keep
        self.again: Callable[[], AbstractContextManager[object]] = nullcontext  # entered around repeated forwards

    def bind(self, parameter: Parameter, buffer: Tensor) -> None:
        """Collect gradients of `parameter` in `buffer` (same shape), its `grad` from now on if the dtypes match."""
        self._buffers[parameter] = buffer
        if buffer.dtype == parameter.dtype:
            parameter.grad = buffer

    def begin(self) -> None:
        """Start a training step: the next write to each gradient overwrites."""
        self._written.clear()
        self._missing = set(self._buffers)

    def expect(self, parameters: Iterable[Parameter]) -> None:
        """Let the next write to the gradient of each of `parameters` overwrite."""
        self._written.difference_update(parameters)

    def unwritten(self) -> list[Parameter]:
        """Return the bound parameters that got no gradient since `begin`."""
        return list(self._missing)

    # --- what layers call in their backward --------------------------------------------------------------------

    def add(self, parameter: Parameter, gradient: Tensor) -> Tensor | None:
        """Add `gradient` to the gradient of `parameter`."""
        buffer, first = self._target(parameter)
        if first:
            buffer.copy_(gradient)
        else:
            buffer.add_(gradient)
        return None

    def add_product(self, parameter: Parameter, grad_out: Tensor, inputs: Tensor) -> Tensor | None:
        """Add grad_out (tokens, out)^T @ inputs (tokens, in) to the gradient of a weight (out, in)."""
        buffer, first = self._target(parameter)
        accumulate(buffer, grad_out.t(), inputs, first)
        return None

    def add_column_sums(self, parameter: Parameter, grad_out: Tensor) -> Tensor | None:
        """Add the sum of grad_out (tokens, out) over tokens to the gradient of a bias (out,)."""
        buffer, first = self._target(parameter)
        sums = column_sums(grad_out)
        if first:
            buffer.copy_(sums)
        else:
            buffer.add_(sums)
        return None

    def add_rows(self, parameter: Parameter, rows: Tensor, gradient: Tensor) -> Tensor | None:
        """Add gradient[i] to row rows[i] of the gradient of `parameter`, a lookup table."""
        buffer, first = self._target(parameter)
        if first:
            buffer.zero_()
        if buffer.dtype in LOW:
            buffer.add_(sum_rows(gradient, rows, buffer.shape[0]))
        else:
            buffer.index_add_(0, rows, gradient.to(buffer.dtype))
        return None

    def submit(self, job: Job, *needs: Tensor) -> tuple[Tensor | None, ...]:
        """Run `job` (it delivers weight gradients from `needs`) now, or queue it if the running step defers them."""
        if self._deferred_to is None:
            return job()
        kept = [self.hold(tensor) for tensor in needs]
        self._queue.setdefault(self._deferred_to, []).append((job, kept))
        return NOTHING

    def deliver(self, job: Job, *needs: Tensor) -> tuple[Tensor | None, ...]:
        """Run a job whose gradients B has finished; submit it only if their buffer opens with W (`finishes_later`)."""
        return self.submit(job, *needs) if self.finishes_later else job()

    def deliver_column_sums(self, parameter: Parameter, grad_out: Tensor) -> Tensor | None:
        """Add column sums as `add_column_sums` does; if that must be queued, keep only the sums, not `grad_out`."""
        if self.finishes_later and self.deferring:
            sums = column_sums(grad_out).to(grad_out.dtype)
            return self.submit(lambda: (self.add(parameter, sums),), sums)[0]
        return self.add_column_sums(parameter, grad_out)

    @property
    def deferring(self) -> bool:
        """True while jobs are queued: the running backward leaves weight gradients to a later step."""
        return self._deferred_to is not None

    # --- what the executor calls ---------------------------------------------------------------------------------

    def defer(self, key: Hashable | None) -> None:
        """Queue jobs under `key` from now on; with None, run them at once again."""
        self._deferred_to = key

    def run(self, key: Hashable) -> None:
        """Run the jobs queued under `key`, in the order of their submission."""
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
    """Sink that returns gradients to autograd, where an engine finds, accumulates and reduces them."""

    def add(self, parameter: Parameter, gradient: Tensor) -> Tensor:
        """Return `gradient` itself."""
        return gradient

    def add_product(self, parameter: Parameter, grad_out: Tensor, inputs: Tensor) -> Tensor:
        """Return grad_out (tokens, out)^T @ inputs (tokens, in)."""
        return product(grad_out.t(), inputs)

    def add_column_sums(self, parameter: Parameter, grad_out: Tensor) -> Tensor:
        """Return the sum of grad_out (tokens, out) over tokens, in its dtype."""
        return column_sums(grad_out).to(grad_out.dtype)

    def add_rows(self, parameter: Parameter, rows: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient of a table: row r is the sum of all gradient[i] with rows[i] == r."""
        return sum_rows(gradient, rows, parameter.shape[0]).to(gradient.dtype)


class _Use(torch.autograd.Function):
    """Identity on a parameter whose gradient goes to the sink."""

    @staticmethod
    def forward(ctx: Any, parameter: Parameter, sink: GradSink) -> Tensor:
        ctx.parameter, ctx.sink = parameter, sink
        return parameter.data  # after detach() autograd would take a second gather for an in-place change

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        parameter, sink, gradient = ctx.parameter, ctx.sink, grads[0]
        return sink.deliver(lambda: (sink.add(parameter, gradient),), gradient)[0], None


def use(parameter: Parameter, sink: GradSink) -> Tensor:
    """Return `parameter` for an ordinary differentiable function; its gradient is delivered to `sink`."""
    result: Tensor = _Use.apply(parameter, sink)
    return result
