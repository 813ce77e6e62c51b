"""State that a rank must keep to resume: its parameters by name, and the optimizer's state by slice.

Batches, dropout and the learning rate depend on the seed and the step alone, so no other tensors are kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_gpt.optim.optimizer import Optimizer


def tensors_of(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the tensors to save, by name; they are views of the live ones."""
    weights = {f"parameter.{name}": value.detach() for name, value in parameters.items()}
    return weights | {f"optimizer.{name}": value for name, value in optimizer.state().items()}


def restore(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Copy saved tensors into the live ones; raise ValueError, before anything is changed, if they do not fit."""
    live = tensors_of(parameters, optimizer)
    wrong = sorted(set(live) ^ set(tensors))
    wrong += [name for name in live if name in tensors and _form(live[name]) != _form(tensors[name])]
    if wrong:
        raise ValueError(f"the checkpoint does not fit this rank's tensors: {', '.join(wrong[:5])}")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(tensors[name])


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
