"""Memory that runs out: recognised, and answered with what would fit."""

from __future__ import annotations

import re

import pytest
import torch

from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.plan.count import count_memory
from dist_gpt.plan.steps import RankPlan
from dist_gpt.train.oom import SPARE, OutOfMemoryError, explain, is_out_of_memory


def of(*sets: str) -> Config:
    return load("gpt2-124m", ["parallel.dp=4", "train.micro_batch=4", "train.global_batch=64", *sets])


def test_a_real_one_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit")) and not is_out_of_memory(ValueError("out of memory"))


def test_what_is_named_would_fit() -> None:
    config = of("optim.sharding=none")
    peak = count_memory(RankPlan(config, 3), RankPlan(config, 3).steps)["peak"]
    limit = int(0.8 * peak)
    text = str(explain(config, 3, MemoryError("no room"), limit))
    assert text.startswith("rank 3 (pp 0, dp 3, cp 0, tp 0) ran out of memory: no room")
    assert "parameters" in text and "activations" in text and "would fit:" in text
    offers = re.findall(r"^  ((?:--set \S+ ?)+): ([0-9.]+) (GB|MB)$", text, re.MULTILINE)
    assert 1 <= len(offers) <= 4
    for what, size, unit in offers:
        sets = what.replace("--set ", "").split()
        changed = of("optim.sharding=none", *sets)
        needed = count_memory(RankPlan(changed, 3), RankPlan(changed, 3).steps)["peak"]
        assert needed <= SPARE * limit
        assert needed == pytest.approx(float(size) * (1e9 if unit == "GB" else 1e6), rel=0.05)


def test_without_a_limit_what_needs_less_is_named() -> None:
    text = str(explain(of(), 0, MemoryError(), None))
    assert "would need less:" in text and "--set train.recompute=full" in text
    assert "held at the time of the error: less than the whole model" in text
    held = {"parameters": 5_000_000, "activations": 0, "peak": 5_000_000}
    text = str(explain(of(), 0, MemoryError(), None, held))
    assert "held at the time of the error: parameters 5.00 MB, plus activations and temporaries" in text


def test_nothing_that_would_not_fit_is_named() -> None:
    text = str(explain(of(), 0, MemoryError(), 1_000_000))
    assert "no single setting is enough" in text and "would fit" not in text


def test_it_is_an_error_of_its_own() -> None:
    assert isinstance(explain(of(), 0, MemoryError(), None), OutOfMemoryError)
