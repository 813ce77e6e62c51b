"""AdamW whose averages or gradients are kept in fewer bytes than what it steps (optim.state_dtype, optim.grad_dtype).

torch's fused kernel wants one dtype for all. Here a slice is read piece by piece into the master's dtype, stepped as in
arXiv:1711.05101, and rounded back. An average of squares that changes by less than 2^-8 of itself a step stands still
in bf16: with betas[1] near 1 it lags behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

PIECE = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Elements that are widened at a time: temporaries stay small, and a GPU is not kept busy with starting kernels."""


class NarrowAdamW(torch.optim.Optimizer):
    """`gradients` of the parameters, of whatever dtype. They are divided by `divisor`; `skip` (boolean) leaves all as
    it is. Both are scalars on the parameters' device."""

    def __init__(
        self,
        params: Iterable[Any],
        gradients: Mapping[Parameter, Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        state_dtype: torch.dtype,
    ) -> None:
        self.gradients, self.state_dtype = gradients, state_dtype
        self.divisor = torch.ones(())
        self.skip = torch.zeros((), dtype=torch.bool)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step(parameter, group)

    def _step(self, parameter: Parameter, group: dict[str, Any]) -> None:
        gradient = self.gradients[parameter]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.state_dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.state_dtype)
        state["step"] += self.skip.logical_not()
        step = state["step"].clamp(min=1.0)
        beta1, beta2 = group["betas"]
        rate, decay, eps = group["lr"], group["weight_decay"], group["eps"]
        wide = parameter.dtype
        size = rate / (1 - beta1**step).to(wide)
        root = (1 - beta2**step).sqrt().to(wide)
        divisor = self.divisor.to(wide)
        piece = PIECE.get(parameter.device.type, PIECE["cpu"])
        for start in range(0, parameter.numel(), piece):
            at = slice(start, start + piece)
            grad = gradient[at].to(wide, copy=True).div_(divisor)
            mean = state["exp_avg"][at].to(wide, copy=True).lerp_(grad, 1 - beta1)
            square = state["exp_avg_sq"][at].to(wide, copy=True).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            step_by = mean.div(square.sqrt().div_(root).add_(eps)).mul_(size)
            master = parameter[at]
            stepped = master.mul(1 - rate * decay).sub_(step_by)
            for kept, new in ((master, stepped), (state["exp_avg"][at], mean), (state["exp_avg_sq"][at], square)):
                kept.copy_(torch.where(self.skip, kept, new.to(kept.dtype)))
