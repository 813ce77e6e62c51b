"""Products measured alone are those that training makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_gpt.config.load import load
from dist_gpt.parallel import matmul
from dist_gpt.plan.kernels import rank_kernels
from dist_gpt.profile import kernels
from dist_gpt.profile.kernels import kernel_facts, runner

CPU = torch.device("cpu")


class Factors(TorchDispatchMode):
    """Which dtypes were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in func.name() for word in ("mm", "linear", "attention")):
            self.seen |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["native", "rounded"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    monkeypatch.setattr(matmul, "_native", lambda dtype: request.param)
    yield request.param


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_in_two_bytes_they_are_made_as_training_makes_them(name: str, native: bool) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    for kernel in rank_kernels(load("demo", [f"train.dtype={name}"])):
        run = runner(kernel, CPU, dtype)
        with Factors() as factors:
            run()
        assert factors.seen == {dtype if native else torch.float32}, kernel.name


def test_the_ceiling_is_of_the_same_products(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a kernel would be several times as fast as the device at best."""
    monkeypatch.setattr(kernels, "LARGE", {"cpu": (64,)})
    with Factors() as factors:
        facts = kernel_facts(load("demo", ["train.dtype=fp16"]), CPU)
    assert factors.seen == {torch.float16 if native else torch.float32}
    assert facts[0]["ceiling"]["dtype"] == "fp16"
