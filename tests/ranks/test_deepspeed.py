"""The real DeepSpeed on CPU over gloo, against the native engine; what it refuses; a whole run."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import yaml
from torch import Tensor, zeros

from dist_gpt.comm.global_groups import GlobalGroups
from dist_gpt.comm.rendezvous import RankEnv
from dist_gpt.config.deepspeed import require_deepspeed
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import load
from dist_gpt.integrations.deepspeed import engine as deepspeed
from dist_gpt.integrations.deepspeed.traffic import Traffic
from dist_gpt.plan.api import plan_document
from dist_gpt.plan.count import total_parameters
from dist_gpt.report.read.load import load as load_run
from tests.ranks.runs import Place, run_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")

STEPS, MICRO_BATCHES = 8, 2
CONFIG: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "seq_len": 32, "vocab_size": 251, "dropout": 0.1,
              "attention_dropout": 0.0},
    "parallel": {"dp": 2},
    "optim": {"lr": 1e-2, "warmup": 2, "clip": 1.0, "engine": "deepspeed"},
    "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "dtype": "fp32"},
    "data": {"source": "synthetic"},
}  # fmt: skip
LLAMA = ("model.norm=rmsnorm", "model.activation=swiglu", "model.position=rope", "model.tie_embeddings=false",
         "model.num_kv_heads=2", "model.bias=false")  # fmt: skip
FEW = "train.steps=5"
CELLS: dict[int, dict[str, tuple[str, ...]]] = {
    2: {
        "none": ("optim.sharding=none",),
        "zero1": ("optim.sharding=zero1",),
        "zero2": ("optim.sharding=zero2", "optim.clip=0", "train.recompute=selective"),
        "zero3": ("optim.sharding=zero3",),
        "zero2-offload": ("optim.sharding=zero2", "optim.offload=true", FEW),
        "zero3-offload": ("optim.sharding=zero3", "optim.offload=true", FEW),
        "zero1-sgd": ("optim.sharding=zero1", "optim.name=sgd", "optim.lr=0.1", FEW),
        "diverges": ("optim.sharding=zero1", "optim.lr=1e30", "optim.warmup=0", FEW),
        "bf16": ("optim.sharding=zero2", "train.dtype=bf16", FEW),
    },
    4: {
        "tp-none": ("parallel.tp=2", "optim.sharding=none", FEW),
        "tp-zero1": ("parallel.tp=2", "optim.sharding=zero1"),
        "tp-zero3": ("parallel.tp=2", "optim.sharding=zero3", *LLAMA),
    },
}
NAMES = [(world, name) for world, cells in CELLS.items() for name in cells]
FP32 = [(world, name) for world, name in NAMES if name not in ("bf16", "diverges")]


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deepspeed") / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@lru_cache
def trained(config_file: Path, world: int) -> dict[str, dict[str, Any]]:
    """All cells of `world` ranks, trained by both engines."""
    cells, out = (config_file.with_name(f"{name}{world}.json") for name in ("cells", "out"))
    cells.write_text(json.dumps(list(CELLS[world].values())))
    run_ranks(config_file.parent / str(world), "tests.ranks.deepspeed_ranks", config_file, cells, out, ranks=world,
              preload=("torch._dynamo",))  # fmt: skip
    return dict(zip(CELLS[world], json.loads(out.read_text()), strict=True))


def furthest(got: list[float], want: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("world", "name"), FP32)
def test_engines_agree(config_file: Path, world: int, name: str) -> None:
    cell = trained(config_file, world)[name]
    got, want = cell["deepspeed"], cell["native"]
    assert len(got["losses"]) == (5 if FEW in CELLS[world][name] else STEPS)
    assert got["losses"][-1] < got["losses"][0]  # it has learned: the weights are different ones at the end
    for what in ("losses", "norms", "evaluations"):
        assert furthest(got[what], want[what]) < 1e-5, what


def test_bf16_follows(config_file: Path) -> None:
    cell = trained(config_file, 2)["bf16"]
    assert furthest(cell["deepspeed"]["losses"], cell["native"]["losses"]) < 2e-3
    assert cell["deepspeed"]["losses"] != cell["native"]["losses"]


def test_a_step_that_is_not_finite_is_skipped(config_file: Path) -> None:
    """Had it been applied, the engine would have said that the weights are lost."""
    for engine in ("native", "deepspeed"):
        found = trained(config_file, 2)["diverges"][engine]
        assert [math.isfinite(norm) for norm in found["norms"]] == [True, *[False] * 4], engine


def test_the_plan_is_of_what_is_ours(config_file: Path) -> None:
    for sharding in ("none", "zero1", "zero2", "zero3"):
        plan = plan_document(load(str(config_file), ["parallel.tp=2", f"optim.sharding={sharding}"]), 0)
        assert sorted(plan["comm"]) == ["tp", "world"]
        assert plan["memory_bytes"]["parameters"] > 0
        assert any("excludes DeepSpeed's own" in note for note in plan["notes"])


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_what_is_ours_is_accounted_for(config_file: Path, world: int, name: str) -> None:
    """Every tensor-parallel collective and every sum of ours is declared, by step; sockets are on loopback alone."""
    found = trained(config_file, world)[name]["deepspeed"]
    assert found["differences"] == []
    assert found["listening"] == ["127.0.0.1"]


def test_traffic_is_the_textbook_s(config_file: Path) -> None:
    """4 bytes a parameter: 2 or 1 + 1 times for an all-reduce or a gather, per micro-batch from stage 2 on."""
    psi = 4 * total_parameters(load(str(config_file)))
    for name, wanted in {
        "none": {"all_reduce": 1},
        "zero1": {"all_reduce": 1, "all_gather": 1},
        "zero2": {"all_reduce": MICRO_BATCHES, "all_gather": 1},
        "zero3": {"reduce_scatter": MICRO_BATCHES, "all_gather": None},
    }.items():
        engine = trained(config_file, 2)[name]["deepspeed"]["engine"]
        assert engine["steps"] == STEPS
        data = engine["traffic"]["train"]["data"]
        for op, times in wanted.items():
            moved = data[op]["payload_bytes"] / STEPS / psi
            if times is None:  # forward and backward of each micro-batch, less what is kept from one to the other
                assert MICRO_BATCHES < moved <= 2.05 * MICRO_BATCHES
            else:
                assert times <= moved < 1.02 * times, (name, op)


@pytest.mark.parametrize(
    ("local_world", "named", "used"), [(2, "", "lo"), (2, "eth7", "lo"), (1, "eth7", "eth7"), (1, "", "lo")]
)
def test_global_groups_listen_on_one_interface(
    monkeypatch: pytest.MonkeyPatch, local_world: int, named: str, used: str
) -> None:
    """Loopback on one node, whatever is named; else the named one, else that of the route to rank 0 (here 127.0.0.1).
    The environment, in which gloo looks, is as before afterwards."""
    seen: list[str] = []

    def look(*args: Any, **words: Any) -> None:
        seen.append(os.environ["GLOO_SOCKET_IFNAME"])

    monkeypatch.setattr(torch.distributed, "init_process_group", look)
    monkeypatch.setattr(torch.distributed, "new_group", look)
    if named:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
    env = RankEnv(0, 2, 0, local_world, "127.0.0.1", 1234, 0, 0.0)
    groups = GlobalGroups(torch.distributed.HashStore(), env, torch.device("cpu"), 5.0)
    groups.group("data", [0, 1])
    assert seen == [used, used]
    assert os.environ.get("GLOO_SOCKET_IFNAME", "") == named


class Backend:
    """Takes whatever it is told to do."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **words: (name, args, words)


