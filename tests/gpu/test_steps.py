"""Test training steps of one process on a GPU."""

from __future__ import annotations

import torch

from benchmarks.gpu_check.cases import tiny
from benchmarks.gpu_check.device import Cuda, Device, StandIn
from dist_gpt.comm.mesh import FakeBackends
from dist_gpt.comm.trace_buffer import Tape
from dist_gpt.config.schema import Config
from dist_gpt.events import SPAN
from dist_gpt.profile.recorder import make_timer
from dist_gpt.replica import Rank
from dist_gpt.verify import verify_samples

DEVICE = torch.device("cuda")


def device() -> Device:
    return Cuda() if DEVICE.type == "cuda" else StandIn()


def losses(config: Config, steps: int = 8) -> list[float]:
    """Check a model that sees the same batch in every step."""
    replica, found, batch = Rank(config, 0, FakeBackends(), DEVICE), [], verify_samples(config, 0)
    try:
        replica.initialise()
        for step in range(steps):
            replica.train_step(step, batch)
            found.append(replica.optimizer.statistics[0].item())
    finally:
        replica.close()
    return found


def test_the_loss_falls_in_every_precision() -> None:
    for dtype in ("fp64", "fp32", "bf16", "fp16"):
        for family in ("gpt2", "llama"):
            config = tiny(family, dtype, {"dropout": 0.1, "attention_dropout": 0.1}, optim={"lr": 0.01})
            found = losses(config)
            assert all(loss == loss for loss in found) and found[-1] < found[0], (family, dtype, found)


def test_narrow_averages_and_gradients_train() -> None:
    narrow = {"grad_dtype": "bf16", "state_dtype": "bf16", "lr": 0.01}
    found = losses(tiny(dtype="bf16", optim=narrow))
    assert found[-1] < found[0], found


def test_a_step_with_offloaded_state_is_the_same() -> None:
    plain = losses(tiny(dtype="bf16", optim={"lr": 0.01}), 4)
    offloaded = losses(tiny(dtype="bf16", optim={"lr": 0.01, "offload": True}), 4)
    assert max(abs(a - b) / a for a, b in zip(plain, offloaded, strict=True)) < 0.02


def test_the_host_waits_for_its_token_ids_and_for_nothing_else_in_a_step() -> None:
    config = tiny(dtype="bf16")
    replica, batch, here = Rank(config, 0, FakeBackends(), DEVICE), verify_samples(config, 0), device()
    try:
        replica.initialise()
        replica.train_step(0, batch)
        places = here.waits(lambda: replica.train_step(1, batch))
    finally:
        replica.close()
    assert all(place.startswith("dist_gpt/replica.py") for place in places), places
    assert sum(places.values()) <= 2 * config.micro_batches, places


def test_spans_of_the_window_have_times_in_their_order() -> None:
    config = tiny()
    replica, batch = Rank(config, 0, FakeBackends(), DEVICE), verify_samples(config, 0)
    ledger = replica.mesh.ledger
    try:
        replica.initialise()
        replica.train_step(0, batch)
        tape = Tape(make_timer(DEVICE), 0)
        for step in range(1, 3):
            ledger.begin(step)
            ledger.tape = tape
            tape.begin()
            replica.train_step(step, batch)
            ledger.tape = None
            tape.finish()
            spans = sorted(row for row in tape.rows(step) if row[0] == SPAN and row[2] >= 0)  # not reading data
            assert [row[2] for row in spans] == list(range(len(replica.plan.steps)))
            ends = [row[3] + row[4] for row in spans]
            assert all(row[4] >= 0 for row in spans), spans
            # An event's time is rounded to half a microsecond of the device's clock.
            assert all(row[3] >= end - 2_000 for row, end in zip(spans[1:], ends, strict=False)), spans
        ledger.end()
    finally:
        replica.close()
