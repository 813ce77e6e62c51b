"""One rank of each peer on the plain PyTorch GPT: DeepSpeed's ZeRO, PyTorch's fully_shard, and the ideal.

The ideal is one rank's share of the work without communication. Imports that only one peer needs happen in its process.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from benchmarks.products import share_products, stand_as_ours
from benchmarks.workers import TIMEOUT_S, Build, Order, Side, copy_our_weights, nothing_sent
from tests.reference.plain_gpt import Batch, PlainConfig, PlainGPT


@dataclass(frozen=True)
class Work:
    """Work of this rank in a step."""

    tree: dict[str, Any]
    rank: int
    ranks: int

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches per rank and step."""
        train = self.tree["train"]
        return int(train["global_batch"] // (self.ranks * train["micro_batch"]))

    @property
    def clip(self) -> float:
        """Largest gradient norm."""
        return float(self.tree["optim"]["clip"])

    def batches(self, ids: np.ndarray) -> Iterator[Batch]:
        """Yield this rank's micro-batches (tokens, targets), each (B, T), of the global batch (samples, T + 1)."""
        size = self.tree["train"]["micro_batch"]
        first = self.rank * self.micro_batches * size
        for start in range(first, first + self.micro_batches * size, size):
            part = torch.from_numpy(ids[start : start + size])
            yield part[:, :-1], part[:, 1:]

    def model(self) -> PlainGPT:
        """Return the plain GPT with our initial weights."""
        model = PlainGPT(PlainConfig.of(SimpleNamespace(**self.tree["model"])))
        copy_our_weights(self.tree, model.named_weights())
        return model

    def optimizer(self, matrices: list[Parameter], vectors: list[Parameter]) -> torch.optim.Optimizer:
        """Return a fused AdamW in which only `matrices` decay."""
        o = self.tree["optim"]
        groups = [{"params": matrices, "weight_decay": o["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=o["lr"], betas=(o["betas"][0], o["betas"][1]), eps=o["eps"], fused=True)

    def optimizer_of(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters that `model` holds now."""
        held = list(model.parameters())
        return self.optimizer([p for p in held if p.ndim >= 2], [p for p in held if p.ndim < 2])


def work_of(order: Order) -> Work:
    """Return the work of the rank that the environment names."""
    return Work(order.tree, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def connect() -> None:
    """Create the global process group that both peers need, on torch's own gloo."""
    from dist_gpt.comm.rendezvous import connect_store, rank_env

    stand_as_ours()
    env = rank_env(TIMEOUT_S)
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", store=connect_store(env), rank=env.rank, world_size=env.world, timeout=timeout)


def leave() -> None:
    """Close the process group after a barrier, since rank 0 holds the store."""
    dist.barrier()
    dist.destroy_process_group()


def count(run: Callable[[], object]) -> dict[str, float]:
    """Return the bytes that leave this rank while `run` runs, by operation."""
    from benchmarks.traffic import Traffic

    with Traffic(dist.get_world_size()) as traffic:
        run()
    return dict(traffic.sent)


# --- the ideal ----------------------------------------------------------------------------------------------------


def share() -> tuple[Build, Callable[[], None]]:
    """Return how to build the ideal, and how to end it.

    It runs one rank's micro-batches through the plain GPT and updates the fraction `options["part"]` of every parameter
    (1 / ranks if the optimizer's state is sharded). No rank can do less. Nothing is communicated.
    """
    stand_as_ours()
    return _share, lambda: None


def _share(order: Order) -> Side:
    work = work_of(order)
    model = work.model()
    weights = list(model.parameters())
    sizes = [max(1, int(weight.numel() * order.options["part"])) for weight in weights]
    pieces = [Parameter(w.detach().view(-1)[:size]) for w, size in zip(weights, sizes, strict=True)]
    matrices = [piece for piece, weight in zip(pieces, weights, strict=True) if weight.ndim >= 2]
    vectors = [piece for piece, weight in zip(pieces, weights, strict=True) if weight.ndim < 2]
    optimizer = work.optimizer(matrices, vectors)

    def step(number: int, ids: np.ndarray, mode: str) -> float:
        total = 0.0
        for tokens, targets in work.batches(ids):
            loss = model(tokens, targets) / work.micro_batches
            loss.backward()
            total += loss.item()
        for piece, weight, size in zip(pieces, weights, sizes, strict=True):
            assert weight.grad is not None
            piece.grad = weight.grad.view(-1)[:size]
        torch.nn.utils.clip_grad_norm_(pieces, work.clip).item()
        optimizer.step()
        for piece, weight in zip(pieces, weights, strict=True):
            piece.grad = weight.grad = None
        return total

    return Side(step, nothing_sent)


# --- fully_shard --------------------------------------------------------------------------------------------------


def fully_sharded() -> tuple[Build, Callable[[], None]]:
    """Return how to build fully_shard (FSDP2), and how to end it.

    Options: `layers` per group, parameters `kept` gathered until the update or not, and `true_reduce_scatter`.
    """
    connect()
    return _fully_sharded, leave


def _fully_sharded(order: Order) -> Side:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    from benchmarks.traffic import TrueReduceScatter

    work, options = work_of(order), order.options
    model: Any = work.model()
    layers, kept = list(model.layers), options["kept"]
    for first in range(0, len(layers), options["layers"]):
        fully_shard(layers[first : first + options["layers"]], reshard_after_forward=not kept)
    fully_shard(model)  # the embedding, which the head shares, and the rest
    if options["true_reduce_scatter"]:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(TrueReduceScatter())
    optimizer = work.optimizer_of(model)

    def step(number: int, ids: np.ndarray, mode: str) -> float:
        total = 0.0
        for index, (tokens, targets) in enumerate(work.batches(ids)):
            last = index == work.micro_batches - 1
            model.set_is_last_backward(last)
            if kept:
                model.set_reshard_after_backward(last)
            loss = model(tokens, targets) / work.micro_batches
            loss.backward()
            total += loss.item()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), work.clip)
        norm.full_tensor().item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return Side(step, count)


# --- DeepSpeed ----------------------------------------------------------------------------------------------------


def deepspeed() -> tuple[Build, Callable[[], None]]:
    """Return how to build DeepSpeed's engine with torch's fused AdamW, and how to end it.

    Options: those of `deepspeed_document`, and `true_reduce_scatter`.
    """
    connect()
    return _deepspeed, leave


def deepspeed_document(work: Work, options: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's own configuration.

    Options: `stage`, elements in a `bucket`, and for stage 3 elements that may be `live` (gathered) at a time.
    """
    bucket = options["bucket"]
    zero = {"stage": options["stage"], "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if options["stage"] == 3:
        live = options["live"]
        zero |= {
            "stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
        }  # fmt: skip
    return {
        "train_micro_batch_size_per_gpu": work.tree["train"]["micro_batch"],
        "gradient_accumulation_steps": work.micro_batches,
        "gradient_clipping": work.clip,
        "steps_per_print": 1 << 30,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _deepspeed(order: Order) -> Side:
    import deepspeed as engines

    from benchmarks.traffic import patch_reduce_scatter
    from dist_gpt.integrations.deepspeed.engine import compile_nothing

    options, work = order.options, work_of(order)
    compile_nothing()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if options["true_reduce_scatter"]:
        patch_reduce_scatter()
    engines.init_distributed("gloo", verbose=False)
    model = work.model()
    engine, *_ = engines.initialize(
        model=model, optimizer=work.optimizer_of(model), config=deepspeed_document(work, options),
        dist_init_required=False,
    )  # fmt: skip
    share_products()  # stage 3 has replaced the function by its own
    if options["true_reduce_scatter"] and options["stage"] in (1, 2):
        scatter_truly(engine.optimizer)

    def step(number: int, ids: np.ndarray, mode: str) -> float:
        total = 0.0
        for tokens, targets in work.batches(ids):
            loss: Tensor = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
            total += loss.item() / work.micro_batches
        norm = engine.get_global_grad_norm()
        float(norm if norm is not None else 0.0)  # stage 0 clips without reporting the norm
        return total

    def close() -> None:
        engine.destroy()
        gc.collect()

    return Side(step, count, close)


def scatter_truly(optimizer: Any) -> None:
    """Make ZeRO stages 1 and 2 exchange the slices of a bucket all to all and sum them, instead of an all-reduce.

    The rest of their work on a bucket stays as it is.
    """
    from benchmarks.traffic import scatter_slices

    def scatter(bucket: Any, *rest: Any, process_group: Any = None, **more: Any) -> None:
        group = optimizer.dp_process_group if process_group is None else process_group
        here = dist.get_rank(group)
        slices = [(next(iter(owners)), part) for owners, part, _ in bucket]
        sums = iter(scatter_slices(slices, group))
        for (owner, part), (_, _, output) in zip(slices, bucket, strict=True):
            if owner == here:
                summed = next(sums).view_as(part)
                optimizer._add_to_grad_partition_buffer(output, summed)
                part.copy_(summed)

    optimizer.allreduce_and_scatter = scatter
