"""The update: learning rate, clipping, decay groups, AdamW and SGD against torch, steps that are skipped, the sink."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from dist_gpt.comm.mesh import Backends, FakeBackends
from dist_gpt.config.load import resolve
from dist_gpt.config.problems import problems
from dist_gpt.config.schema import Config
from dist_gpt.events import TRAIN, Counts
from dist_gpt.model.init import local_part
from dist_gpt.optim.grad_norm import clip_divisor
from dist_gpt.optim.lr import learning_rate
from dist_gpt.params import parameter_table
from dist_gpt.plan.count import count_comm
from dist_gpt.replica import Rank
from tests.ranks.threads import on_gloo

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {
        **{"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False, "tie_embeddings": False},
        "num_kv_heads": 2,
    },
}


def tiny(
    model: dict[str, Any] | None = None, train: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None, **optim: Any,
) -> Config:  # fmt: skip
    """A model of two layers in float64."""
    sizes = {"num_layers": 2, "hidden_size": 8, "num_heads": 4, "seq_len": 6, "vocab_size": 13}
    config = resolve(
        Config.model_validate({
            "model": {**sizes, **(model or {})},
            "train": {"steps": 10, "global_batch": 4, "dtype": "fp64", **(train or {})},
            "parallel": {"dp": 1, **(parallel or {})},
            "optim": optim,
            "data": {"source": "synthetic"},
        })
    )  # fmt: skip
    assert problems(config) == []
    return config


def single(config: Config) -> Rank:
    """The whole model on this thread, with its first weights."""
    torch.set_num_threads(1)
    rank = Rank(config, 0, FakeBackends(), CPU)
    rank.initialise()
    return rank


def gradients_of(config: Config, step: int, share: int = 0) -> dict[str, Tensor]:
    """Whole gradients by name: random, different for every step and data rank."""
    rng = np.random.Generator(np.random.Philox(key=[step, share]))
    return {p.name: torch.from_numpy(rng.standard_normal(p.shape)) for p in parameter_table(config)}


def fill(rank: Rank, gradients: dict[str, Tensor]) -> None:
    """Put gradients where the backward would have put them."""
    for flat in rank.buffers.buckets:
        flat.open_gradients()
    for param in rank.params:
        target = rank.stage.named[param.name].grad
        assert target is not None
        target.copy_(local_part(param, gradients[param.name], rank.mesh.tp.size, rank.mesh.tp.index))


def weights_of(rank: Rank) -> dict[str, Tensor]:
    return rank.whole_parameters()


def state_of(rank: Rank) -> list[Tensor]:
    """Copies of all optimizer state, step counters included."""
    states = rank.optimizer.rule.state.values()
    return [value.clone() for state in states for _, value in sorted(state.items())]


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    """Equal values in every element; never NaN."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def tokens(config: Config, step: int) -> Callable[[int, int], np.ndarray]:
    rng = np.random.Generator(np.random.Philox(key=[7, step]))
    shape = (config.train.global_batch, config.model.seq_len + 1)
    ids = rng.integers(0, int(config.model.vocab_size or 0), size=shape)
    return lambda first, count: ids[first : first + count]


class TestLearningRate:
    def rates(self, steps: int = 10, **optim: Any) -> list[float]:
        config = tiny(train={"steps": steps}, lr=0.5, **optim)
        return [learning_rate(config, step) for step in range(steps)]

    def test_none(self) -> None:
        assert self.rates(decay="none") == [0.5] * 10

    def test_warmup_then_constant(self) -> None:
        rates = self.rates(decay="none", warmup=4)
        assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], rel=1e-15)
        assert rates[4:] == [0.5] * 6

    @pytest.mark.parametrize("decay", ["cosine", "linear"])
    @pytest.mark.parametrize("warmup", [0, 3])
    def test_first_and_last_are_exact(self, decay: str, warmup: int) -> None:
        rates = self.rates(decay=decay, warmup=warmup, min_lr_ratio=0.25)
        assert rates[0] == 0.5 / (warmup + 1)
        assert rates[warmup] == 0.5 and max(rates) == 0.5
        assert rates[-1] == pytest.approx(0.125, rel=1e-15)
        assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))

    @pytest.mark.parametrize(
        ("decay", "quarters"),
        [("linear", [1.0, 0.8, 0.6, 0.4, 0.2]), ("cosine", [1.0, 0.6 + 0.4 / math.sqrt(2), 0.6, None, 0.2])],
    )
    def test_shape(self, decay: str, quarters: list[float | None]) -> None:
        """Steps 2, 4, 6, 8, 10 are at 0, 1/4, 1/2, 3/4 and all of the decay, from 1 to 0.2 times lr."""
        rates = self.rates(steps=11, decay=decay, warmup=2, min_lr_ratio=0.2)
        for step, share in zip(range(2, 11, 2), quarters, strict=True):
            if share is not None:
                assert rates[step] == pytest.approx(0.5 * share, rel=1e-14)

    def test_to_zero(self) -> None:
        assert self.rates(decay="linear", min_lr_ratio=0.0)[-1] == 0.0

    @pytest.mark.parametrize("steps", [1, 2])
    def test_short_runs_have_a_rate(self, steps: int) -> None:
        for warmup in range(steps + 1):
            rates = self.rates(steps=steps, warmup=warmup)
            assert all(0 < rate <= 0.5 for rate in rates)


