"""Compare the plan's memory with optim.engine deepspeed with storages tracked in real steps on 2 ranks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_gpt.config.load import load
from dist_gpt.plan.api import plan_document
from tests.ranks.runs import run_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")

CONFIG: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "seq_len": 32, "vocab_size": 1000, "dropout": 0.0},
    "parallel": {"dp": 2},
    "optim": {"lr": 1e-3, "warmup": 2, "clip": 1.0, "engine": "deepspeed"},
    "train": {"steps": 4, "global_batch": 6, "micro_batch": 1, "dtype": "fp32"},
    "data": {"source": "synthetic"},
}
SMALL, LARGE = "optim.bucket_mb=0.4", "optim.bucket_mb=8"  # a tenth of the model, twice the model
ONCE = "train.global_batch=2"  # no gradient accumulation
CELLS: dict[str, tuple[str, ...]] = {
    "none": ("optim.sharding=none", SMALL),
    "zero1": ("optim.sharding=zero1", SMALL),
    "zero1 once": ("optim.sharding=zero1", LARGE, ONCE),
    "zero1 bf16": ("optim.sharding=zero1", SMALL, "train.dtype=bf16"),
    "zero1 bf16 offload": ("optim.sharding=zero1", SMALL, "train.dtype=bf16", "optim.offload=true", ONCE),
    "zero2": ("optim.sharding=zero2", SMALL),
    "zero2 once": ("optim.sharding=zero2", LARGE, ONCE),
    "zero2 bf16": ("optim.sharding=zero2", LARGE, "train.dtype=bf16"),
    "zero2 bf16 once": ("optim.sharding=zero2", SMALL, "train.dtype=bf16", ONCE),
    "zero2 offload": ("optim.sharding=zero2", SMALL, "optim.offload=true"),
    "zero3": ("optim.sharding=zero3", SMALL),
    "zero3 bf16": ("optim.sharding=zero3", LARGE, "train.dtype=bf16"),
    "zero3 bf16 once": ("optim.sharding=zero3", SMALL, "train.dtype=bf16", ONCE),
    "zero3 offload": ("optim.sharding=zero3", SMALL, "optim.offload=true"),
    "llama untied": (
        "optim.sharding=zero2", SMALL, "model.norm=rmsnorm", "model.activation=swiglu", "model.position=rope",
        "model.tie_embeddings=false", "model.num_kv_heads=2", "model.bias=false",
    ),
}  # fmt: skip
MORE = {"zero1 once", "zero2 once", "zero2 bf16 once", "zero2 offload"}
"""What these put together, `make test` sees in pairs: a stage with `once`, bf16 or offload in the others."""
RELATIVE, ABSOLUTE = 0.04, 400_000
"""Of 10 to 25 MB. The 0.4 MB are temporary buffers of one block's matmuls; in bf16 a CPU casts operands to fp32."""


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deepspeed_memory") / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="session")
def measured(config_file: Path, request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    """Return what each rank measured, by cell."""
    fewer = "not all_cells" in request.config.option.markexpr
    chosen = {name: sets for name, sets in CELLS.items() if not (fewer and name in MORE)}
    cells, out = config_file.with_name("cells.json"), config_file.with_name("out.json")
    cells.write_text(json.dumps(list(chosen.values())))
    run_ranks(config_file.parent, "tests.ranks.deepspeed_memory", config_file, cells, out, ranks=2,
              preload=("torch._dynamo",))  # fmt: skip
    ranks = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(chosen)}


@pytest.mark.parametrize(
    "cell", [pytest.param(name, marks=[pytest.mark.all_cells] if name in MORE else []) for name in CELLS]
)
def test_the_plan_counts_what_deepspeed_holds(
    config_file: Path, measured: dict[str, list[dict[str, Any]]], cell: str
) -> None:
    """Compare the rank that holds most. On a CPU, host memory is the same memory, so it is tracked as well."""
    found = measured[cell]
    peak = max(rank["peak"] for rank in found)
    planned = plan_document(load(str(config_file), list(CELLS[cell]), world=2))["memory_bytes"]
    counted = planned["peak"] + planned["host"]
    assert abs(counted - peak) <= RELATIVE * peak + ABSOLUTE, (counted, peak, found[0]["where"])


@pytest.mark.parametrize("cell", ["zero1", "zero1 bf16", "zero2", "zero2 bf16", "zero3", "zero3 bf16"])
def test_between_steps_there_is_what_the_plan_calls_state(
    config_file: Path, measured: dict[str, list[dict[str, Any]]], cell: str
) -> None:
    """Compare parameters, masters and moments; BF16_Optimizer and stage 3 keep gradients too, stage 3 its bucket."""
    config = load(str(config_file), list(CELLS[cell]), world=2)
    planned = plan_document(config)["memory_bytes"]
    wanted = planned["parameters"] + planned["optimizer"]
    if cell in ("zero1 bf16", "zero3", "zero3 bf16"):
        wanted += planned["gradients"]
    if cell.startswith("zero3"):
        wanted += int(config.optim.bucket_mb * 1e6)
    assert measured[cell][0]["rest"] == pytest.approx(wanted, rel=0.002)
