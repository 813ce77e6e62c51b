"""One rank's part of the model, ready to step: what the trainer, the certificate and the dry run stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_gpt.comm.global_groups import GlobalGroups
from dist_gpt.comm.mesh import Backends, Mesh, build_mesh
from dist_gpt.comm.rendezvous import RankEnv, Store, make_backends
from dist_gpt.config.schema import Config
from dist_gpt.events import EVAL
from dist_gpt.model.gpt import Stage
from dist_gpt.model.init import initial_weight, local_part
from dist_gpt.optim.adamw import Optimizer
from dist_gpt.optim.deepspeed import DeepSpeedEngine, DeepSpeedExecutor, DeepSpeedOptimizer
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
        with ExitStack() as undo:  # memory may end here
            undo.callback(self.mesh.close)
            self.buffers = FlatBuffers(self.plan, self.sink, device)
            blocks = tuple(b for _, chunk in self.plan.chunks for b in chunk)
            self.stage = Stage(config, blocks, self.mesh.tp, self.sink, self.buffers.new)
            self.executor = Executor(self.plan, self.stage, self.buffers, self.mesh, self.sink, device)
            self.optimizer = Optimizer(config, self.buffers, self.mesh)
            self._closing = undo.pop_all()
        if self.optimizer.scale is not None:
            self.executor.loss_scale = self.optimizer.scale.applied

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
            flat, slot = self.buffers.place(param)
            flat.load(slot, part)
            self.optimizer.load(flat, slot, part)

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
        return self._whole([flat.gradient_shard for flat in self.buffers.buckets])

    def whole_parameters(self) -> dict[str, Tensor]:
        """Copies of what this rank stores or has a shard of, by name, likewise. To be called by all ranks, between
        steps."""
        return self._whole([flat.parameter_shard for flat in self.buffers.buckets])

    def _whole(self, shards: list[Tensor]) -> dict[str, Tensor]:
        found = {}
        for flat, shard in zip(self.buffers.buckets, shards, strict=True):
            whole = shard.new_empty(flat.bucket.padded)
            with self.mesh.ledger.aside():
                if flat.shards > 1:
                    self.mesh.shard.all_gather(whole, shard.clone()).wait()
                else:
                    whole.copy_(shard)
            for slot in flat.bucket.slots:
                found[slot.param.name] = whole[slot.start : slot.start + slot.numel].view(slot.shape)
        return found

    def evaluate(self, batches: Iterable[Samples]) -> Tensor:
        """Mean token loss over `batches`, a float64 scalar, equal on all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        self.executor.refresh()
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

    def engine_facts(self) -> dict[str, Any] | None:
        """What an engine that communicates by itself tells: its name, version and traffic; None where all is ours."""
        return None

    def close(self) -> None:
        """Give back what was opened, each also when another fails to go."""
        self._closing.close()


class DeepSpeedRank(Rank):
    """The same, trained by DeepSpeed (optim.engine: deepspeed). It has no buffers and no shards of ours: certificate,
    dry run and checkpoints are the native engine's."""

    executor: DeepSpeedExecutor  # type: ignore[assignment]  # both are called alike
    optimizer: DeepSpeedOptimizer  # type: ignore[assignment]

    def __init__(self, config: Config, env: RankEnv, store: Store, device: torch.device) -> None:
        self.config = config
        self.plan = RankPlan(config, env.rank)
        self.device = device
        with ExitStack() as undo:
            backends = backends_of(config, env, store, device)
            self.mesh = build_mesh(layout_of(config), env.rank, self.plan.holders, backends)
            undo.callback(self.mesh.close)
            self.groups = GlobalGroups(store, env, device, config.launch.timeout_s)
            undo.callback(self.groups.close)
            self.engine = DeepSpeedEngine(config, self.plan, self.mesh, self.groups, device)
            undo.callback(self.engine.close)
            self._closing = undo.pop_all()
        self.sink = self.engine.sink
        self.executor, self.optimizer = DeepSpeedExecutor(self.engine), DeepSpeedOptimizer(self.engine)

    def initialise(self) -> None:
        """First weights, as ours; then the model is DeepSpeed's."""
        super().initialise()
        self.engine.start()

    def set_parameter(self, param: Param, whole: Tensor) -> None:
        """This rank's part of `whole` becomes the value; only before the model is DeepSpeed's."""
        self.engine.load(param, local_part(param, whole, self.mesh.tp.size, self.mesh.tp.index))

    def engine_facts(self) -> dict[str, Any] | None:
        """{name, version, steps, traffic: {phase: {axis: {op: {calls, payload_bytes, wire_bytes}}}}}."""
        return self.engine.facts()


def make_rank(config: Config, env: RankEnv, store: Store, device: torch.device) -> Rank:
    """The rank of `env`, by the engine of the configuration."""
    if config.optim.engine == "deepspeed":
        return DeepSpeedRank(config, env, store, device)
    return Rank(config, env.rank, backends_of(config, env, store, device), device)


def backends_of(config: Config, env: RankEnv, store: Store, device: torch.device) -> Backends:
    """What makes the groups, as `launch` says."""
    return make_backends(store, env, device, config.launch.timeout_s, config.launch.reads_memory)
