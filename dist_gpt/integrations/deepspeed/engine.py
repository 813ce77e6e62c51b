"""DeepSpeed engine (optim.engine: deepspeed): ZeRO's stages and their communication are DeepSpeed's.

The model, its tensor-parallel collectives, batches, learning rates and initial weights are ours. DeepSpeed needs a
module that it calls, gradients in autograd, a default process group, and groups through an object with Megatron's names
for them. It communicates by itself: its traffic is not in our ledger but counted at its backend, see `optim.traffic`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dist_gpt.comm.global_groups import GlobalGroups
from dist_gpt.comm.mesh import Mesh
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config
from dist_gpt.events import EVAL, TRAIN
from dist_gpt.integrations.deepspeed.traffic import START, Traffic
from dist_gpt.model.gpt import Stage
from dist_gpt.parallel.executor import Batches, MicroBatch, Update
from dist_gpt.parallel.sink import AutogradSink
from dist_gpt.params import SHARDED, Param, params_of_blocks
from dist_gpt.plan.deepspeed import LIVE, PREFETCHED, bucket_elements, persistence_threshold
from dist_gpt.plan.precision import STAGES
from dist_gpt.plan.steps import RankPlan, calls_by_key
from dist_gpt.schedule.expand import BACKWARD, FORWARD, UPDATE
from dist_gpt.skips import CHANGE, DivergedError


def _imported() -> Any:
    """Import and return the package. Raise ConfigError if it is installed and cannot be imported."""
    try:
        import deepspeed
    except Exception as error:
        raise ConfigError([
            "optim.engine: got deepspeed, which is installed but cannot be imported "
            f"({type(error).__name__}: {error}); pip install --force-reinstall 'dist-gpt[deepspeed]', "
            "or set optim.engine=native"
        ]) from error  # fmt: skip
    return deepspeed


class DeepSpeedEngine:
    """Model of one rank under DeepSpeed. `load` sets parameters until `start`; from then on DeepSpeed owns them."""

    def __init__(self, config: Config, plan: RankPlan, mesh: Mesh, groups: GlobalGroups, device: torch.device) -> None:
        self.config, self.plan, self.mesh, self.device = config, plan, mesh, device
        blocks = tuple(b for _, chunk in plan.chunks for b in chunk)
        self.params = params_of_blocks(config, blocks)
        self.walk = Walk(plan, mesh)
        self.sink = AutogradSink()
        self.model = Model(Stage(config, blocks, mesh.tp, self.sink, self._new), blocks, self.walk)
        self.units = Units(mesh, groups)
        self.traffic = Traffic({id(self.units.data): "data", id(self.units.model): "tp"}, mesh.ledger.sizes)
        self.engine: Any = None
        self.steps = 0

    def _new(self, param: Param) -> Parameter:
        shape = param.local_shape(self.mesh.tp.size, self.mesh.tp.index)
        parameter = Parameter(torch.empty(shape, dtype=torch.float32, device=self.device))
        if param.kind == SHARDED and self.mesh.tp.size > 1:
            parameter.model_parallel = True  # type: ignore[attr-defined]  # its norm counts on every tp rank
        return parameter

    def load(self, param: Param, part: Tensor) -> None:
        """Set `param` to `part`, of this tp rank's shape. Raise RuntimeError after `start`."""
        if self.engine is not None:
            raise RuntimeError(f"{param.name} cannot be set any more: DeepSpeed owns its parts")
        with torch.no_grad():
            self.model.stage.named[param.name].copy_(part)

    def start(self) -> None:
        """Hand the model over to DeepSpeed; to be called by all ranks together."""
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)  # else it probes for one, and prints the result
        deepspeed = _imported()
        # DeepSpeed calls torch's collectives by the names they had before torch 2.13
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        self._watch()
        with self.traffic.during(START):
            # without a learning-rate scheduler: the rate is set before every step
            self.engine, *_ = deepspeed.initialize(
                model=self.model, optimizer=self._optimizer(), config=engine_config(self.config, self.device),
                mpu=self.units, dist_init_required=False,
            )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """Return name, version, training steps, and traffic by phase, axis and operation."""
        return {
            "name": "DeepSpeed", "version": version("deepspeed"), "steps": self.steps,
            "traffic": self.traffic.document(),
        }  # fmt: skip

    def _watch(self) -> None:
        """Make DeepSpeed use the existing global group, and count every call of its communication backend."""
        import deepspeed.comm.comm as seam

        compile_nothing()
        seam.init_distributed("nccl" if self.device.type == "cuda" else "gloo", auto_mpi_discovery=False)
        seam.cdb = self.traffic.watch(seam.cdb)

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return torch's optimizer, as in the native engine: nothing to compile, and both engines step alike."""
        o = self.config.optim
        named = self.model.stage.named
        groups = [
            {"params": [named[p.name] for p in self.params if p.decay == decay], "weight_decay": rate}
            for decay, rate in ((True, o.weight_decay), (False, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        if o.name == "sgd":
            return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum)
        return torch.optim.AdamW(groups, lr=o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps, fused=True)

    def close(self) -> None:
        """Release DeepSpeed's state in this process."""
        if self.engine is None:
            return
        import deepspeed.comm.comm as seam
        from deepspeed.utils import groups

        self.engine.destroy()
        self.engine = None
        groups._release_process_group_references(group=None)
        seam.cdb = None


def compile_nothing() -> None:
    """Switch off DeepSpeed's shared-memory operation, before its communication starts in this process.

    Only inference calls it. It would be compiled at the first use, which takes minutes, and a process that is killed
    meanwhile leaves a lock on which all later ones wait forever.
    """
    from deepspeed.ops import __compatible_ops__ as buildable

    buildable["deepspeed_shm_comm"] = False


def engine_config(config: Config, device: torch.device) -> dict[str, Any]:
    """Return DeepSpeed's own configuration."""
    o, t, dtype = config.optim, config.train, config.train.dtype
    elements = bucket_elements(config)
    zero: dict[str, Any] = {
        "stage": STAGES[o.sharding], "overlap_comm": device.type == "cuda",
        "reduce_bucket_size": elements, "allgather_bucket_size": elements,
    }  # fmt: skip
    if o.sharding == "zero3":  # matrices are sharded, vectors stay whole
        zero |= {
            "stage3_param_persistence_threshold": persistence_threshold(config),
            "stage3_prefetch_bucket_size": PREFETCHED,
            "stage3_max_live_parameters": LIVE,
        }
    if o.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    found: dict[str, Any] = {
        "train_batch_size": t.global_batch,
        "train_micro_batch_size_per_gpu": t.micro_batch,
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": o.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled
        "steps_per_print": None,
    }
    if dtype == "bf16":
        found |= {
            "bf16": {"enabled": True, "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return found


class Units:
    """Our groups under the names by which DeepSpeed asks for them (Megatron's)."""

    def __init__(self, mesh: Mesh, groups: GlobalGroups) -> None:
        self.mesh = mesh
        self.data = groups.group("data", mesh.data.ranks)
        self.model = groups.group("tp", mesh.tp.ranks)

    def get_data_parallel_group(self) -> Any:
        """Return the process group of this rank's data axis."""
        return self.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Return the global ranks of this rank's data group."""
        return list(self.mesh.data.ranks)

    def get_data_parallel_world_size(self) -> int:
        """Return the number of data ranks."""
        return self.mesh.data.size

    def get_data_parallel_rank(self) -> int:
        """Return the index of this rank in its data group."""
        return self.mesh.data.index

    def get_model_parallel_group(self) -> Any:
        """Return the process group of this rank's tp axis."""
        return self.model

    def get_model_parallel_world_size(self) -> int:
        """Return the number of tp ranks."""
        return self.mesh.tp.size

    def get_model_parallel_rank(self) -> int:
        """Return the index of this rank in its tp group."""
        return self.mesh.tp.index


class Walk:
    """Position in the step list, reported to the ledger.

    Forward entries are entered one by one; backward entries one after the other as autograd reaches their blocks.
    """

    def __init__(self, plan: RankPlan, mesh: Mesh) -> None:
        self.ledger = mesh.ledger
        self._at = {
            (phase, step.kind, step.block, step.action.micro_batch): (
                step,
                calls_by_key(plan.declare(step).comm),
                index,
            )
            for phase, steps in ((TRAIN, plan.steps), (EVAL, plan.eval_steps))
            for index, step in enumerate(steps)
        }
        self._open = ExitStack()

    @contextmanager
    def entry(self, phase: str, kind: str, block: int | None, micro_batch: int) -> Iterator[None]:
        """Report this entry of the list as running while inside the context."""
        with self.ledger.step(phase, *self._at[phase, kind, block, micro_batch]):
            yield

    def enters(self, block: int, micro_batch: int) -> None:
        """End the backward that runs, if any, and begin that of `block`."""
        self._open.close()
        self._open.enter_context(self.entry(TRAIN, BACKWARD, block, micro_batch))

    def leaves(self) -> None:
        """End the backward of a micro-batch."""
        self._open.close()


class Model(nn.Module):
    """Module that DeepSpeed calls: all blocks in one forward."""

    def __init__(self, stage: Stage, blocks: tuple[int, ...], walk: Walk) -> None:
        super().__init__()
        self.stage, self.blocks, self.walk = stage, blocks, walk

    def forward(self, micro: MicroBatch, m: int) -> Tensor:
        """Return the loss of micro-batch number `m`, scaled as in the native engine."""
        phase = TRAIN if micro.training else EVAL
        x: Tensor | None = None
        for block in self.blocks:
            with self.walk.entry(phase, FORWARD, block, m):
                x = self.stage(block, x, micro)
            if x.requires_grad:
                x.register_hook(self._backward_of(block, m))
        assert x is not None
        return x

    def _backward_of(self, block: int, m: int) -> Callable[[Tensor], None]:
        def entered(gradient: Tensor) -> None:
            self.walk.enters(block, m)

        return entered


class DeepSpeedExecutor:
    """Counterpart of `parallel.executor.Executor` that leaves the steps from reduction to gather to DeepSpeed."""

    def __init__(self, parts: DeepSpeedEngine) -> None:
        self.parts, self.plan, self.walk = parts, parts.plan, parts.walk
        self.loss = torch.zeros((), device=parts.device)

    def train(self, batch: Batches, update: Update) -> Tensor:
        """Run one training step, with `update` called on the loss after the last backward; return the loss part."""
        engine, last = self.parts.engine, self.plan.config.micro_batches - 1
        self.loss = torch.zeros_like(self.loss)
        with self.parts.traffic.during(TRAIN):
            for m in range(last + 1):
                with self.walk.ledger.reading():
                    micro = batch(m)
                loss = engine(micro, m)
                self.loss += loss.detach()
                # our loss is already a part of the mean: undo DeepSpeed's mean over data ranks, and leave out its mean
                # over micro-batches
                engine.backward(loss * self.plan.layout.data, scale_wrt_gas=False)
                self.walk.leaves()
                if m < last:
                    engine.step()  # counts the micro-batch
            with self.walk.entry(TRAIN, UPDATE, None, 0):
                update(self.loss)
        self.parts.steps += 1
        return self.loss

    def refresh(self) -> None:
        """Do nothing: DeepSpeed gathers what it has stepped at once, or block by block."""

    def evaluate(self, batch: Batches) -> Tensor:
        """Run the forwards of one validation batch; return this rank's part of the summed loss."""
        engine = self.parts.engine
        self.loss = torch.zeros_like(self.loss)
        engine.eval()
        with torch.no_grad(), self.parts.traffic.during(EVAL):
            for m in range(self.plan.config.micro_batches):
                self.loss += engine(batch(m), m)
        engine.train()
        return self.loss


class DeepSpeedOptimizer:
    """Optimizer that steps the engine; `statistics` and `stop_votes` are set as by `optim.adamw.Optimizer`."""

    def __init__(self, parts: DeepSpeedEngine) -> None:
        self.parts, self.mesh = parts, parts.mesh
        self.scale = None
        self.statistics = torch.zeros(2, dtype=torch.float64)
        self.stop_votes = torch.zeros((), dtype=torch.float64)
        self.wants_stop: Callable[[], object] = lambda: False

    def step(self, rate: float, loss: Tensor) -> None:
        """Update the weights with learning rate `rate`; `loss` is this rank's part of the summed loss.

        Raise DivergedError if DeepSpeed has stepped with a loss or norm that is not finite: the weights are lost.
        """
        engine = self.parts.engine
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        squared = self._squared_norm_here() if not STAGES[self.parts.config.optim.sharding] else None
        engine.step()
        if squared is None:  # equal on all ranks
            norm = float(engine.get_global_grad_norm())
            squared = loss.new_full((), norm * norm if self.mesh.rank == 0 else 0.0, dtype=torch.float64)
        vote = loss.new_full((), 1.0 if self.wants_stop() else 0.0, dtype=torch.float64)
        sums = torch.stack((loss.double(), squared, vote))
        self.mesh.world.all_reduce(sums).wait()
        self.statistics, self.stop_votes = sums[:2], sums[2]
        self.statistics[1] = self.statistics[1].sqrt()
        if engine.was_step_applied() and not torch.isfinite(self.statistics).all():
            raise DivergedError(
                f"the loss ({self.statistics[0].item()}) or the gradient norm ({self.statistics[1].item()}) is not "
                f"finite, and DeepSpeed has updated the weights with it: they are lost. {CHANGE}; optim.engine: native "
                "changes no weight in such a step",
                CHANGE,
            )

    def _squared_norm_here(self) -> Tensor:
        """Return this rank's part of the squared norm of gradients that are whole on every data rank.

        The sum over the world counts every element once. DeepSpeed computes this norm only if it clips, and does not
        return it.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.parts.device)
        if self.mesh.data.index != 0:
            return total
        for param in self.parts.params:
            if param.kind == SHARDED or self.mesh.tp.index == 0:
                gradient = self.parts.model.stage.named[param.name].grad
                if gradient is not None:
                    total += torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()
        return total
