"""Test what must hold of the plan's memory with optim.engine deepspeed, for any model."""

from __future__ import annotations

import pytest

from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.plan.api import plan_document, plan_text
from dist_gpt.plan.deepspeed import LIVE, DeepSpeedMemory, state_bytes

MODELS = {"gpt2-124m": [], "gpt2-1.5b": [], "llama-8b": ["parallel.tp=4", "parallel.sequence_parallel=false"]}
STAGES = ("zero1", "zero2", "zero3")


def planned(model: str, world: int, *sets: str) -> dict[str, int]:
    return plan_document(config(model, world, *sets))["memory_bytes"]


def config(model: str, world: int, *sets: str) -> Config:
    fixed = ["optim.engine=deepspeed", "launch.nodes=1", "train.micro_batch=1"]
    return load(model, [*fixed, *MODELS[model], *sets], world)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [8, 64])
def test_a_higher_stage_holds_no_more_state(model: str, dtype: str, world: int) -> None:
    states = [
        state_bytes(DeepSpeedMemory(config(model, world, f"optim.sharding={stage}", f"train.dtype={dtype}"), 0, 0, 0))
        for stage in STAGES
    ]
    assert states[0] >= states[1] >= states[2] > 0
    whole = 20 * DeepSpeedMemory(config(model, world), 0, 0, 0).whole
    assert states[0] <= whole * 1.001


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_plan_is_bounded_by_the_model(model: str, dtype: str) -> None:
    """No moment holds more than state, two whole copies of the gradients, gathered parameters and activations."""
    for stage in STAGES:
        sets = (f"optim.sharding={stage}", f"train.dtype={dtype}")
        memory, held = planned(model, 8, *sets), DeepSpeedMemory(config(model, 8, *sets), 0, 0, 0)
        buckets = 8 * held.bucket * 4
        assert memory["buffers"] <= 2 * 4 * held.whole + buckets
        assert memory["peak"] == sum(memory[part] for part in memory if part not in ("peak", "host"))
        assert state_bytes(held) <= memory["peak"] + held.gradients


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stage_3_shrinks_with_the_ranks_and_buffers_do_not_grow(dtype: str) -> None:
    few, many = (planned("gpt2-1.5b", world, "optim.sharding=zero3", f"train.dtype={dtype}") for world in (8, 64))
    for part in ("gradients", "optimizer"):
        assert many[part] == pytest.approx(few[part] / 8, rel=0.001)
    assert many["buffers"] <= few["buffers"]


def test_gathered_parameters_stop_where_deepspeed_stops() -> None:
    """Of Llama's 8 billion parameters, at most LIVE elements and one more parameter are gathered at once, in bf16."""
    held = DeepSpeedMemory(config("llama-8b", 64, "parallel.tp=1", "optim.sharding=zero3"), 0, 0, 0)
    gathered, ahead = held._gathered
    assert held.whole > 8e9
    assert 2 * LIVE <= gathered <= 2 * (LIVE + held.largest)
    assert ahead < gathered


def test_offload_moves_the_state_to_the_host() -> None:
    for stage in STAGES:
        here, away = (
            planned("gpt2-1.5b", 8, f"optim.sharding={stage}", f"optim.offload={offload}")
            for offload in ("false", "true")
        )
        assert away["optimizer"] == here["host"] == 0
        assert away["host"] >= here["optimizer"] > 0


def test_the_worst_rank_is_a_data_rank_that_owns_a_parameter_on_a_border() -> None:
    """In fp32, stage 2 keeps the gradients of all parameters of which a rank steps a part."""
    given = config("gpt2-124m", 8, "train.dtype=fp32", "optim.sharding=zero2")
    totals = DeepSpeedMemory(given, 0, 0, 0).owned_by_rank()
    assert plan_document(given)["peak_rank"] == totals.index(max(totals))
    assert sum(totals) > 124_439_808 and max(totals) < 124_439_808


def test_the_plan_says_that_every_rank_begins_with_the_whole_model() -> None:
    given = config("gpt2-124m", 8, "optim.sharding=zero3")
    document = plan_document(given)
    assert "start: before the first step every rank holds all its parameters in float32, 0.498 GB" in document["notes"]
    assert "0.498 GB" in plan_text(document, given)
