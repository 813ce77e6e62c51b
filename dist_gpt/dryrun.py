"""The dry run: run and count the real code of any rank of any world size, on meta tensors and fake groups.

It moves and computes nothing and needs neither a GPU nor peers. Its counts must equal the plan's declarations exactly:
collectives from the ledger, FLOPs from torch's formulas, saved bytes from the storages that autograd and queued weight
jobs keep from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dist_gpt.comm.mesh import FakeBackends
from dist_gpt.config.deepspeed import require_native
from dist_gpt.config.schema import Config
from dist_gpt.events import TRAIN
from dist_gpt.parallel.saved import SavedBytes
from dist_gpt.plan.buffers import needs_room
from dist_gpt.plan.steps import RankPlan
from dist_gpt.profile.memory import parts
from dist_gpt.replica import Rank


def dryrun_document(config: Config, rank: int = 0) -> dict[str, Any]:
    """Return the counts of one training step of rank `rank`, under the keys that `dist-gpt plan` uses for a rank."""
    require_native(config, "a dry run counts the steps")
    replica = Rank(config, rank, FakeBackends(needs_room(RankPlan(config, rank))), torch.device("meta"))
    ids = np.zeros((config.train.micro_batch, config.model.seq_len + 1), dtype=np.int64)
    saved = SavedBytes([b.parameters for b in replica.buffers.buckets] + [b.gradients for b in replica.buffers.buckets])
    replica.executor.after_step, replica.sink.hold = saved.mark, saved.hold
    flops = FlopCounter()
    replica.sink.again = flops.again
    with flops, saved.counting():
        replica.train_step(0, lambda first, count: ids[:count])
    return {
        "rank": rank,
        "parameters": _parameters(replica),
        "model_flops": flops.total - flops.repeated,
        "recompute_flops": flops.repeated,
        "comm": replica.mesh.ledger.counts(TRAIN).as_dict(),
        "memory_bytes": parts(replica, saved.peak, replica.mesh.shard.peak_scratch_bytes),
        "schedule": {
            "name": config.parallel.schedule,
            "order": [str(step) for step in replica.plan.steps],
        },
        "differences": replica.mesh.ledger.differences,
    }


class FlopCounter(TorchDispatchMode):
    """Sum of FLOPs, by torch's own formulas, of the operations that run inside this mode.

    torch's FlopCounterMode takes three times as long: it tries to decompose every operation and keeps totals by module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.repeated = 0

    @contextmanager
    def again(self) -> Iterator[None]:
        """Count the operations inside as recomputation (`repeated`) as well."""
        before = self.total
        yield
        self.repeated += self.total - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = SHAPES.call(func, args, kwargs or {})
        packet = func._overloadpacket
        if packet is torch.ops.aten.addmm_:  # accumulates (m, k) @ (k, n): torch has no formula for the in-place form
            self.total += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


class ShapeCache:
    """Cache of the results of operations on meta tensors, keyed by operation and by the form of the arguments.

    Torch infers the shape of a result in Python, in 0.1 to 1 ms per operation, and a step repeats the same operations
    for every layer and micro-batch. Operations that change nothing and return new tensors are cached; all others are
    called.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return func(*args, **kwargs), or on a cache hit new tensors of the same shapes, strides and dtypes."""
        if func._schema.is_mutable:
            return func(*args, **kwargs)
        tensors: list[Tensor] = []
        given = _described(args, tensors), _described(tuple(sorted(kwargs.items())), tensors)
        key = (func, torch.get_default_dtype(), *given)
        known = self._known.get(key)
        if known is not None:
            return tuple(map(_new, known)) if isinstance(known, list) else _new(known)
        out = func(*args, **kwargs)
        results = out if isinstance(out, tuple) else (out,)
        if all(_is_new(each, tensors) for each in results):
            looks = [(each.shape, each.stride(), each.dtype) for each in results]
            self._known[key] = looks if isinstance(out, tuple) else looks[0]
        return out


def _new(look: tuple[Any, ...]) -> Tensor:
    shape, strides, dtype = look
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _described(value: Any, tensors: list[Tensor]) -> Any:
    """Return what a result's shape can depend on in `value`, as a hashable; append its tensors to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(_described(each, tensors) for each in value)
    return type(value), value


def _is_new(result: Any, tensors: list[Tensor]) -> bool:
    """Return whether `result` is a meta tensor that shares its memory with none of `tensors`."""
    if not (isinstance(result, Tensor) and result.is_meta):
        return False
    storage = result.untyped_storage()._cdata
    return all(tensor.untyped_storage()._cdata != storage for tensor in tensors)


SHAPES = ShapeCache()
"""Cache of this process: the ranks of a layout, and similar configurations, repeat the same operations."""


def _parameters(replica: Rank) -> int:
    return sum(replica.stage.named[p.name].numel() for p in replica.params)
