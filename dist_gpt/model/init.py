"""Initial weights: a function of (seed, parameter name), never of the layout."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_gpt.model.functions import seed_of
from dist_gpt.params import Param


def initial_weight(param: Param, seed: int) -> Tensor:
    """Return the initial value of a whole parameter, float32 on the CPU."""
    if param.init == "zeros":
        return torch.zeros(param.shape)
    if param.init == "ones":
        return torch.ones(param.shape)
    generator = torch.Generator().manual_seed(seed_of((seed, *param.name.encode())))
    return torch.empty(param.shape).normal_(0.0, param.std, generator=generator)


def local_part(param: Param, whole: Tensor, tp: int, index: int) -> Tensor:
    """Return the part of `whole` that rank `index` of `tp` tp ranks stores."""
    if param.shard_dim is None:
        return whole
    pieces = [whole.narrow(param.shard_dim, start, stop - start) for start, stop in param.pieces(tp, index)]
    return torch.cat(pieces, dim=param.shard_dim)
