"""Products by oneDNN against float64, whatever the operands look like in memory; and who is asked when."""

from __future__ import annotations

from collections.abc import Callable
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


WITH_GAPS = ("rows of a wider one", "every other row", "one row for all")


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked, whatever processor this is."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def near(found: Tensor, exact: Tensor) -> bool:
    """To the rounding of float32 in a sum of K products."""
    return bool((found.double() - exact).abs().max() < 1e-5 * exact.abs().max())


class Operands(TorchDispatchMode):
    """What oneDNN is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "linear" in func.name():
            self.pairs.append(args[:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("onednn")
class TestOneDNN:
    @pytest.mark.parametrize("of_b", LAYOUTS)
    @pytest.mark.parametrize("of_a", LAYOUTS)
    def test_any_layout(self, of_a: str, of_b: str) -> None:
        a, b = LAYOUTS[of_a](random(M, K)), LAYOUTS[of_b](random(K, N))
        assert matmul.asks_onednn(a, b) is (of_b not in WITH_GAPS)
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

    def test_of_two_operands_the_smaller_one_is_copied(self) -> None:
        """A head's gradient: logits' gradients (tokens, vocabulary) transposed, times hidden states."""
        grad, hidden = random(K, 8 * N), random(K, N)
        with Operands() as seen:
            found = matmul.product(grad.t(), hidden)
        assert near(found, grad.double().t() @ hidden.double())
        assert [left.shape for left, _ in seen.pairs] == [hidden.t().shape]

    @pytest.mark.parametrize("of_a", LAYOUTS)
    def test_the_right_operand_has_no_gaps(self, of_a: str) -> None:
        with Operands() as seen:
            matmul.product(LAYOUTS[of_a](random(8 * N, K)), random(K, N))
        ((_, right),) = seen.pairs
        assert right.is_contiguous() or right.t().is_contiguous()

    def test_what_autograd_has_to_know_of_is_torchs(self) -> None:
        a, b = random(M, K).requires_grad_(), random(K, N)
        assert not matmul.asks_onednn(a, b)
        matmul.product(a, b).sum().backward()
        assert a.grad is not None and near(a.grad, b.double().sum(1).expand(M, K))
        with torch.no_grad():
            assert matmul.asks_onednn(a, b)

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


class TestChoice:
    @pytest.fixture(autouse=True)
    def amd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(matmul.Path, "read_text", lambda path: "vendor_id : AuthenticAMD")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)

    @staticmethod
    def chosen() -> bool:
        return matmul.onednn_is_faster.__wrapped__()

    def test_amd_with_wide_units(self) -> None:
        assert self.chosen()

    def test_not_on_intels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(matmul.Path, "read_text", lambda path: "vendor_id : GenuineIntel")
        assert not self.chosen()

    def test_not_without_wide_units(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert not self.chosen()

    @pytest.mark.parametrize("failure", [AttributeError, RuntimeError, TypeError])
    def test_an_operation_that_is_gone_or_changed_is_left_alone(
        self, failure: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def changed(*operands: object) -> Tensor:
            raise failure("no such operation")

        monkeypatch.setattr(matmul, "_onednn", changed)
        assert not self.chosen()

    def test_nor_one_that_gives_something_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(matmul, "_onednn", lambda a, b, bias=None: torch.addmm(bias, a, b) + 1e-3)
        assert not self.chosen()
