"""Training in fewer bytes: what is kept in which dtype, the loss's scale, averages in bf16, offloading, reductions.

Layouts are compared in float64 elsewhere; here they must train alike within the rounding of the dtype, and count as
declared.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_gpt.comm.mesh import Backends, FakeBackends
from dist_gpt.config.schema import Config
from dist_gpt.dryrun import dryrun_document
from dist_gpt.events import TRAIN, Counts
from dist_gpt.model.init import initial_weight
from dist_gpt.optim.loss_scale import LossScale
from dist_gpt.optim.low_precision_adamw import NarrowAdamW
from dist_gpt.optim.rules import Group
from dist_gpt.plan.count import count_comm, count_memory
from dist_gpt.plan.steps import RankPlan
from dist_gpt.replica import Rank
from dist_gpt.verify import verify_samples
from tests.ranks.test_optim import tiny
from tests.ranks.threads import on_gloo

CPU = torch.device("cpu")
STEPS = 8


def config_of(
    dtype: str, parallel: dict[str, int] | None = None, more: dict[str, Any] | None = None, **optim: Any
) -> Config:
    """A tiny GPT that trains with AdamW at a rate that moves it."""
    train = {"dtype": dtype, **(more or {})}
    return tiny(train=train, parallel=parallel, name="adamw", lr=0.03, decay="none", warmup=0, **optim)


def losses_of(config: Config, world: int = 1) -> list[float]:
    """Loss of each step, the same on all ranks; the accounting must be exact."""

    def body(number: int, backends: Backends) -> list[float]:
        rank = Rank(config, number, backends, CPU)
        rank.initialise()
        losses = []
        for step in range(STEPS):
            rank.train_step(step, verify_samples(config, step % 2))
            losses.append(rank.optimizer.statistics[0].item())
        declared = Counts()
        declared.merge(count_comm(rank.plan, rank.plan.steps), STEPS)
        assert rank.mesh.ledger.differences == [] and rank.mesh.ledger.counts(TRAIN).differences(declared) == []
        rank.close()
        return losses

    if world == 1:
        return body(0, FakeBackends())
    found = on_gloo(world, body)
    assert all(losses == found[0] for losses in found)
    return found[0]


@pytest.fixture(scope="module")
def exact() -> list[float]:
    losses = losses_of(config_of("fp64"))
    assert losses[-1] < 0.95 * losses[0]
    return losses


def near(losses: list[float], expected: list[float], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance * b for a, b in zip(losses, expected, strict=True))


LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "alone": (1, {}, {}),
    "zero1": (2, {"dp": 2}, {"sharding": "zero1"}),
    "zero2": (2, {"dp": 2}, {"sharding": "zero2"}),
    "zero3": (2, {"dp": 2}, {"sharding": "zero3"}),
    "tensor": (2, {"tp": 2}, {}),
    "pipeline and zero3": (4, {"dp": 2, "pp": 2}, {"sharding": "zero3"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02), ("fp16", 0.01)])
def test_every_layout_trains_as_float64_does(layout: str, dtype: str, tolerance: float, exact: list[float]) -> None:
    world, parallel, optim = LAYOUTS[layout]
    more = {"loss_scale": 1024.0} if dtype == "fp16" else {}
    losses = losses_of(config_of(dtype, parallel, more, **optim), world)
    assert near(losses, exact, tolerance), (losses, exact)
    assert dtype == "fp32" or not near(losses, exact, 1e-7), "nothing was rounded"


MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False, "tie_embeddings": False},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.012), ("fp16", 0.002)])
def test_every_gradient_is_within_its_roundings(dtype: str, tolerance: float, model: str) -> None:
    """At the same, rounded, weights; sums over 1,024 rows must not be made in 2 bytes."""

    def gradients(dtype: str) -> dict[str, Tensor]:
        sizes = {"seq_len": 128, "hidden_size": 64, **MODELS[model]}
        train = {"dtype": dtype, "global_batch": 8, "micro_batch": 4}
        rank = Rank(tiny(sizes, train, name="adamw", clip=0.0), 0, FakeBackends(), CPU)
        rank.initialise()
        for param in rank.params:  # rounded once: by way of fp16 some would come out otherwise
            rank.set_parameter(param, initial_weight(param, 0).bfloat16().float())
        found: dict[str, Tensor] = {}
        rank.optimizer.before_clip = lambda: found.update({n: g.double() for n, g in rank.whole_gradients().items()})
        scale = rank.optimizer.scale.applied().item() if rank.optimizer.scale is not None else 1.0
        rank.train_step(0, verify_samples(rank.config, 0))
        return {name: gradient / scale for name, gradient in found.items()}

    expected, found = gradients("fp32"), gradients(dtype)
    off = {name: ((found[name] - whole).norm() / whole.norm()).item() for name, whole in expected.items()}
    assert max(off.values()) < tolerance, sorted(off.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize(
    "optim",
    [
        {"state_dtype": "bf16"},
        {"reduce_dtype": "bf16"},
        {"reduce_dtype": "bf16", "sharding": "zero3"},
        {"reduce_dtype": "bf16", "sharding": "none"},
        {"grad_dtype": "bf16", "sharding": "zero2"},
        {"grad_dtype": "bf16", "state_dtype": "bf16", "offload": True, "sharding": "zero3"},
    ],
)
def test_choices_of_dtype(optim: dict[str, Any], exact: list[float]) -> None:
    config = config_of("bf16", {"dp": 2}, **{"sharding": "zero1", **optim})
    assert near(losses_of(config, 2), exact, 0.03)


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("sharding", ["none", "zero1", "zero3"])
def test_offloading_changes_no_bit(dtype: str, sharding: str) -> None:
    """Stepped elsewhere, by the same kernel."""
    here = losses_of(config_of(dtype, {"dp": 2}, sharding=sharding), 2)
    assert losses_of(config_of(dtype, {"dp": 2}, sharding=sharding, offload=True), 2) == here


MEMORY = [
    (dtype, grad, stage, offload)
    for dtype, grad in (("fp64", None), ("fp32", None), ("bf16", None), ("bf16", "bf16"), ("fp16", None))
    for stage in ("none", "zero1", "zero2", "zero3")
    for offload in (False, True)
]


RECOMPUTE = ("none", "full", "selective")
ENDS = (0, 3)
EVERY_MEMORY = [
    pytest.param(*cell, recompute, rank, marks=[pytest.mark.all_cells] if (number + turn) % 6 else [])
    for number, cell in enumerate(MEMORY)
    for turn, (rank, recompute) in enumerate(product(ENDS, RECOMPUTE))
]
"""Every combination; outside of `make test-all` each of MEMORY with one of RECOMPUTE on one of ENDS."""


@pytest.mark.parametrize(("dtype", "grad", "stage", "offload", "recompute", "rank"), EVERY_MEMORY)
def test_memory_is_counted_as_planned(
    dtype: str, grad: str | None, stage: str, offload: bool, recompute: str, rank: int
) -> None:
    more = {"recompute": recompute, "micro_batch": 1}
    config = config_of(dtype, {"dp": 2, "tp": 2}, more, sharding=stage, grad_dtype=grad, offload=offload)
    plan = RankPlan(config, rank)
    counted = dryrun_document(config, rank)
    assert counted["memory_bytes"] == count_memory(plan, plan.steps)
    assert counted["differences"] == []


@pytest.mark.parametrize(
    ("dtype", "grad", "per_parameter"),
    [
        ("bf16", None, {"none": (18, 0), "zero1": (6, 12), "zero2": (2, 16), "zero3": (0, 18)}),
        ("bf16", "bf16", {"none": (16, 0), "zero1": (4, 12), "zero2": (2, 14), "zero3": (0, 16)}),
        ("fp32", None, {"none": (16, 0), "zero1": (8, 8), "zero2": (4, 12), "zero3": (0, 16)}),
    ],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_of_state_are_the_textbooks(
    dtype: str, grad: str | None, per_parameter: dict[str, tuple[int, int]], ranks: int
) -> None:
    """Per parameter on each of N ranks, a whole part and one over N (arXiv:1910.02054, figure 1)."""
    for stage, (whole, shared) in per_parameter.items():
        config = config_of(dtype, {"dp": ranks}, sharding=stage, grad_dtype=grad)
        plan = RankPlan(config, 0)  # the first rank owns no padding
        padded = sum(b.padded for b in plan.buckets)
        found = count_memory(plan, plan.steps)
        state = found["parameters"] + found["gradients"] + found["optimizer"]
        assert state == whole * padded + shared * padded // ranks, stage


def gradients_of(config: Config, world: int) -> dict[str, Tensor]:
    """Whole final gradients of the first step, not scaled, as rank 0 has them."""

    def body(number: int, backends: Backends) -> dict[str, Tensor]:
        rank, found = Rank(config, number, backends, CPU), {}
        rank.initialise()

        def keep() -> None:
            scale = rank.optimizer.scale.applied().double() if rank.optimizer.scale is not None else 1.0
            found.update({name: g.double() / scale for name, g in rank.whole_gradients().items()})

        rank.optimizer.before_clip = keep
        rank.train_step(0, verify_samples(config, 0))
        rank.close()
        return found

    return body(0, FakeBackends()) if world == 1 else on_gloo(world, body)[0]


@pytest.mark.parametrize("layout", ["alone", "zero1", "zero2", "zero3", "tensor"])
@pytest.mark.parametrize(
    ("dtype", "optim"),
    [("bf16", {}), ("fp16", {}), ("bf16", {"reduce_dtype": "bf16"}), ("bf16", {"grad_dtype": "bf16"})],
)
def test_every_gradient_is_near_float64s(layout: str, dtype: str, optim: dict[str, Any]) -> None:
    """By parameter, in the 2-norm: a wrong factor on one bucket would not pass."""
    world, parallel, sets = LAYOUTS[layout]
    exact = gradients_of(config_of("fp64"), 1)
    found = gradients_of(config_of(dtype, parallel, **{**sets, **optim}), world)
    largest = max(gradient.norm() for gradient in exact.values())
    for name, gradient in found.items():
        whole = exact[name]
        if whole.shape != gradient.shape:  # rank 0's part of it
            continue
        assert (gradient - whole).norm() <= 0.03 * max(whole.norm(), 0.05 * largest), name


@pytest.mark.parametrize("layout", ["alone", "zero3", "pipeline and zero3"])
def test_what_is_scaled_is_unscaled(layout: str) -> None:
    """With SGD a wrong factor shows, which AdamW would hide; the scale changes every third step."""
    world, parallel, sets = LAYOUTS[layout]
    found = {}
    for dtype in ("fp64", "fp16"):
        train = {"dtype": dtype, "loss_scale": 256.0, "loss_scale_window": 3}
        config = tiny(train=train, parallel=parallel, name="sgd", lr=0.5, decay="none", warmup=0, **sets)
        found[dtype] = losses_of(config, world)
    assert found["fp64"][-1] < 0.97 * found["fp64"][0]
    assert near(found["fp16"], found["fp64"], 0.002), found


class TestLossScale:
    def test_halves_after_an_overflow_and_doubles_after_the_window(self) -> None:
        config = config_of("fp16", more={"loss_scale": 8.0, "loss_scale_window": 2})
        scale = LossScale(config, CPU)
        yes, no = torch.tensor(True), torch.tensor(False)
        seen = []
        for bad in (yes, yes, no, yes, no, no, no, no, yes, yes, yes, yes, yes, yes):
            scale.update(bad)
            seen.append(scale.value.item())
        assert seen == [4, 2, 2, 1, 1, 2, 2, 4, 2, 1, 1, 1, 1, 1]

    @pytest.mark.parametrize("parallel", [{}, {"dp": 2}, {"tp": 2}, {"pp": 2}])
    def test_an_overflow_is_seen_by_all_and_changes_nothing(self, parallel: dict[str, int]) -> None:
        config = config_of("fp16", parallel, {"loss_scale": 2.0**24})

        def body(number: int, backends: Backends) -> tuple[list[float], bool, bool]:
            rank = Rank(config, number, backends, CPU)
            rank.initialise()
            assert rank.optimizer.scale is not None
            before = {n: w.clone() for n, w in rank.whole_parameters().items()}
            scales, first = [], True
            for step in range(12):
                rank.train_step(step, verify_samples(config, 0))
                scales.append(rank.optimizer.scale.value.item())
                if step == 0:
                    first = all(torch.equal(w, before[n]) for n, w in rank.whole_parameters().items())
            moved = any(not torch.equal(w, before[n]) for n, w in rank.whole_parameters().items())
            rank.close()
            return scales, first, moved

        world = math.prod(parallel.values())
        found = [body(0, FakeBackends())] if world == 1 else on_gloo(world, body)
        scales, unchanged, moved = found[0]
        assert scales[0] == 2.0**23 and unchanged and moved
        assert scales[-1] < 2.0**24 and all(other[0] == scales and other[2] for other in found)

    def test_what_is_reported_is_not_scaled(self, exact: list[float]) -> None:
        norms = []
        for scale in (1.0, 4096.0):
            rank = Rank(config_of("fp16", more={"loss_scale": scale}), 0, FakeBackends(), CPU)
            rank.initialise()
            rank.train_step(0, verify_samples(rank.config, 0))
            norms.append(rank.optimizer.statistics[1].item())
            assert rank.optimizer.statistics[0].item() == pytest.approx(exact[0], rel=1e-3)
        assert norms[0] == pytest.approx(norms[1], rel=0.02)


class TestNarrow:
    def one(self, state_dtype: torch.dtype, grads: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(700_001, generator=generator))
        gradients = {parameter: torch.zeros_like(parameter, dtype=dtype)}
        rule = NarrowAdamW([Group((parameter,), 0.1)], gradients, (0.9, 0.95), 1e-8, state_dtype)
        for grad in grads:
            gradients[parameter].copy_(grad)
            rule.step(0.01, torch.tensor(2.0), None)
        return parameter.detach()

    def test_with_equal_dtypes_it_is_torchs(self) -> None:
        generator = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(700_001, generator=generator))
        grads = [torch.randn(700_001, generator=generator) for _ in range(4)]
        engine = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for grad in grads:
            parameter.grad = grad / 2
            engine.step()
        assert (self.one(torch.float32, grads) - parameter.detach()).abs().max() < 2e-6
        rough = self.one(torch.bfloat16, grads) - parameter.detach()
        assert 1e-5 < rough.abs().max() < 0.02

    def test_a_skipped_step_changes_nothing(self) -> None:
        parameter = torch.nn.Parameter(torch.ones(8))
        gradients = {parameter: torch.full((8,), math.nan)}
        rule = NarrowAdamW([Group((parameter,), 0.0)], gradients, (0.9, 0.95), 1e-8, torch.bfloat16)
        rule.step(0.01, None, torch.tensor(True))
        assert torch.equal(parameter.detach(), torch.ones(8))
        assert all(torch.isfinite(value).all() for value in rule.state[parameter].values())
        assert rule.state[parameter]["step"] == 0
