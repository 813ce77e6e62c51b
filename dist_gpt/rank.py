"""One rank's part of the model, ready to step: what the trainer, the certificate and the dry run stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dist_gpt.comm.mesh import Backends, Mesh, build_mesh
from dist_gpt.config.schema import Config
from dist_gpt.events import EVAL
from dist_gpt.model.gpt import Stage
from dist_gpt.model.init import initial_weight, local_part
from dist_gpt.optim.adamw import Optimizer
from dist_gpt.optim.lr import learning_rate
from dist_gpt.parallel.buckets import FlatBuffers
from dist_gpt.parallel.executor import Executor, MicroBatch
from dist_gpt.parallel.sink import GradSink
from dist_gpt.params import Param
from dist_gpt.plan.steps import RankPlan, calls_by_key, layout_of

Samples = Callable[[int, int], np.ndarray]
"""(first sample, how many) of one global batch -> token ids, (samples, seq_len + 1) int64."""


class Rank:
    """Model part, buffers, groups, executor and optimizer of rank `rank` of `config`'s layout."""

    def __init__(self, config: Config, rank: int, backends: Backends, device: torch.device) -> None:
        self.config = config
        self.plan = RankPlan(config, rank)
        self.device = device
        self.mesh: Mesh = build_mesh(layout_of(config), rank, self.plan.holders, backends)
        self.sink = GradSink()
        self.buffers = FlatBuffers(config, self.plan.buckets, self.plan.layout.data_index(rank), self.sink, device)
        blocks = tuple(b for _, chunk in self.plan.chunks for b in chunk)
        self.stage = Stage(config, blocks, self.mesh.tp, self.sink, self.buffers.new)
        self.executor = Executor(self.plan, self.stage, self.buffers, self.mesh, self.sink, device)
        self.optimizer = Optimizer(config, self.buffers, self.mesh)

    @property
    def params(self) -> list[Param]:
        """Table rows of what this rank stores."""
        return [slot.param for bucket in self.plan.buckets for slot in bucket.slots]

    def initialise(self) -> None:
        """First weights, from (train.seed, name)."""
        for param in self.params:
            self.set_parameter(param, initial_weight(param, self.config.train.seed))

    def set_parameter(self, param: Param, whole: Tensor) -> None:
        """This rank's part of `whole` becomes the value."""
        with torch.no_grad():
            part = local_part(param, whole, self.mesh.tp.size, self.mesh.tp.index)
            self.stage.named[param.name].copy_(part)

    def train_step(self, step: int, samples: Samples) -> None:
        """One optimizer step on the global batch `samples` reads; the result is in `optimizer.statistics`."""
        rate = learning_rate(self.config, step)
        self.executor.train(
            lambda m: self.micro_batch(samples, step, m, True),
            lambda loss: self.optimizer.step(rate, self._once(loss)),
        )

    def whole_gradients(self) -> dict[str, Tensor]:
        """Final gradients of what this rank stores, by name, the shards of the data axis put together again.

        To be called by all ranks, between reduction and clipping.
        """
        gradients = {}
        for flat in self.buffers.buckets:
            whole = flat.gradients.clone()
            if flat.shards > 1:
                with self.mesh.ledger.aside():
                    self.mesh.data.all_gather(whole, flat.gradient_shard.clone()).wait()
            for slot in flat.bucket.slots:
                gradients[slot.param.name] = whole[slot.start : slot.start + slot.numel].view(slot.shape)
        return gradients

    def evaluate(self, batches: Iterable[Samples]) -> Tensor:
        """Mean token loss over `batches`, a float64 scalar, equal on all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for samples in batches:
            loss = self.executor.evaluate(partial(self._validation_micro_batch, samples))
            loss = self._once(loss).double()
            with self.mesh.ledger.step(EVAL, "loss", calls_by_key(self.plan.eval_calls())):
                self.mesh.world.all_reduce(loss).wait()
            total += loss
            count += 1
        return total / count

    def _validation_micro_batch(self, samples: Samples, m: int) -> MicroBatch:
        return self.micro_batch(samples, 0, m, False)

    def _once(self, loss: Tensor) -> Tensor:
        """The loss part that the sum over the world counts: all tp ranks computed the same."""
        return loss if self.mesh.tp.index == 0 else torch.zeros_like(loss)

    def micro_batch(self, samples: Samples, step: int, m: int, training: bool) -> MicroBatch:
        """Micro-batch `m` of this rank's share of the global batch; only the ends of the pipeline read tokens."""
        t, model = self.config.train, self.config.model
        per_rank = t.global_batch // self.plan.layout.dp
        first = self.mesh.coords.dp * per_rank + m * t.micro_batch
        tokens = targets = None
        blocks = {b for _, chunk in self.plan.chunks for b in chunk}
        if 0 in blocks or model.num_layers + 1 in blocks:
            ids = torch.from_numpy(samples(first, t.micro_batch)).to(self.device)
            # copies, not views: a view would keep the one token more alive until the backward
            tokens = ids[:, :-1].clone().view(-1) if 0 in blocks else None
            targets = ids[:, 1:].clone().view(-1) if model.num_layers + 1 in blocks else None
        return MicroBatch(tokens, targets, step, first, 1.0 / (t.global_batch * model.seq_len), training)

    def close(self) -> None:
        """Give the groups back."""
        self.mesh.close()
