"""The plan against the real code: FLOPs by torch's counter, dry runs of every rank, and bytes that autograd keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dist_gpt.comm.mesh import FakeBackends
from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.dryrun import SavedBytes, dryrun_document
from dist_gpt.parallel.executor import MicroBatch
from dist_gpt.plan.api import flops_document, plan_document
from dist_gpt.plan.memory import saved_bytes
from dist_gpt.replica import Rank
from tests.reference.plain_gpt import PlainConfig, PlainGPT

BATCH, T, H, V = 3, 16, 48, 61
GPT = ["model.num_layers=3", f"model.hidden_size={H}", "model.num_heads=4", f"model.seq_len={T}",
       f"model.vocab_size={V}", "train.global_batch=12", f"train.micro_batch={BATCH}", "parallel.dp=1",
       "parallel.tp=1", "parallel.pp=1", "parallel.sequence_parallel=false", "optim.bucket_mb=0.02"]  # fmt: skip
LLAMA = ["model.num_kv_heads=2", "model.ffn_size=80", "model.norm=rmsnorm", "model.activation=swiglu",
         "model.position=rope", "model.tie_embeddings=false", "model.bias=false"]  # fmt: skip
GROUPED = ["model.num_kv_heads=2"]
SP = "parallel.sequence_parallel=true"
FAMILIES = pytest.mark.parametrize("family", [[], LLAMA, GROUPED], ids=["gpt", "llama", "gpt, grouped queries"])


def _addmm_flops(target: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of an accumulating product (m, k) @ (k, n), which torch's counter does not know."""
    return 2 * int(a[0]) * int(a[1]) * int(b[1])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(*sets: str) -> Config:
    return load("demo", [*GPT, *sets])


def axes(pp: int = 1, dp: int = 1, tp: int = 1) -> list[str]:
    return [f"parallel.pp={pp}", f"parallel.dp={dp}", f"parallel.tp={tp}"]


def micro_batch(config: Config, device: str) -> MicroBatch:
    tokens = torch.zeros(config.train.micro_batch * config.model.seq_len, dtype=torch.int64, device=device)
    return MicroBatch(tokens, tokens.clone(), 0, 0, 1.0)


def block_input(replica: Rank, block: int) -> Tensor | None:
    """What block `block` reads; the embedding reads the micro-batch only."""
    plan = replica.plan
    if block == 0:
        return None
    rows = plan.tokens // (plan.layout.tp if plan.config.parallel.sequence_parallel else 1)
    dtype = replica.buffers.buckets[0].parameters.dtype
    return torch.zeros(rows, plan.config.model.hidden_size, dtype=dtype, device=replica.device, requires_grad=True)


# --- FLOPs --------------------------------------------------------------------------------------------------------


def counted_flops(replica: Rank, block: int) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs by operator of the forward and of the backward of one block, by torch's counter."""
    micro = micro_batch(replica.config, "meta")
    replica.sink.begin()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as forward:
        y = replica.stage(block, block_input(replica, block), micro)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as backward:
        y.backward(torch.ones_like(y))
    return tuple(  # type: ignore[return-value]
        {str(op): int(n) for op, n in counter.get_flop_counts()["Global"].items()} for counter in (forward, backward)
    )


@FAMILIES
def test_flops_of_a_layer_and_the_head_on_meta_tensors(family: list[str]) -> None:
    config = small(*family)
    document = flops_document(config)
    replica = Rank(config, 0, FakeBackends(), torch.device("meta"))
    expected: dict[str, list[int]] = {"layer": [0, 0], "attention": [0, 0], "head": [0, 0]}
    for row in document["matmuls"]:
        places = ["head"] if row["name"] == "head" else ["layer"] + ["attention"] * row["name"].startswith("attention")
        for place in places:
            expected[place][0] += BATCH * row["forward_flops"] // row["count"]
            expected[place][1] += BATCH * row["backward_flops"] // row["count"]

    layer = counted_flops(replica, 1)
    assert [sum(counts.values()) for counts in layer] == expected["layer"]
    assert [counts["aten.bmm"] for counts in layer] == expected["attention"]
    head = counted_flops(replica, config.model.num_layers + 1)
    assert [sum(counts.values()) for counts in head] == expected["head"]


