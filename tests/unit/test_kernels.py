"""The rank's products against the model's matmuls, and the published peaks."""

from __future__ import annotations

import pytest

from dist_gpt.config.load import load
from dist_gpt.plan.flops import ATTENTION as PRODUCTS
from dist_gpt.plan.flops import matmuls
from dist_gpt.plan.kernels import ATTENTION, rank_kernels
from dist_gpt.plan.peaks import PEAKS, published_peak


@pytest.mark.parametrize("preset", ["demo", "gpt2-124m", "llama-8b"])
@pytest.mark.parametrize("tp", [1, 2])
def test_all_ranks_products_are_the_models(preset: str, tp: int) -> None:
    world = 2 if preset == "demo" else 16
    config = load(preset, [f"parallel.tp={tp}", "parallel.pp=1", "parallel.dp=auto"], world=world)
    whole = {m.name: m for m in matmuls(config)}
    per_sequence = {k.name: tp * k.flops / config.train.micro_batch for k in rank_kernels(config)}
    for name, flops in per_sequence.items():
        parts = PRODUCTS if name == ATTENTION else (name,)
        expected = sum(whole[part].forward_flops / whole[part].count for part in parts)
        assert flops == pytest.approx(expected, rel=0.01 if name == "head" else 0)  # an uneven vocabulary


def test_bytes_are_operands_and_result() -> None:
    up = next(k for k in rank_kernels(load("demo")) if k.name == "mlp.up")
    assert up.bytes == 4 * (up.m * up.k + up.k * up.n + up.m * up.n)


def test_published_peaks() -> None:
    assert published_peak("NVIDIA H100 80GB HBM3").flops_per_s["bf16"] == 989e12  # type: ignore[union-attr]
    assert published_peak("cpu") is None
    assert all(peak.source and peak.bytes_per_s > 0 for peak in PEAKS)
