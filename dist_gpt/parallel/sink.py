"""Where weight gradients go.

Layers hand their weight gradients to a `GradSink` instead of leaving them to autograd. So a gradient is accumulated
straight into its place in a flat buffer, the first write of a step overwrites (nothing is zeroed), and a schedule that
computes weight gradients apart from input gradients (W apart from B) queues them as jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class GradSink:
    """Accumulates gradients into bound buffers; parameters that are not bound use their `.grad`."""

    def __init__(self) -> None:
        self._buffers: dict[Parameter, Tensor] = {}
        self._written: set[Parameter] = set()
        self._queue: dict[Hashable, list[tuple[Callable[[], None], list[object]]]] = {}
        self._deferred_to: Hashable | None = None
        self.hold: Callable[[Tensor], object] = lambda tensor: tensor  # the dry run counts what queued jobs keep

    def bind(self, parameter: Parameter, buffer: Tensor) -> None:
        """Gradients of `parameter` go to `buffer` (same shape) and to `parameter.grad`, which views it."""
        self._buffers[parameter] = buffer
        parameter.grad = buffer

    def begin(self) -> None:
        """Start of a step: the next write to each gradient overwrites."""
        self._written.clear()

    def unwritten(self) -> list[Parameter]:
        """Bound parameters that got no gradient since `begin`."""
        return [p for p in self._buffers if p not in self._written]

    # --- what layers call in their backward --------------------------------------------------------------------

    def add(self, parameter: Parameter, gradient: Tensor) -> None:
        """gradient of `parameter` += `gradient`."""
        buffer, first = self._target(parameter)
        if first:
            buffer.copy_(gradient)
        else:
            buffer.add_(gradient)

    def add_product(self, parameter: Parameter, grad_out: Tensor, inputs: Tensor) -> None:
        """gradient of a weight (out, in) += grad_out (tokens, out)^T @ inputs (tokens, in), without a temporary."""
        buffer, first = self._target(parameter)
        if first:
            torch.mm(grad_out.t(), inputs, out=buffer)
        else:
            buffer.addmm_(grad_out.t(), inputs)

    def add_column_sums(self, parameter: Parameter, grad_out: Tensor) -> None:
        """gradient of a bias (out,) += the sum of grad_out (tokens, out) over tokens, as a product with ones: on a CPU
        that is twice as fast as a sum."""
        buffer, first = self._target(parameter)
        ones = grad_out.new_ones(grad_out.shape[0])
        if first:
            torch.mv(grad_out.t(), ones, out=buffer)
        else:
            buffer.addmv_(grad_out.t(), ones)

    def add_rows(self, parameter: Parameter, rows: Tensor, gradient: Tensor) -> None:
        """gradient[rows[i]] += gradient[i]: the gradient of a lookup."""
        buffer, first = self._target(parameter)
        if first:
            buffer.zero_()
        buffer.index_add_(0, rows, gradient)

    def submit(self, job: Callable[[], None], *needs: Tensor) -> None:
        """Run `job`, which computes weight gradients from `needs`, now, or queue it if the running step defers them."""
        if self._deferred_to is None:
            job()
        else:
            kept = [self.hold(tensor) for tensor in needs]
            self._queue.setdefault(self._deferred_to, []).append((job, kept))

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
        return buffer, first


class _Use(torch.autograd.Function):
    """Identity on a parameter; its gradient goes to the sink."""

    @staticmethod
    def forward(ctx: Any, parameter: Parameter, sink: GradSink) -> Tensor:
        ctx.parameter, ctx.sink = parameter, sink
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.sink.add(ctx.parameter, grads[0])
        return None, None


def use(parameter: Parameter, sink: GradSink) -> Tensor:
    """`parameter` for an ordinary differentiable function, its gradient delivered to `sink`."""
    result: Tensor = _Use.apply(parameter, sink)
    return result