@FAMILIES
def test_flops_per_token_of_an_independent_model(family: list[str]) -> None:
    """The reference GPT, attention written out, forward and backward on meta tensors."""
    config = small(*family)
    with torch.device("meta"):
        reference = PlainGPT(PlainConfig.of(config.model), "formula")
        ids = torch.zeros(BATCH, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        reference(ids, ids).backward()
    assert counter.get_total_flops() == flops_document(config)["model_flops_per_token"] * BATCH * T


# --- dry run = plan -----------------------------------------------------------------------------------------------

LAYOUTS = {
    "one process": [],
    "tensor, sequence parallel, odd vocabulary": [*axes(tp=2), SP],
    "data, no sharding, single sequences": [*axes(dp=2), "optim.sharding=none", "train.micro_batch=1"],
    "data, padded shards": [*axes(dp=5), "train.global_batch=15"],
    "pipeline, tied": [*axes(3), "parallel.schedule=gpipe"],
    "all axes": [*axes(2, 2, 2), "model.dropout=0.1", "model.attention_dropout=0.0"],
    "all axes, sequence parallel, llama": [*axes(2, 2, 2), SP, *LLAMA],
    "interleaved, uneven, fp64": [*axes(2, 1, 2), "model.num_layers=5", "parallel.schedule=interleaved",
                                  "parallel.virtual_stages=2", "train.dtype=fp64"],
    "sgd, wide": [*axes(1, 2, 4), SP, "optim.name=sgd", "train.micro_batch=2"],
}  # fmt: skip
CELLS = [(name, rank) for name, sets in LAYOUTS.items() for rank in range(small(*sets).world_size)]


@pytest.mark.parametrize(("name", "rank"), CELLS, ids=str)
def test_a_dry_run_of_every_rank_is_the_plan(name: str, rank: int) -> None:
    config = small(*LAYOUTS[name])
    planned, counted = plan_document(config, rank), dryrun_document(config, rank)
    assert counted["differences"] == []
    for key in ("rank", "parameters", "model_flops", "comm"):
        assert counted[key] == planned[key], key
    assert counted["memory_bytes"] == planned["rank_memory_bytes"]
    assert counted["model_flops"] > 0 and (counted["comm"] or config.world_size == 1)


# --- bytes on the tape --------------------------------------------------------------------------------------------


def measured_bytes(replica: Rank, block: int) -> int:
    """Bytes of the storages that autograd holds between the forward and the backward of one block."""
    saved = SavedBytes([b.parameters for b in replica.buffers.buckets])
    x, micro = block_input(replica, block), micro_batch(replica.config, "cpu")
    replica.sink.begin()
    with saved.counting():
        y = replica.stage(block, x, micro)
    live = saved.live
    y.backward(torch.ones_like(y))
    assert saved.live == 0
    return live


@pytest.mark.parametrize("parallel", [[], axes(tp=2), [*axes(tp=2), SP]], ids=["one rank", "tp 2", "tp 2, sp"])
@pytest.mark.parametrize(("dropout", "dtype"), [("0.0", "fp64"), ("0.1", "fp32")])
@FAMILIES
def test_saved_bytes_of_each_block(family: list[str], dropout: str, dtype: str, parallel: list[str]) -> None:
    """On real tensors; the dry runs above do the same on meta tensors."""
    config = small(
        *family, *parallel, f"train.dtype={dtype}", f"model.dropout={dropout}", "model.attention_dropout=0.0"
    )
    for rank in range(config.parallel.tp):
        replica = Rank(config, rank, FakeBackends(), torch.device("cpu"))
        for block in (0, 1, config.model.num_layers + 1):
            expected = saved_bytes(config, block, rank)
            assert measured_bytes(replica, block) == expected, f"block {block} of tp rank {rank}"
