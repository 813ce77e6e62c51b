"""The dry run: the real code of any rank of any world size, on meta tensors and fake groups, counted.

It moves and computes nothing, needs neither GPU nor peers, and must agree with the plan's declarations to the integer:
collectives by the ledger, FLOPs by torch's formulas, saved bytes by the storages that autograd and queued weight jobs
keep from step to step.
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
from dist_gpt.config.schema import Config
from dist_gpt.events import TRAIN
from dist_gpt.optim.adamw import state_bytes
from dist_gpt.plan.count import memory_document
from dist_gpt.rank import Rank


class SavedBytes:
    """Live bytes of the storages that are kept for later steps, and their peak; parameters and their views excepted."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._state = {t.untyped_storage()._cdata for t in parameters}
        self._users: dict[int, int] = {}
        self.live = self.peak = 0

    @contextmanager
    def counting(self) -> Iterator[SavedBytes]:
        with torch.autograd.graph.saved_tensors_hooks(self.hold, lambda held: held.tensor):
            yield self

    def mark(self) -> None:
        """A step ends: what is live now stays."""
        self.peak = max(self.peak, self.live)

    def hold(self, tensor: Tensor) -> _Held:
        """Counts until the result is dropped."""
        return _Held(self, tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._state:
            return
        self._users[storage._cdata] = self._users.get(storage._cdata, 0) + 1
        if self._users[storage._cdata] == 1:
            self.live += storage.nbytes()

    def remove(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._state:
            return
        self._users[storage._cdata] -= 1
        if not self._users[storage._cdata]:
            del self._users[storage._cdata]
            self.live -= storage.nbytes()


class _Held:
    """A saved tensor; gives its bytes back when autograd drops it."""

    def __init__(self, owner: SavedBytes, tensor: Tensor) -> None:
        self.owner, self.tensor = owner, tensor
        owner.add(tensor)

    def __del__(self) -> None:
        self.owner.remove(self.tensor)


def dryrun_document(config: Config, rank: int = 0) -> dict[str, Any]:
    """What rank `rank` does in one training step, counted: the keys of `plan` for that rank."""
    replica = Rank(config, rank, FakeBackends(), torch.device("meta"))
    ids = np.zeros((config.train.micro_batch, config.model.seq_len + 1), dtype=np.int64)
    saved = SavedBytes([b.parameters for b in replica.buffers.buckets] + [b.gradients for b in replica.buffers.buckets])
    replica.executor.after_step, replica.sink.hold = saved.mark, saved.hold
    flops = FlopCounter()
    with flops, saved.counting():
        replica.train_step(0, lambda first, count: ids[:count])
    state = [b.parameters for b in replica.buffers.buckets]
    return {
        "rank": rank,
        "parameters": _parameters(replica),
        "model_flops": flops.total,
        "comm": replica.mesh.ledger.counts(TRAIN).as_dict(),
        "memory_bytes": memory_document(
            parameters=sum(t.nbytes for t in state),
            gradients=sum(b.gradients.nbytes for b in replica.buffers.buckets),
            optimizer=state_bytes(replica.optimizer.engine),
            activations=saved.peak,
            buffers=replica.executor.peak_message_bytes + replica.plan.scatter_bytes,
        ),
        "schedule": {
            "name": config.parallel.schedule,
            "order": [str(step) for step in replica.plan.steps],
        },
        "differences": replica.mesh.ledger.differences,
    }


class FlopCounter(TorchDispatchMode):
    """Sums torch's own formulas over what runs inside. (torch's FlopCounterMode does the same in three times the time:
    it tries to decompose every operation and keeps totals by module.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is torch.ops.aten.addmm_:  # accumulating (m, k) @ (k, n): torch has no formula for the in-place form
            self.total += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def _parameters(replica: Rank) -> int:
    return sum(replica.stage.named[p.name].numel() for p in replica.params)