def test_traffic_counts_by_group_and_full_tensor() -> None:
    whole, part = zeros(8), zeros(2)
    data = object()
    traffic = Traffic({id(data): "data"}, {"data": 4, "world": 8})
    seam = traffic.watch(Backend())
    with traffic.during("train"):
        called: tuple[str, tuple[Tensor, ...], dict[str, Any]] = seam.all_reduce(whole, "sum", data, False)
        assert called == ("all_reduce", (whole, "sum", data, False), {})
        seam.all_gather_into_tensor(output_tensor=whole, input_tensor=part, group=data, async_op=True)
        seam.reduce_scatter_tensor(part, whole, group=data)
        seam.all_gather([part] * 4, part, group=data)
        seam.reduce(tensor=whole, dst=0, group=data)
    seam.barrier()
    assert traffic.document() == {
        "train": {"data": {
            "all_reduce": {"calls": 1, "payload_bytes": 32, "wire_bytes": 48},
            "all_gather": {"calls": 2, "payload_bytes": 64, "wire_bytes": 48},
            "reduce_scatter": {"calls": 1, "payload_bytes": 32, "wire_bytes": 24},
            "reduce": {"calls": 1, "payload_bytes": 32, "wire_bytes": 24},
        }},
        "start": {"world": {"barrier": {"calls": 1, "payload_bytes": 0, "wire_bytes": 0}}},
    }  # fmt: skip


