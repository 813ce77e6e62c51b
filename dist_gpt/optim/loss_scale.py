"""Loss scale in fp16 (arXiv:1710.03740, section 3.2), without which small gradients would underflow to 0.

The scale is a number on the device, changed by device operations from a flag that all ranks compute alike from one sum:
ranks need not agree on it, and the host never waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_gpt.config.schema import Config

LARGEST = 2.0**32


class LossScale:
    """Loss scale that is halved after an overflow and doubled after train.loss_scale_window steps without one.

    `value` is the factor of a micro-batch's mean loss, as elsewhere. Our loss is a part of the whole batch's mean; its
    factor is `applied`, which is larger by the number of micro-batches over all data ranks.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.window = config.train.loss_scale_window
        self.parts = config.micro_batches * int(config.parallel.dp)
        self.value = torch.full((), config.train.loss_scale, dtype=torch.float32, device=device)
        self.good = torch.zeros((), dtype=torch.float32, device=device)

    def applied(self) -> Tensor:
        """Return the factor of the whole batch's loss, a float32 scalar."""
        return self.value * self.parts

    def update(self, bad: Tensor) -> None:
        """Update the scale in place; `bad`, a boolean scalar on the device, is true if this step overflowed."""
        good = torch.where(bad, 0.0, self.good + 1)
        grow = good >= self.window
        down = (self.value * 0.5).clamp(min=1.0)
        up = torch.where(grow, (self.value * 2).clamp(max=LARGEST), self.value)
        self.value.copy_(torch.where(bad, down, up))
        self.good.copy_(torch.where(grow, 0.0, good))

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps, by name."""
        return {"loss_scale.value": self.value, "loss_scale.good": self.good}
