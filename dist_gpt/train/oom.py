"""Explain an out-of-memory error: which rank, what it needs by category, and which settings would need less.

The categories are the plan's, as in the dry run; temporary memory of kernels is in none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dist_gpt.config.problems import problems
from dist_gpt.config.schema import Config
from dist_gpt.plan.count import count_memory
from dist_gpt.plan.steps import RankPlan
from dist_gpt.plan.text import size

SHOWN = 4
SPARE = 0.9
"""Fraction of a device's memory that counted bytes may take: kernels and the allocator need the rest."""
_WORDS = ("can't allocate memory", "out of memory", "not enough memory")


class OutOfMemoryError(RuntimeError):
    """Error of a rank that ran out of memory; the text says what would fit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is an allocator's out-of-memory error."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def explain(
    config: Config, rank: int, error: BaseException, limit: int | None, held: Mapping[str, int] | None = None
) -> OutOfMemoryError:
    """Return the error to raise instead of `error`.

    `limit` is the GPU's memory in bytes, None on a CPU. `held`: bytes by category at the time of the error, None if the
    model was not built yet.
    """
    backend = "gloo" if limit is None else "nccl"  # NCCL needs no receive buffers
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"backend": backend})})
    plan = RankPlan(config, rank)
    counted = count_memory(plan, plan.steps)
    there = _listed(held) + ", plus activations and temporaries" if held else "less than the whole model"
    lines = [
        f"rank {rank} ({plan.coords}) ran out of memory: {' '.join(str(error).split())[:300]}",
        f"  held at the time of the error: {there}",
        f"  planned peak of this rank: {_listed(counted)}; in total {size(counted['peak'])}"
        + (f" of {size(limit)}" if limit else "")
        + ", plus temporaries of kernels",
    ]
    fitting = sorted(_alternatives(config, rank, counted["peak"], limit is not None), key=lambda found: found[1])
    room = int(SPARE * limit) if limit else counted["peak"]
    fits = [f"  {what}: {size(peak)}" for what, peak in fitting if peak <= room]
    if fits:
        lines += ["  would fit:" if limit else "  would need less:", *fits[:SHOWN]]
    else:
        lines.append(
            "  no single setting is enough: use more ranks, or combine recompute, zero3, offload and micro_batch: 1"
        )
    return OutOfMemoryError("\n".join(lines))


def _alternatives(config: Config, rank: int, peak: int, on_gpu: bool) -> Iterator[tuple[str, int]]:
    """Yield `--set` options for the same training in less memory, with the peak in bytes of each."""
    for sets in _sets(config, on_gpu):
        changed = config
        for key, value in sets.items():
            section, name = key.split(".")
            part = getattr(changed, section).model_copy(update={name: value})
            changed = changed.model_copy(update={section: part})
        if changed == config or problems(changed):
            continue
        plan = RankPlan(changed, rank)
        needed = count_memory(plan, plan.steps)["peak"]
        if needed < peak:
            yield " ".join(f"--set {key}={str(value).lower()}" for key, value in sets.items()), needed


def _sets(config: Config, on_gpu: bool) -> Iterator[dict[str, Any]]:
    t = config.train
    best: dict[str, Any] = {"optim.sharding": "zero3", "train.recompute": "full"}
    yield {"train.recompute": "selective"}
    yield {"train.recompute": "full"}
    for stage in ("zero1", "zero2", "zero3"):
        yield {"optim.sharding": stage}
    if on_gpu:
        yield {"optim.offload": True}  # on a CPU, host memory is the same memory
    if t.micro_batch > 1:
        yield {"train.micro_batch": t.micro_batch // 2}
        best["train.micro_batch"] = 1
    yield best
    if on_gpu:
        yield {**best, "optim.offload": True}


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(held)}" for name, held in sizes.items() if held and name not in ("peak", "host"))


def device_bytes(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory; None on a CPU, whose memory other processes share."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
