"""What `dist-gpt verify` runs instead of a large configuration: small, legal, and with the same options in play."""

from __future__ import annotations

import pytest

from dist_gpt.config.load import load
from dist_gpt.config.problems import problems
from dist_gpt.plan.count import total_parameters
from dist_gpt.plan.shrink import MAX_WORLD, certificate_config
from dist_gpt.plan.steps import RankPlan

CASES = {
    "gpt2 over 16": ("gpt2-355m", ["parallel.dp=4", "parallel.tp=2", "parallel.pp=2", "train.global_batch=64",
                                   "train.micro_batch=8"]),
    "zero3, bf16": ("llama-8b", ["parallel.dp=4", "parallel.tp=4", "parallel.pp=1", "train.global_batch=64",
                                 "optim.sharding=zero3", "optim.reshard=step", "train.dtype=bf16",
                                 "optim.grad_dtype=bf16", "optim.state_dtype=bf16", "train.recompute=full"]),
    "inside nodes": ("gpt2-124m", ["parallel.dp=16", "parallel.tp=1", "parallel.pp=1", "train.global_batch=128",
                                   "train.micro_batch=8", "launch.nodes=4", "optim.sharding=zero2",
                                   "optim.shard_group=node"]),
    "interleaved": ("gpt2-355m", ["parallel.dp=2", "parallel.pp=4", "parallel.schedule=interleaved",
                                  "parallel.virtual_stages=2", "train.global_batch=64", "train.micro_batch=8",
                                  "optim.sharding=zero3", "train.recompute=selective"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_small_legal_and_the_same_in_kind(case: str) -> None:
    name, sets = CASES[case]
    config = load(name, sets)
    small, notes = certificate_config(config, False, total_parameters(config))
    assert problems(small) == [] and small.world_size <= MAX_WORLD and total_parameters(small) < 3_000_000
    assert small.train.dtype == "fp64" and any(note.startswith("train.dtype") for note in notes)
    assert (small.optim.grad_dtype, small.optim.state_dtype, small.optim.reduce_dtype) == (None, None, None)
    for key in ("sharding", "reshard", "shard_group"):
        assert getattr(small.optim, key) == getattr(config.optim, key)
    assert small.train.recompute == config.train.recompute
    was, now = RankPlan(config, 0), RankPlan(small, 0)
    assert (now.stage, now.replicas > 1) == (was.stage, was.replicas > 1)


def test_what_is_changed_is_said() -> None:
    config = load(*CASES["zero3, bf16"])
    _, notes = certificate_config(config, False, total_parameters(config))
    assert {"train.dtype bf16 -> fp64", "optim.grad_dtype bf16 -> null", "optim.state_dtype bf16 -> null"} <= set(notes)


def test_every_change_is_said() -> None:
    config = load("demo")
    small, notes = certificate_config(config, True, total_parameters(config))
    said = {note.split()[0] for note in notes}
    for section in ("model", "parallel", "optim", "train", "launch"):
        was, now = getattr(config, section).model_dump(), getattr(small, section).model_dump()
        assert {f"{section}.{key}" for key in was if was[key] != now[key]} <= said
    assert {"optim.warmup", "launch.backend", "train.dtype"} <= said
