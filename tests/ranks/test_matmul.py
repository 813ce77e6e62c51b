"""Products by oneDNN against float64, whatever the operands look like in memory; and who is asked when."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.products import linear
from dist_gpt.parallel import matmul

M, K, N = 96, 192, 160  # more than WORTH_ONEDNN
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "rows of a wider one": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every other row": lambda x: torch.stack([x, x], dim=1).view(-1, x.shape[1])[::2],
    "not at a multiple of 64 bytes": lambda x: torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape),
    "one row for all": lambda x: x[:1].expand(x.shape),
}


HAS_TILES = torch.cpu._is_amx_tile_supported()


@pytest.fixture(autouse=True)
def no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without AMX, on which alone oneDNN is asked."""
    if HAS_TILES:
        monkeypatch.setattr(matmul, "OneDNN", nullcontext)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked, whatever processor this is."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def near(found: Tensor, exact: Tensor) -> bool:
    """To the rounding of float32 in a sum of K products."""
    return bool((found.double() - exact).abs().max() < 1e-5 * exact.abs().max())


def setting() -> str:
    """torch's, for float32 by oneDNN."""
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


class Settings(TorchDispatchMode):
    """Torch's setting at each product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.name():
            self.seen.append(setting())
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("onednn")
class TestOneDNN:
    @pytest.mark.parametrize("of_b", LAYOUTS)
    @pytest.mark.parametrize("of_a", LAYOUTS)
    def test_any_layout(self, of_a: str, of_b: str) -> None:
        a, b = LAYOUTS[of_a](random(M, K)), LAYOUTS[of_b](random(K, N))
        assert matmul.asks_onednn(a, b)
        exact = a.double() @ b.double()
        assert near(matmul.product(a, b), exact)
        out = torch.full((M, N), float("nan"))
        matmul.accumulate(out, a, b, first=True)
        matmul.accumulate(out, a, b, first=False)
        assert near(out, 2 * exact)

    @pytest.mark.parametrize("step", [0, 1, 2])
    def test_any_bias(self, step: int) -> None:
        a, b, bias = random(M, K), random(K, N), random(2 * N).as_strided((N,), (step,))
        assert near(matmul.affine(bias, a, b), a.double() @ b.double() + bias.double())

    @pytest.mark.parametrize("of_out", ["contiguous", "transposed", "rows of a wider one"])
    def test_any_place_for_the_result(self, of_out: str) -> None:
        a, b, out = random(M, K), random(K, N), LAYOUTS[of_out](torch.ones(M, N))
        matmul.accumulate(out, a, b, first=False)
        assert near(out, a.double() @ b.double() + 1)

    @pytest.mark.parametrize("shape", [(M, K, N), (8, 16, 8)])
    def test_torchs_setting_is_changed_for_large_products_and_for_them_alone(self, shape: tuple[int, ...]) -> None:
        a, b = random(*shape[:2]), random(*shape[1:])
        with Settings() as settings:
            matmul.product(a, b)
            matmul.affine(b[0], a, b)
            matmul.accumulate(a @ b, a, b, first=True)
        large = "bf16" if shape[0] == M and not HAS_TILES else "none"
        assert settings.seen == [large, large, "none", large]
        assert setting() == "none"

    def test_the_setting_is_changed_back_after_an_error(self) -> None:
        with pytest.raises(RuntimeError):
            matmul.product(random(M, K), random(K + 1, N))
        assert setting() == "none"

    def test_nor_is_it_left_by_threads_that_overlap(self) -> None:
        with matmul.OneDNN():
            with ThreadPoolExecutor(1) as other:
                other.submit(matmul.product, random(M, K), random(K, N)).result()
            assert setting() == ("none" if HAS_TILES else "bf16")
        assert setting() == "none"

    def test_it_is_asked_indeed(self, capfd: pytest.CaptureFixture[str]) -> None:
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            matmul.product(random(M, K), random(K, N))
        said = "matmul" in capfd.readouterr().out
        assert said is (torch.backends.cpu.get_cpu_capability() == "AVX512" and not HAS_TILES)

    def test_autograd_goes_through_it(self) -> None:
        a, b = random(M, K).requires_grad_(), random(K, N)
        matmul.product(a, b).sum().backward()
        assert a.grad is not None and near(a.grad, b.double().sum(1).expand(M, K))

    def test_a_wider_place_for_the_sum(self) -> None:
        a, b, out = random(M, K), random(K, N), torch.ones(M, N, dtype=torch.float64)
        matmul.accumulate(out, a, b, first=False)
        assert near(out, a.double() @ b.double() + 1)

    @pytest.mark.parametrize("dtype", matmul.LOW)
    @pytest.mark.parametrize("native", [False, True])
    def test_what_is_added_up_in_float32_is_not_rounded_before(
        self, native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(matmul, "_native", lambda dtype: native)
        a, b, out = random(M, K, dtype=dtype), random(K, N, dtype=dtype), torch.empty(M, N)
        matmul.accumulate(out, a, b, first=True)
        matmul.accumulate(out, a, b, first=False)
        assert near(out, 2 * (a.double() @ b.double()))

    def test_two_bytes_are_multiplied_in_float32_and_rounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(matmul, "_native", lambda dtype: False)
        a, b = random(M, K, dtype=torch.bfloat16), random(K, N, dtype=torch.bfloat16)
        found = matmul.product(a, b)
        assert found.dtype == torch.bfloat16 and torch.equal(found, matmul.product(a.float(), b.float()).bfloat16())

    def test_the_same_twice(self) -> None:
        a, b = random(M, K), random(K, N)
        assert torch.equal(matmul.product(a, b), matmul.product(a.clone(), b.clone()))

    @pytest.mark.parametrize(
        ("m", "k", "n", "dtype", "asked"),
        [
            (M, K, N, torch.float32, True),
            (M, K, N, torch.float64, False),
            (M, K, N, torch.bfloat16, False),
            (8, 16, 8, torch.float32, False),
        ],
    )
    def test_who_is_asked(self, m: int, k: int, n: int, dtype: torch.dtype, asked: bool) -> None:
        assert matmul.asks_onednn(random(m, k, dtype=dtype), random(k, n, dtype=dtype)) is asked


@pytest.mark.parametrize("bias", [True, False])
def test_what_the_other_trainers_get_is_torchs_linear(bias: bool) -> None:
    x, weight = random(2, 3, 5, dtype=torch.float64), random(4, 5, dtype=torch.float64)
    operands = (x, weight, random(4, dtype=torch.float64)) if bias else (x, weight)
    leaves = [operand.requires_grad_() for operand in operands]
    assert torch.equal(linear(*leaves), torch.nn.functional.linear(*leaves))
    assert torch.autograd.gradcheck(linear, leaves)


def processor(monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """What /proc/cpuinfo, and any other file, says."""
    monkeypatch.setattr(matmul.Path, "read_text", lambda path, *how, **more: says)


class TestChoice:
    @pytest.fixture(autouse=True)
    def amd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        processor(monkeypatch, "vendor_id : AuthenticAMD")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)

    @staticmethod
    def chosen() -> bool:
        return matmul.onednn_is_faster.__wrapped__()

    def test_amd_with_wide_units(self) -> None:
        assert self.chosen()

    def test_not_on_intels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        processor(monkeypatch, "vendor_id : GenuineIntel")
        assert not self.chosen()

    def test_not_without_wide_units(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert not self.chosen()

    def test_not_on_units_that_round_operands(self, monkeypatch: pytest.MonkeyPatch) -> None:
        processor(monkeypatch, "vendor_id : AuthenticAMD\nflags : amx_tile")
        assert not self.chosen()

    def test_not_where_somebody_has_set_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(matmul, "_SETTING", SimpleNamespace(fp32_precision="ieee"))
        assert not self.chosen()

    @pytest.mark.parametrize("failure", [AttributeError, RuntimeError])
    def test_a_setting_that_is_gone_or_changed_is_left_alone(
        self, failure: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def changed() -> None:
            raise failure("no such setting")

        monkeypatch.setattr(matmul, "OneDNN", changed)
        assert not self.chosen()

    @pytest.mark.parametrize("lost_bits", [13, 16])  # of 23: what TF32 and bf16 lose
    def test_nor_one_that_rounds_operands(self, lost_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        exact = torch.addmm

        def rounding(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
            a, b = ((x.view(torch.int32) >> lost_bits << lost_bits).view(torch.float32) for x in (a, b))
            return exact(bias, a, b)

        monkeypatch.setattr(torch, "addmm", rounding)
        assert not self.chosen()
