"""AdamW and SGD on flat slices, by torch's functional optimizers.

torch.optim's classes import torch._dynamo when they are instantiated: about 3 s of CPU time in every rank, for a
compiler that nothing here uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd


@dataclass(frozen=True)
class Group:
    """Slices with one weight decay; each has its gradient in `grad` if the dtypes match."""

    params: tuple[Parameter, ...]
    weight_decay: float


class Rule(Protocol):
    """Interface of the rules that step slices."""

    groups: tuple[Group, ...]
    state: dict[Parameter, dict[str, Tensor]]
    """State kept from step to step, by slice; a slice that was never stepped may have none."""

    def state_of(self, piece: Parameter) -> dict[str, Tensor]:
        """Return the state of a slice, created as zero if it has none yet."""

    def step(self, rate: float, divisor: Tensor | None, skip: Tensor | None) -> None:
        """Step every slice with learning rate `rate`.

        Gradients are divided by `divisor` first, and nothing is changed if `skip` is true. Both are scalars on the
        slices' device; None divides by 1 and skips nothing.
        """


class AdamW:
    """AdamW rule (arXiv:1711.05101). `fused`: with torch's fused kernel, which alone takes a divisor and a skip."""

    def __init__(self, groups: Sequence[Group], betas: tuple[float, float], eps: float, fused: bool) -> None:
        self.groups, self.betas, self.eps, self.fused = tuple(groups), betas, eps, fused
        self.state: dict[Parameter, dict[str, Tensor]] = {}

    def state_of(self, piece: Parameter) -> dict[str, Tensor]:
        """Return the state of a slice, created as zero if it has none yet."""
        if piece not in self.state:
            device = piece.device if self.fused else torch.device("cpu")  # the plain form reads the count on the host
            self.state[piece] = zero_averages(piece, piece.dtype, device)
        return self.state[piece]

    @torch.no_grad()
    def step(self, rate: float, divisor: Tensor | None, skip: Tensor | None) -> None:
        """Step every slice; see Rule.step."""
        for group in self.groups:
            pieces: list[Tensor] = list(group.params)
            states = [self.state_of(piece) for piece in group.params]
            adamw(
                pieces, gradients_of(pieces), [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [],
                [s["step"] for s in states], fused=self.fused, foreach=False, grad_scale=floated(divisor),
                found_inf=floated(skip), amsgrad=False, beta1=self.betas[0],
                beta2=self.betas[1], lr=rate, weight_decay=group.weight_decay, eps=self.eps, maximize=False,
            )  # fmt: skip


class SGD:
    """SGD rule with momentum, without dampening. `fused` as for AdamW."""

    def __init__(self, groups: Sequence[Group], momentum: float, fused: bool) -> None:
        self.groups, self.momentum, self.fused = tuple(groups), momentum, fused
        # torch would leave the momentum uninitialised if the very first step is skipped
        self.state: dict[Parameter, dict[str, Tensor]] = {
            piece: {"momentum_buffer": torch.zeros_like(piece.detach())} if momentum else {}
            for group in self.groups
            for piece in group.params
        }

    def state_of(self, piece: Parameter) -> dict[str, Tensor]:
        """Return the state of a slice: its momentum, if momentum is used."""
        return self.state[piece]

    @torch.no_grad()
    def step(self, rate: float, divisor: Tensor | None, skip: Tensor | None) -> None:
        """Step every slice; see Rule.step."""
        for group in self.groups:
            pieces: list[Tensor] = list(group.params)
            sgd(
                pieces, gradients_of(pieces), [self.state[piece].get("momentum_buffer") for piece in group.params],
                fused=self.fused, foreach=False, grad_scale=floated(divisor), found_inf=floated(skip),
                weight_decay=group.weight_decay, momentum=self.momentum, lr=rate, dampening=0.0, nesterov=False,
                maximize=False,
            )  # fmt: skip


def zero_averages(piece: Parameter, dtype: torch.dtype, counted_on: torch.device) -> dict[str, Tensor]:
    """Return AdamW's state of a slice before its first step: step count and moments, under torch's names."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=counted_on),
        "exp_avg": torch.zeros_like(piece.detach(), dtype=dtype),
        "exp_avg_sq": torch.zeros_like(piece.detach(), dtype=dtype),
    }


def floated(scalar: Tensor | None) -> Tensor | None:
    """Return a scalar in float32, as the fused kernels take it; None stays None."""
    return None if scalar is None else scalar.float()


def gradients_of(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients bound to slices. Raise ValueError if one has none."""
    found = [piece.grad for piece in pieces if piece.grad is not None]
    if len(found) != len(pieces):
        raise ValueError(f"{len(pieces) - len(found)} of {len(pieces)} slices have no gradient of their dtype")
    return found
