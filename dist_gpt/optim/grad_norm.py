"""Global gradient norm, which counts every parameter once over all axes, and clipping by it."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_gpt.comm.mesh import Mesh
from dist_gpt.parallel.buckets import FlatBucket
from dist_gpt.params import SHARDED


def squared_norm_here(flats: list[FlatBucket], mesh: Mesh) -> Tensor:
    """Return this rank's part of the squared norm, a float64 scalar.

    The sum over the world counts every gradient element once: a shard counts on its owner (unsharded state: on the
    first data rank; replicated over nodes: on the first), parameters that are whole on every tp rank count on the first
    one, a tied embedding on the first stage.
    """
    total = torch.zeros((), dtype=torch.float64, device=flats[0].gradient_shard.device if flats else None)
    for flat in flats:
        if mesh.replica.index != 0 or (flat.shards == 1 and mesh.data.index != 0):
            continue
        if flat.bucket.tied and mesh["embed"].index != 0:
            continue
        for segment in flat.bucket.segments:
            if segment.kind != SHARDED and mesh.tp.index != 0:
                continue
            start, stop = max(segment.start, flat.start), min(segment.stop, flat.stop)
            if start < stop:
                piece = flat.gradient_shard[start - flat.start : stop - flat.start]
                total += torch.linalg.vector_norm(piece, dtype=_norm_dtype(piece)).double().square()
    return total


def _norm_dtype(piece: Tensor) -> torch.dtype:
    return torch.float64 if piece.dtype == torch.float64 else torch.float32


def clip_divisor(norm: Tensor, limit: float) -> Tensor:
    """Return the divisor of gradients: max(1, norm / limit), or 1 if `limit` is 0. It stays on the device."""
    if limit == 0.0:
        return torch.ones_like(norm)
    return (norm / limit).clamp(min=1.0)