class TestClip:
    @pytest.mark.parametrize(
        ("norm", "limit", "divisor"), [(8.0, 2.0, 4.0), (2.0, 2.0, 1.0), (0.5, 2.0, 1.0), (8.0, 0.0, 1.0)]
    )
    def test_divisor(self, norm: float, limit: float, divisor: float) -> None:
        result = clip_divisor(torch.tensor(norm, dtype=torch.float64), limit)
        assert result.item() == divisor and result.dtype == torch.float64

    def test_norm_is_over_everything_and_before_clipping(self) -> None:
        config = tiny(clip=0.5)
        rank, gradients = single(config), gradients_of(config, 0)
        fill(rank, gradients)
        rank.optimizer.step(1e-3, torch.tensor(3.0))
        loss, norm = rank.optimizer.statistics.tolist()
        assert loss == 3.0
        assert norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in gradients.values())), rel=1e-14)
        shards = torch.cat([flat.gradient_shard for flat in rank.buffers.buckets])
        assert shards.norm().item() == pytest.approx(0.5, rel=1e-14)

    def test_no_clipping(self) -> None:
        config = tiny(clip=0.0)
        rank, gradients = single(config), gradients_of(config, 0)
        fill(rank, gradients)
        rank.optimizer.step(1e-3, torch.tensor(0.0))
        for name, parameter in rank.stage.named.items():
            assert parameter.grad is not None and torch.equal(parameter.grad, gradients[name])


@pytest.mark.parametrize("family", FAMILIES)
class TestDecayGroups:
    def test_matrices_and_embeddings_decay_and_nothing_else(self, family: str) -> None:
        """With gradients of zero AdamW only decays: weights shrink by 1 - rate x weight_decay."""
        config = tiny(FAMILIES[family], name="adamw", weight_decay=0.5)
        rank = single(config)
        for parameter in rank.stage.named.values():
            torch.nn.init.ones_(parameter)
        fill(rank, {p.name: torch.zeros(p.shape, dtype=torch.float64) for p in rank.params})
        rank.optimizer.step(0.01, torch.tensor(0.0))
        dims = {name: parameter.ndim for name, parameter in rank.stage.named.items()}
        assert set(dims.values()) == {1, 2}
        for name, parameter in rank.stage.named.items():
            expected = 1 - 0.01 * 0.5 if dims[name] == 2 else 1.0
            assert torch.equal(parameter, torch.full_like(parameter, expected)), name

    @pytest.mark.parametrize("bucket_mb", [25.0, 0.001])
    def test_every_element_is_stepped_once(self, family: str, bucket_mb: float) -> None:
        rank = single(tiny(FAMILIES[family], bucket_mb=bucket_mb))
        assert (len(rank.buffers.buckets) > 2) == (bucket_mb < 1)
        pieces = [piece for group in rank.optimizer.rule.groups for piece in group.params]
        assert sum(p.numel() for p in pieces) == sum(p.numel for p in rank.params)
        spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in pieces)
        assert all(stop <= start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False))


