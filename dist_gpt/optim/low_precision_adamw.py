"""AdamW with moments or gradients in a narrower dtype than the master (optim.state_dtype, optim.grad_dtype).

torch's fused kernel needs one dtype for all. Here a slice is read piece by piece into the master's dtype, stepped as in
arXiv:1711.05101, and rounded back. A second moment in bf16 that should change by less than 2^-8 of itself per step does
not change at all: with betas[1] near 1 it lags behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from dist_gpt.optim.rules import Group, zero_averages

PIECE = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Elements widened at a time: temporaries stay small, and a GPU does not spend its time on kernel launches."""


class NarrowAdamW:
    """AdamW rule (a rules.Rule) for slices whose `gradients` may have any dtype."""

    def __init__(
        self,
        groups: Sequence[Group],
        gradients: Mapping[Parameter, Tensor],
        betas: tuple[float, float],
        eps: float,
        state_dtype: torch.dtype,
    ) -> None:
        self.groups, self.gradients, self.betas, self.eps = tuple(groups), gradients, betas, eps
        self.state_dtype = state_dtype
        self.state: dict[Parameter, dict[str, Tensor]] = {}

    def state_of(self, piece: Parameter) -> dict[str, Tensor]:
        """Return the state of a slice, created as zero if it has none yet."""
        if piece not in self.state:
            self.state[piece] = zero_averages(piece, self.state_dtype, piece.device)
        return self.state[piece]

    @torch.no_grad()
    def step(self, rate: float, divisor: Tensor | None, skip: Tensor | None) -> None:
        """Step every slice; see Rule.step."""
        for group in self.groups:
            for piece in group.params:
                one = torch.ones((), device=piece.device) if divisor is None else divisor
                never = torch.zeros((), dtype=torch.bool, device=piece.device) if skip is None else skip
                self._step(piece, group.weight_decay, rate, one, never)

    def _step(self, parameter: Parameter, decay: float, rate: float, divisor: Tensor, skip: Tensor) -> None:
        gradient, state = self.gradients[parameter], self.state_of(parameter)
        state["step"] += skip.logical_not()
        step = state["step"].clamp(min=1.0)
        beta1, beta2 = self.betas
        wide = parameter.dtype
        size = rate / (1 - beta1**step).to(wide)
        root = (1 - beta2**step).sqrt().to(wide)
        divisor = divisor.to(wide)
        piece = PIECE.get(parameter.device.type, PIECE["cpu"])
        for start in range(0, parameter.numel(), piece):
            at = slice(start, start + piece)
            grad = gradient[at].to(wide, copy=True).div_(divisor)
            mean = state["exp_avg"][at].to(wide, copy=True).lerp_(grad, 1 - beta1)
            square = state["exp_avg_sq"][at].to(wide, copy=True).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            step_by = mean.div(square.sqrt().div_(root).add_(self.eps)).mul_(size)
            master = parameter[at]
            stepped = master.mul(1 - rate * decay).sub_(step_by)
            for kept, new in ((master, stepped), (state["exp_avg"][at], mean), (state["exp_avg_sq"][at], square)):
                kept.copy_(torch.where(skip, kept, new.to(kept.dtype)))
