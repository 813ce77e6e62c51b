"""Compare one process on the GPU with one process on the CPU.

In float64, compare as `dist-gpt verify` does: loss, norm, every gradient and updated weights, within its tolerance. In
bf16, compare every gradient with the CPU's in float32, in the 2-norm.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_check.cases import tiny
from benchmarks.gpu_check.section import Context
from dist_gpt.comm.mesh import FakeBackends
from dist_gpt.config.schema import Config
from dist_gpt.replica import Rank
from dist_gpt.verify import TOLERANCE, certify_rank, verify_samples, write_reference

BF16_BOUND = 0.05
"""Bound on the error of a bf16 gradient, relative to its norm or, if larger, to BF16_FLOOR of the largest norm."""
BF16_FLOOR = 0.05


def run(context: Context) -> None:
    """Compare both families, in float64 and in bf16."""
    for family in ("gpt2", "llama"):
        context.attempt(f"{family} fp64", in_float64, context, family)
        context.attempt(f"{family} bf16", in_bf16, context, family)


def in_float64(context: Context, family: str) -> None:
    """Report the largest error of each measure, and check it against the certificate's tolerance."""
    config = tiny(family, "fp64", {"dropout": 0.1, "attention_dropout": 0.0})
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.safetensors"
        write_reference(config, reference)
        verdict = certify_rank(config, 0, FakeBackends(), reference, context.device.torch_device)
    context.put(f"{family}.fp64", verdict.worst)
    for measure, error in verdict.worst.items():
        where = verdict.where.get(measure, "")
        context.check(error <= TOLERANCE, f"{family} fp64: {measure} is off by {error:.3g}, at {where}")
    context.check(not verdict.accounting, f"{family} fp64: {'; '.join(verdict.accounting[:3])}")


def in_bf16(context: Context, family: str) -> None:
    """Report the largest relative error of a gradient in bf16, and check it against BF16_BOUND."""
    exact = gradients(tiny(family, "fp32"), torch.device("cpu"))
    got = gradients(tiny(family, "bf16"), context.device.torch_device)
    largest = max(float(gradient.norm()) for gradient in exact.values())
    errors = {
        name: float((got[name].float() - whole).norm()) / max(float(whole.norm()), BF16_FLOOR * largest)
        for name, whole in exact.items()
    }
    name = max(errors, key=errors.__getitem__)
    context.put(f"{family}.bf16", {"gradient": errors[name], "where": name, "bound": BF16_BOUND})
    context.check(errors[name] <= BF16_BOUND, f"{family} bf16: the gradient of {name} is off by {errors[name]:.3g}")


def gradients(config: Config, device: torch.device) -> dict[str, Tensor]:
    """Return the gradients of the first step, by parameter, on the CPU."""
    replica, found = Rank(config, 0, FakeBackends(), device), {}

    def keep() -> None:
        for name, gradient in replica.whole_gradients().items():
            found[name] = gradient.cpu()

    try:
        replica.initialise()
        replica.optimizer.before_clip = keep
        replica.train_step(0, verify_samples(config, 0))
    finally:
        replica.close()
    return found
