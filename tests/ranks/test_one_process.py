"""One process against the independent plain GPT: loss, every gradient, stepped weights. No pool, no processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dist_gpt.comm.mesh import FakeBackends
from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.optim.lr import learning_rate
from dist_gpt.replica import Rank
from dist_gpt.verify import verify_samples
from tests.ranks.cells import make_cell
from tests.ranks.test_plants import BASE
from tests.reference.plain_gpt import PlainConfig, PlainGPT, make_optimizer

STEPS = 5
FAMILIES = pytest.mark.parametrize(
    "form",
    [
        {"family": "gpt2", "heads": "full", "tied": True},
        {"family": "gpt2", "heads": "grouped", "tied": False},
        {"family": "llama", "heads": "grouped", "tied": False},
        {"family": "llama", "heads": "full", "tied": True},
    ],
    ids=["gpt2", "gpt2-gqa-untied", "llama-gqa", "llama-tied"],
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def config_of(folder: Path, options: dict[str, Any], dtype: str = "fp64") -> Config:
    """A one-process configuration, read from a file as a user's is."""
    cell = make_cell(BASE | {"micro_batches": 3, "micro_batch": 2} | options)
    assert cell is not None
    tree = {**cell.config, "train": {**cell.config["train"], "dtype": dtype, "steps": STEPS}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load(str(path), world=1)


class Pair:
    """The product on one process and the plain GPT, with equal weights, on the same batches."""

    def __init__(self, config: Config, initial: bool = False) -> None:
        self.config = config
        self.ours = Rank(config, 0, FakeBackends(), torch.device("cpu"))
        self.ours.initialise()
        self.plain = PlainGPT(PlainConfig.of(config.model)).to(torch.float64 if config.train.dtype == "fp64" else None)
        if not initial:
            self._randomise()
        self.plain.load_named({name: p.detach().clone() for name, p in self.ours.stage.named.items()})
        self.gradients: dict[str, Tensor] = {}
        self.ours.optimizer.before_clip = self._keep

    def _randomise(self) -> None:
        """Weights so large that every term matters; norms around 1."""
        generator = torch.Generator().manual_seed(5)
        for param in self.ours.params:
            noise = 0.2 * torch.randn(param.shape, dtype=torch.float64, generator=generator)
            self.ours.set_parameter(param, noise + (1.0 if param.init == "ones" else 0.0))

    def _keep(self) -> None:
        self.gradients = self.ours.whole_gradients()

    def step(self, step: int) -> float:
        """One step of ours; the loss."""
        self.ours.train_step(step, verify_samples(self.config, step))
        return float(self.ours.optimizer.statistics[0])

    @property
    def norm(self) -> float:
        return float(self.ours.optimizer.statistics[1])

    def plain_backward(self, step: int) -> float:
        """Gradients of the plain model on the whole batch of `step`; the loss."""
        ids = torch.from_numpy(verify_samples(self.config, step)(0, self.config.train.global_batch))
        self.plain.zero_grad(set_to_none=True)
        loss = self.plain(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return float(loss.detach())


def plain_optimizer(pair: Pair) -> torch.optim.Optimizer:
    o = pair.config.optim
    betas = (o.betas[0], o.betas[1])
    return make_optimizer(pair.plain, o.name, o.lr, betas, o.eps, o.momentum, o.weight_decay)


def plain_step(pair: Pair, engine: torch.optim.Optimizer, step: int, rate: float) -> tuple[float, float]:
    """Loss and norm; clips by max(1, norm / limit), which torch's clip_grad_norm_ only nears (it adds 1e-6)."""
    loss = pair.plain_backward(step)
    gradients = list(pair.plain.named_gradients().values())
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    if pair.config.optim.clip:
        for gradient in gradients:
            gradient.div_(max(1.0, norm / pair.config.optim.clip))
    for group in engine.param_groups:
        group["lr"] = rate
    engine.step()
    return loss, norm


@FAMILIES
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_loss_and_every_gradient_equal_the_plain_gpt(tmp_path: Path, form: dict[str, Any], micro_batches: int) -> None:
    pair = Pair(config_of(tmp_path, {**form, "micro_batches": micro_batches}))
    loss, plain_loss = pair.step(0), pair.plain_backward(0)
    assert abs(loss - plain_loss) <= 1e-11 * plain_loss
    wanted = pair.plain.named_gradients()
    assert pair.gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-6, f"{name}: the test must exercise it"
        assert (pair.gradients[name] - gradient).abs().max() <= 1e-11, name


@FAMILIES
@pytest.mark.parametrize(
    ("optimizer", "clip", "rate"),
    [("adamw", 0.01, "constant"), ("sgd", 0.01, "cosine"), ("adamw", 0.0, "linear"), ("sgd_plain", 100.0, "constant")],
)
def test_stepped_weights_equal_plain_torch(
    tmp_path: Path, form: dict[str, Any], optimizer: str, clip: float, rate: str
) -> None:
    config = config_of(tmp_path, {**form, "optimizer": optimizer, "clip": clip, "rate": rate})
    pair = Pair(config)
    engine = plain_optimizer(pair)
    lr = config.optim.lr
    rates = {
        "constant": [lr] * STEPS,
        # one step of warm-up at lr / 2, then 0.1 + 0.9 (1 + cos(pi t)) / 2 with t = 0, 1/3, 2/3, 1
        "cosine": [lr / 2, lr, lr * 0.775, lr * 0.325, lr * 0.1],
        "linear": [lr, lr * 0.75, lr * 0.5, lr * 0.25, 0.0],
    }[rate]
    for step in range(STEPS):
        loss = pair.step(step)
        plain_loss, plain_norm = plain_step(pair, engine, step, rates[step])
        assert loss == pytest.approx(plain_loss, rel=1e-10)
        assert pair.norm == pytest.approx(plain_norm, rel=1e-10)
        if clip == 0.01:
            assert pair.norm > clip, "the test must exercise clipping"
        if clip == 100.0:
            assert pair.norm < clip, "the test must exercise a limit that does not bite"
    for name, weight in pair.plain.named_weights().items():
        assert (pair.ours.stage.named[name] - weight).abs().max() <= 1e-10, name


@FAMILIES
def test_float32_follows_the_plain_gpt(tmp_path: Path, form: dict[str, Any]) -> None:
    config = config_of(tmp_path, {**form, "optimizer": "adamw", "clip": 1.0}, "fp32")
    pair = Pair(config, initial=True)
    engine = plain_optimizer(pair)
    losses = []
    for step in range(STEPS):
        losses.append(pair.step(step))
        plain_loss, _ = plain_step(pair, engine, step, learning_rate(config, step))
        assert losses[-1] == pytest.approx(plain_loss, rel=1e-5)
    assert len(set(losses)) == STEPS, "the weights must change"
    assert all(p.dtype == torch.float32 for p in pair.ours.stage.named.values())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_cells_clip_bites_where_it_should(tmp_path: Path, family: str) -> None:
    """The table's two limits, on the cells' own initial weights: 0.01 bites and 100 does not."""
    pair = Pair(config_of(tmp_path, {"family": family}), initial=True)
    for step in range(2):
        pair.step(step)
        assert 0.05 < pair.norm < 50