def reference_steps(config: Config, gradients: list[dict[str, Tensor]], rates: list[float]) -> dict[str, Tensor]:
    """Whole weights after plain torch has stepped unsharded parameters, gradients clipped by hand."""
    start = weights_of(single(config))
    weights = {name: Parameter(value) for name, value in start.items()}
    o = config.optim
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights.values() if p.ndim == 2], "weight_decay": o.weight_decay},
        {"params": [p for p in weights.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    engine: torch.optim.Optimizer
    if o.name == "adamw":
        engine = torch.optim.AdamW(groups, betas=(o.betas[0], o.betas[1]), eps=o.eps, foreach=False, fused=False)
    else:
        engine = torch.optim.SGD(groups, lr=1.0, momentum=o.momentum, foreach=False, fused=False)
    for step, rate in zip(gradients, rates, strict=True):
        norm = math.sqrt(sum(g.square().sum().item() for g in step.values()))
        for name, parameter in weights.items():
            parameter.grad = step[name] * min(1.0, o.clip / norm)
        for group in engine.param_groups:
            group["lr"] = rate
        engine.step()
    return {name: p.detach() for name, p in weights.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2", "zero3"])
def test_three_steps_equal_plain_torch(optimizer: str, sharding: str) -> None:
    """Two data ranks, each with its share of the gradients, against one torch optimizer on whole parameters."""
    rates = [0.01, 0.02, 0.005]
    settings: dict[str, Any] = {"name": optimizer, "weight_decay": 0.1, "clip": 20.0}
    config = tiny(parallel={"dp": 2}, sharding=sharding, **settings)
    sums = []
    for step in range(3):
        shares = [gradients_of(config, step, share) for share in range(2)]
        sums.append({name: shares[0][name] + shares[1][name] for name in shares[0]})

    def body(number: int, backends: Backends) -> dict[str, Tensor]:
        rank = Rank(config, number, backends, CPU)
        rank.initialise()
        for step, rate in enumerate(rates):
            rank.buffers.begin()
            fill(rank, gradients_of(config, step, number))
            for flat in rank.buffers.buckets:
                flat.start_reduction(rank.mesh)
            rank.optimizer.step(rate, torch.tensor(0.0))
        weights = weights_of(rank)
        rank.close()
        return weights

    expected = reference_steps(tiny(**settings), sums, rates)
    for weights in on_gloo(2, body):
        assert set(weights) == set(expected)
        for name, value in expected.items():
            assert (weights[name] - value).abs().max().item() <= 1e-12, name


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
class TestNotFinite:
    """A step with a gradient that is not finite changes nothing; everybody goes on, and the counts stay exact."""

    def train(self, rank: Rank, bad_at: set[int], bad: float, steps: int = 3) -> list[bool]:
        """Real steps; in those of `bad_at` one rank's final gradient gets one `bad` element. Per step: unchanged?"""
        unchanged = []
        for step in range(steps):
            weights, state = weights_of(rank), state_of(rank)

            def spoil(now: int = step) -> None:
                if now in bad_at and rank.mesh.rank == 1 % rank.mesh.layout.world:
                    rank.buffers.buckets[-1].gradient_shard[0] = bad

            rank.optimizer.before_clip = spoil
            rank.train_step(step, tokens(rank.config, step))
            same = same_bits(list(weights.values()), list(weights_of(rank).values()))
            unchanged.append(same and (not state or same_bits(state, state_of(rank))))
            assert math.isfinite(rank.optimizer.statistics[1].item()) == (step not in bad_at)
        return unchanged

    def test_one_of_four_ranks(self, bad: float, optimizer: str) -> None:
        config = tiny(parallel={"dp": 2, "pp": 2}, sharding="zero1", name=optimizer, decay="none", warmup=0)

        def body(number: int, backends: Backends) -> Any:
            rank = Rank(config, number, backends, CPU)
            rank.initialise()
            unchanged = self.train(rank, {1}, bad)
            weights = weights_of(rank)
            rank.close()
            declared = Counts()
            declared.merge(count_comm(rank.plan, rank.plan.steps), 3)
            ledger = rank.mesh.ledger
            return unchanged, ledger.differences + ledger.counts(TRAIN).differences(declared), weights

        for unchanged, differences, weights in on_gloo(4, body):
            assert unchanged == [False, True, False]
            assert differences == []
            assert all(torch.isfinite(w).all() for w in weights.values())

    @pytest.mark.parametrize("bad_at", [0, 1])
    def test_as_if_the_step_had_not_been(self, bad: float, optimizer: str, bad_at: int) -> None:
        """Also where it is the very first, before the optimizer has any state."""
        config = tiny(name=optimizer, decay="none")
        steps = [gradients_of(config, step) for step in range(3)]
        with_bad, without = single(config), single(config)
        spoiled = {name: g.clone() for name, g in steps[2].items()}
        spoiled["embed.weight"][0, 0] = bad
        for step, gradients in enumerate(steps[:2]):
            if step == bad_at:
                before = weights_of(with_bad)
                fill(with_bad, spoiled)
                with_bad.optimizer.step(0.01, torch.tensor(0.0))
                assert same_bits(list(before.values()), list(weights_of(with_bad).values())), "weights moved"
            for rank in (with_bad, without):
                fill(rank, gradients)
                rank.optimizer.step(0.01, torch.tensor(0.0))
        same_weights = same_bits(list(weights_of(with_bad).values()), list(weights_of(without).values()))
        same_state = same_bits(state_of(with_bad), state_of(without))
        assert (same_weights, same_state) == (True, True)

    def test_a_loss_that_is_not_finite(self, bad: float, optimizer: str) -> None:
        config = tiny(name=optimizer)
        rank = single(config)
        before = weights_of(rank)
        fill(rank, gradients_of(config, 0))
        rank.optimizer.step(0.01, torch.tensor(bad))
        assert same_bits(list(before.values()), list(weights_of(rank).values()))
