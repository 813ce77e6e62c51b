"""Test, on a device that torch only pretends, that no training step waits for its device or mixes it with the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check.cases import tiny
from benchmarks.gpu_check.pretended import ends
from dist_gpt.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
PRETENDS_S = 900
"""Against hanging; on a quiet machine it takes less than a minute."""
pytestmark = pytest.mark.timeout(PRETENDS_S)
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2-gpipe-tp2": {"pp": 2, "tp": 2, "schedule": "gpipe"},
}
DTYPES = ("fp64", "fp32", "bf16", "fp16")


def combinations(every: bool) -> Iterator[tuple[str, Config]]:
    """Yield families, dtypes and layouts with the other options in turn, and every ZeRO stage.

    Unless `every`, each family has three of four dtypes of a layout, and some cases have one micro-batch.
    """
    layers = {"num_layers": 1}
    for turn, family in enumerate(("gpt2", "llama")):
        for number, (dtype, layout) in enumerate(product(DTYPES, LAYOUTS)):
            if not every and (DTYPES.index(dtype) + list(LAYOUTS).index(layout) + 2 * turn) % 4 == 0:
                continue  # the other family has it
            parallel, dropout = LAYOUTS[layout], 0.1 * (number % 2)
            recompute = ("none", "full", "selective")[number // 2 % 3]
            count = 2 if every or "pp" in parallel else 1 + number // 3 % 2
            model = {"dropout": dropout, "num_layers": parallel.get("pp", 1)}
            yield (
                f"{family} {dtype} {layout} dropout {dropout} {recompute}, {count} micro-batches",
                tiny(family, dtype, model, recompute, parallel, micro_batches=count),
            )
        for stage in ("none", "zero1", "zero2", "zero3"):
            dtype = "bf16" if stage in ("zero1", "zero3") else "fp32"
            yield f"{family} {dtype} {stage}", tiny(
                family, dtype, layers, recompute="full" if stage == "zero3" else "none", parallel={"dp": 2},
                optim={"sharding": stage, "bucket_mb": 0.01},
            )  # fmt: skip
    yield (
        "interleaved",
        tiny(model={"num_layers": 4}, parallel={"pp": 2, "virtual_stages": 2, "schedule": "interleaved"}),
    )
    yield "bf16 gradients, averages and reductions", tiny(
        dtype="bf16", model=layers, parallel={"dp": 2},
        optim={"grad_dtype": "bf16", "state_dtype": "bf16", "reduce_dtype": "bf16", "sharding": "zero2"},
    )  # fmt: skip
    yield "sgd, zero3 kept", tiny(parallel={"dp": 2}, optim={"name": "sgd", "sharding": "zero3", "reshard": "step"})


def pretend(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    text = "\n".join(json.dumps(case) for case in cases)
    command = [sys.executable, "-m", "tests.unit.pretended_steps"]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, cwd=ROOT, timeout=PRETENDS_S, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def case_of(name: str, config: Config, rank: int = 0, plant: str | None = None) -> dict[str, Any]:
    return {"name": name, "config": config.model_dump(mode="json"), "rank": rank, "plant": plant}


PLANTS = ("item", "mask", "copy", "cpu")


@pytest.fixture(scope="module")
def every(request: pytest.FixtureRequest) -> bool:
    return "not all_cells" not in request.config.option.markexpr


@pytest.fixture(scope="module")
def results(every: bool) -> list[dict[str, Any]]:
    """Run all cases and planted faults in one process, since starting it takes most of the time.

    Unless `every`, a pipeline runs both ends only in bf16 and where it is interleaved, else one of them.
    """
    cases = [case_of(f"planted {plant}", tiny(model={"num_layers": 1}), plant=plant) for plant in PLANTS]
    for number, (name, config) in enumerate(combinations(every)):
        ranks = ends(config)
        if not (every or config.train.dtype == "bf16" or config.parallel.virtual_stages > 1):
            ranks = [ranks[(number + (config.train.recompute == "selective")) % len(ranks)]]
        cases += [case_of(name, config, rank) for rank in ranks]
    return pretend(cases)


def test_no_training_step_waits_for_its_device_or_mixes_it_with_the_cpu(
    results: list[dict[str, Any]], every: bool
) -> None:
    configs = dict(combinations(every))
    assert len(configs) >= 40 and len(configs) == len(list(combinations(every)))
    seen = [found for found in results if found["name"] in configs]
    assert {found["name"] for found in seen} == set(configs)
    for found in seen:
        where = f"{found['name']}, rank {found['rank']}"
        assert "error" not in found, f"{where}: {found['error']}"
        step, config = found["step"], configs[found["name"]]
        assert step["waits"] == [], where
        assert step["mixed"] == [], where
        assert step["finished"] and step["kernels"] > 100, where
        assert found["evaluation"]["finished"] and not found["evaluation"]["waits"], where
        assert len(found["statistics"]["waits"]) == 1, where  # reading numbers is where a step is waited for
        # Only token ids go to the device, and once the rotary table.
        assert step["copies_to_device"] <= config.micro_batches + 1, where


def planted(results: list[dict[str, Any]], plant: str) -> dict[str, Any]:
    (step,) = [found["step"] for found in results if found["name"] == f"planted {plant}"]
    return step


@pytest.mark.parametrize("plant", ["item", "mask", "copy"])
def test_a_planted_wait_is_found_with_its_line(results: list[dict[str, Any]], plant: str) -> None:
    step = planted(results, plant)
    (place,) = step["waits"]
    assert place.startswith("tests/unit/pretended_steps.py:")
    assert step["finished"] == (plant == "copy")  # what was copied can be computed with


def test_a_planted_cpu_tensor_is_found_with_its_line(results: list[dict[str, Any]]) -> None:
    step = planted(results, "cpu")
    (place,) = step["mixed"]
    assert place.startswith("tests/unit/pretended_steps.py:")
    assert "torch.ones(1)" in place
    assert not step["finished"]
