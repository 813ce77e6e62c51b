"""The pure functions of a block: slopes in float64, and dropout that hangs on its key alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dist_gpt.model.functions import attention_core, dropout, rms_norm, rotary_table, rotate, seed_of, swiglu

BATCH, HEADS, TIME, WIDTH = 2, 4, 6, 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_()


def heads(kv_heads: int) -> list[Tensor]:
    return [normal(BATCH, n, TIME, WIDTH, seed=i) for i, n in enumerate((HEADS, kv_heads, kv_heads))]


def attended(kv_heads: int, rate: float, seed: int) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    inputs = heads(kv_heads)
    out = attention_core(*inputs, dropout=rate, seed=seed)
    gradients = torch.autograd.grad(out, inputs, normal(*out.shape, seed=9).detach())
    return [out.detach(), *gradients]


# --- slopes -------------------------------------------------------------------------------------------------------

TABLE = rotary_table(TIME, WIDTH, 10_000.0, torch.float64, torch.device("cpu"))
SLOPES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), [normal(5, 6), normal(6, seed=1)]),
    "swiglu": (swiglu, [normal(5, 8)]),
    "rotate": (lambda x: rotate(x, TABLE), [normal(BATCH, TIME, HEADS, WIDTH)]),
    "attention": (attention_core, heads(HEADS)),
    "attention, grouped": (attention_core, heads(2)),
    "attention, dropout": (lambda q, k, v: attention_core(q, k, v, 0.3, 5), heads(2)),
    "dropout": (lambda x: dropout(x, 0.3, (1, 2), 7), [normal(5, 6)]),
}


@pytest.mark.parametrize("name", SLOPES)
def test_the_gradient_is_the_slope(name: str) -> None:
    function, inputs = SLOPES[name]
    assert torch.autograd.gradcheck(function, inputs)


# --- dropout of attention -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [HEADS, 2], ids=["full", "grouped"])
def test_attention_dropout_hangs_on_its_seed_alone(kv_heads: int) -> None:
    torch.manual_seed(1)
    first = attended(kv_heads, 0.25, seed=3)
    torch.manual_seed(2)
    torch.rand(17)  # another state, and another place in it
    again = attended(kv_heads, 0.25, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = attended(kv_heads, 0.25, seed=4)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_attention_dropout_leaves_the_generator_as_it_was() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    attended(HEADS, 0.25, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_without_dropout_takes_no_notice_of_the_seed() -> None:
    assert all(torch.equal(a, b) for a, b in zip(attended(2, 0.0, 3), attended(2, 0.0, 4), strict=True))


def test_the_mean_over_many_attention_masks_is_the_undropped() -> None:
    """Each draw's spread is measured, and the mean of n draws lies within 6 of its own standard deviations."""
    draws = 2000
    inputs = [x.detach() for x in heads(2)]
    whole = attention_core(*inputs)
    seen = torch.stack([attention_core(*inputs, dropout=0.2, seed=seed) for seed in range(draws)])
    deviation = seen.std(dim=0) / draws**0.5
    assert deviation.max() < 0.05
    assert ((seen.mean(dim=0) - whole).abs() <= 6 * deviation).all()


# --- dropout of the residual stream -------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_rate_and_scales_what_it_keeps(rate: float) -> None:
    rows, columns = 500, 200
    y = dropout(torch.ones(rows, columns, dtype=torch.float64), rate, (1, 2, 3), 0)
    kept = y != 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - rate)))
    for part, size in (
        (kept.double().mean(), rows * columns),
        (kept.double().mean(0), rows),
        (kept.double().mean(1), columns),
    ):
        bound = 6 * (rate * (1 - rate) / size) ** 0.5  # of a fair coin: 1 in 500 million goes beyond
        assert (part - (1 - rate)).abs().max() <= bound


def test_rows_of_dropout_are_those_of_the_whole() -> None:
    x = normal(24, 10).detach()
    whole = dropout(x, 0.3, (4, 5), 100)
    parts = [dropout(x[start : start + 6], 0.3, (4, 5), 100 + start) for start in range(0, 24, 6)]
    assert torch.equal(torch.cat(parts), whole)


def test_rows_beyond_32_bits_have_masks_of_their_own() -> None:
    """The element index is 64 bits wide: a mask does not come back after 2^32 elements."""
    ones = torch.ones(64, 16, dtype=torch.float64)
    assert not torch.equal(dropout(ones, 0.5, (1,), 0), dropout(ones, 0.5, (1,), 2**32 // 16))


def test_the_gradient_of_dropout_has_its_mask() -> None:
    x = normal(20, 10)
    y = dropout(x, 0.4, (6,), 3)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    mask = dropout(torch.ones_like(x), 0.4, (6,), 3)
    assert torch.equal(gradient, mask)
    assert torch.equal(y.detach(), x.detach() * mask)


def test_dropout_hangs_on_its_key_and_not_on_the_generator() -> None:
    ones = torch.ones(20, 10, dtype=torch.float64)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = dropout(ones, 0.4, (6, 1), 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(dropout(ones, 0.4, (6, 1), 0), first)
    assert not torch.equal(dropout(ones, 0.4, (6, 2), 0), first)
    assert not torch.equal(dropout(ones, 0.4, (6, 1), 1), first)


def test_no_dropout_is_the_input_itself() -> None:
    x = normal(3, 4)
    assert dropout(x, 0.0, (1,), 0) is x


def test_seeds_are_63_bits_and_different() -> None:
    seeds = [seed_of((a, b)) for a in range(50) for b in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