# --- refusals -------------------------------------------------------------------------------------------------------

REFUSED = {
    "parallel.pp=2": "set pp: 1",
    "parallel.cp=2": "set cp: 1",
    "parallel.sequence_parallel=true": "set sequence_parallel: false",
    "parallel.schedule=gpipe": "set schedule: 1f1b",
    "optim.shard_group=node": "set shard_group: data",
    "train.dtype=fp64": "set train.dtype: fp32",
    "train.dtype=fp16": "set train.dtype: bf16",
    "train.recompute=full": "set recompute: selective",
    "checkpoint.every=5": "set checkpoint.every: 0",
    "optim.reduce_dtype=bf16": "leave reduce_dtype out",
    "optim.state_dtype=bf16": "leave state_dtype out",
    "optim.offload=true optim.sharding=none": "set sharding: zero1",
    "train.dtype=bf16 optim.sharding=none": "set sharding: zero1",
    "train.dtype=bf16 optim.grad_dtype=bf16": "leave grad_dtype out",
    "optim.sharding=zero3 optim.reshard=step": "leave reshard out",
    "optim.grad_dtype=bf16": "leave grad_dtype out",
    "optim.sharding=zero1 optim.reshard=step": "leave reshard out",
}


@pytest.mark.parametrize("sets", REFUSED)
def test_what_it_cannot_serve_is_refused_with_a_way_out(config_file: Path, sets: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(str(config_file), sets.split())
    told = [message for message in error.value.problems if "optim.engine deepspeed" in message]
    assert len(told) == 1
    key = told[0].split()[0]
    assert [message for message in error.value.problems if message.startswith(key)] == told, "one word on each key"
    assert REFUSED[sets] in told[0]
    native = problems_of_native(config_file, sets)
    takes_it = not any(message.startswith(key) for message in native)
    assert ("optim.engine: native" in told[0]) == takes_it, "the other engine is offered where it is a way out"
    assert not [m for m in native if "deepspeed" in m]


def problems_of_native(config_file: Path, sets: str) -> list[str]:
    try:
        load(str(config_file), [*sets.split(), "optim.engine=native"])
    except ConfigError as error:
        return error.problems
    return []


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require_deepspeed("deepspeed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_deepspeed("native")
    with pytest.raises(ConfigError, match=r"pip install 'dist-gpt\[deepspeed\]'"):
        require_deepspeed("deepspeed")


def test_a_package_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"installed but cannot be imported \(ModuleNotFoundError.*engine=native"):
        deepspeed._imported()


@pytest.mark.parametrize("verb", ["verify", "dryrun"])
def test_verbs_of_the_native_engine_say_so(place: Place, config_file: Path, verb: str) -> None:
    run = place.run([verb, str(config_file)], "none")
    assert run.code == 2
    assert "optim.engine: got deepspeed" in run.err
    assert "--set optim.engine=native" in run.err


# --- whole runs -----------------------------------------------------------------------------------------------------

SETS = {
    "optim.engine": "deepspeed", "optim.sharding": "zero2", "parallel.dp": 2, "train.dtype": "fp32",
}  # fmt: skip


def test_a_run_ends_well_and_its_report_tells_what_is_not_accounted_for(place: Place) -> None:
    run = place.run(place.argv("launch", "by_deepspeed", sets=SETS | {"profile.steps": "[2,4]"}), "by_deepspeed")
    assert run.code == 0, run.err
    assert "accounting: exact" in run.lines
    assert any(line.startswith("DeepSpeed ") and "which the accounting does not include" in line for line in run.lines)
    assert [row["step"] for row in run.metrics()] == list(range(7))
    assert run.metrics()[-1]["val_loss"] < run.metrics()[0]["val_loss"]
    loaded = load_run(run.run_dir)
    assert sum("in no accounting" in problem for problem in loaded.problems) == 1
    engine = loaded.ranks[1].engine
    assert engine is not None
    assert engine["steps"] == 6
    assert engine["traffic"]["train"]["data"]["all_gather"]["calls"] > 0


def test_who_asks_it_to_stop_learns_that_nothing_was_saved(place: Place) -> None:
    sets = {**SETS, "train.steps": 1_000_000, "train.eval_batches": 0, "train.eval_every": 0}
    run = place.ask_to_stop(place.argv("launch", "stopped_deepspeed", sets=sets), "stopped_deepspeed", steps=2)
    assert run.code == 1
    assert "saves no checkpoints: the training so far is lost" in run.out + run.err
