"""One rank's part of the model, ready to step: the base of the trainer, the certificate and the dry run."""

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
from dist_gpt.integrations.deepspeed.engine import DeepSpeedEngine, DeepSpeedExecutor, DeepSpeedOptimizer
from dist_gpt.model.gpt import Stage
from dist_gpt.model.init import initial_weight, local_part
from dist_gpt.optim.lr import learning_rate
from dist_gpt.optim.optimizer import Optimizer
from dist_gpt.parallel.buckets import FlatBuffers
from dist_gpt.parallel.executor import Executor, MicroBatch
from dist_gpt.parallel.sink import GradSink
from dist_gpt.params import Param
from dist_gpt.plan.steps import RankPlan, calls_by_key, layout_of

Samples = Callable[[int, int], np.ndarray]
"""(first sample, number of samples) of one global batch -> token ids, (samples, seq_len + 1) int64."""


class Rank:
    """Model part, buffers, groups, executor and optimizer of rank `rank` of `config`'s layout."""

    def __init__(self, config: Config, rank: int, backends: Backends, device: torch.device) -> None:
        self.config = config
        self.plan = RankPlan(config, rank)
        self.device = device
        self.mesh: Mesh = build_mesh(layout_of(config), rank, self.plan.holders, backends)
        self.sink = GradSink()
        with ExitStack() as undo:  # memory may run out here
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
        """Table rows of the parameters that this rank stores."""
        return [slot.param for bucket in self.plan.buckets for slot in bucket.slots]

    def initialise(self) -> None:
        """Set the initial weights, which depend on (train.seed, parameter name)."""
        for param in self.params:
            self.set_parameter(param, initial_weight(param, self.config.train.seed))

    def set_parameter(self, param: Param, whole: Tensor) -> None:
        """Set this rank's part of the parameter to that of its full value `whole`."""
        with torch.no_grad():
            part = local_part(param, whole, self.mesh.tp.size, self.mesh.tp.index)
            flat, slot = self.buffers.place(param)
            flat.load(slot, part)
            self.optimizer.load(flat, slot, part)

    def train_step(self, step: int, samples: Samples) -> None:
        """Train step `step`, counted from 0, on the global batch that `samples` reads.

        The loss and the gradient norm are then in `optimizer.statistics`. All ranks call this together.
        """
        rate = learning_rate(self.config, step)
        self.executor.train(
            lambda m: self.micro_batch(samples, step, m, True),
            lambda loss: self.optimizer.step(rate, self._once(loss)),
        )

    def whole_gradients(self) -> dict[str, Tensor]:
        """Return the final gradients of the parameters that this rank stores, by name, gathered over the data axis.

        All ranks call this together, between reduction and clipping.
        """
        return self._whole([flat.gradient_shard for flat in self.buffers.buckets])

    def whole_parameters(self) -> dict[str, Tensor]:
        """Return copies of the parameters that this rank stores or has a shard of, by name, gathered likewise.

        All ranks call this together, between steps.
        """
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
        """Return the mean token loss over `batches`, a float64 scalar equal on all ranks, which call this together."""
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
        """Return `loss` on the first tp rank and 0 on the others, so that a sum over the world counts it once."""
        return loss if self.mesh.tp.index == 0 else torch.zeros_like(loss)

    def micro_batch(self, samples: Samples, step: int, m: int, training: bool) -> MicroBatch:
        """Return micro-batch `m` of this rank's share of the global batch. Only the ends of a pipeline read tokens."""
        t, model = self.config.train, self.config.model
        per_rank = t.global_batch // self.plan.layout.dp
        first = self.mesh.coords.dp * per_rank + m * t.micro_batch
        tokens = targets = None
        blocks = {b for _, chunk in self.plan.chunks for b in chunk}
        if 0 in blocks or model.num_layers + 1 in blocks:
            ids = torch.from_numpy(samples(first, t.micro_batch)).to(self.device)
            # copies: a view would keep the additional token alive until the backward
            tokens = ids[:, :-1].clone().view(-1) if 0 in blocks else None
            targets = ids[:, 1:].clone().view(-1) if model.num_layers + 1 in blocks else None
        return MicroBatch(tokens, targets, step, first, 1.0 / (t.global_batch * model.seq_len), training)

    def engine_facts(self) -> dict[str, Any] | None:
        """Return name, version and traffic of an engine that communicates by itself; None for the native engine."""
        return None

    def close(self) -> None:
        """Close all that this rank opened, even if closing one part fails."""
        self._closing.close()


class DeepSpeedRank(Rank):
    """Rank trained by DeepSpeed (optim.engine: deepspeed).

    It has none of the native engine's buffers and shards, and so no certificate, dry run or checkpoints.
    """

    executor: DeepSpeedExecutor  # type: ignore[assignment]  # same interface
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
        """Set the same initial weights as the native engine, then hand the model over to DeepSpeed."""
        super().initialise()
        self.engine.start()

    def set_parameter(self, param: Param, whole: Tensor) -> None:
        """Set this rank's part of the parameter to that of `whole`, before the model is handed over to DeepSpeed."""
        self.engine.load(param, local_part(param, whole, self.mesh.tp.size, self.mesh.tp.index))

    def engine_facts(self) -> dict[str, Any] | None:
        """Return {name, version, steps, traffic: {phase: {axis: {op: {calls, payload_bytes, wire_bytes}}}}}."""
        return self.engine.facts()


def make_rank(config: Config, env: RankEnv, store: Store, device: torch.device) -> Rank:
    """Return the rank of `env`, for the engine that optim.engine names."""
    if config.optim.engine == "deepspeed":
        return DeepSpeedRank(config, env, store, device)
    return Rank(config, env.rank, backends_of(config, env, store, device), device)


def backends_of(config: Config, env: RankEnv, store: Store, device: torch.device) -> Backends:
    """Return the factory of process groups, as the section `launch` of the configuration asks."""
    return make_backends(store, env, device, config.launch.timeout_s, config.launch.reads_memory)
