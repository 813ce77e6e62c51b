"""Train a step of each case on the pretended device, in a process of its own: the registration of a device lasts.

Standard input holds JSON lines {"name", "config", "rank", "plant"}; standard output gets a line for each: {"name",
"rank", "step", "evaluation", "statistics"}, or {"name", "rank", "error"}. `plant` puts a fault into the clipping first:
`item` and `mask` need a number of the device, `copy` brings one to the host, `cpu` uses a tensor of the CPU.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_check.pretended import observe
from dist_gpt.config.schema import Config
from dist_gpt.optim import optimizer
from dist_gpt.optim.grad_norm import clip_divisor


def reads_a_number(norm: Tensor, limit: float) -> Tensor:
    return clip_divisor(norm, limit) if norm.item() > 0 else norm


def stays_on_the_cpu(norm: Tensor, limit: float) -> Tensor:
    return clip_divisor(norm, limit) * torch.ones(1)[0:1]


def copies_to_the_host(norm: Tensor, limit: float) -> Tensor:
    return clip_divisor(norm, limit) * norm.cpu().to(norm.device)


def reads_a_mask(norm: Tensor, limit: float) -> Tensor:
    return clip_divisor(norm, limit) * norm.view(1)[norm.view(1) > 0].sum()


PLANTS = {"item": reads_a_number, "cpu": stays_on_the_cpu, "copy": copies_to_the_host, "mask": reads_a_mask}


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    if fault is None:
        yield
        return
    with mock.patch.object(optimizer, "clip_divisor", PLANTS[fault]):
        yield


def run(case: dict[str, Any]) -> dict[str, Any]:
    names = {"name": case["name"], "rank": case["rank"]}
    try:
        with planted(case.get("plant")):
            found = observe(Config.model_validate(case["config"]), case["rank"])
    except Exception:
        return {**names, "error": traceback.format_exc()[:6000]}
    return {**names, **{part: f.document() for part, f in found.items()}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
