"""What `plan` and `flops` print: the contract's keys, the proven schedule, published FLOPs, and the text for people."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from dist_gpt.config.load import load, presets
from dist_gpt.config.schema import Config
from dist_gpt.plan import timeline
from dist_gpt.plan.api import flops_document, flops_text, plan_document, plan_text, simulated_bubble
from dist_gpt.schedule.action import ScheduleError, parse_order
from dist_gpt.schedule.orders import SCHEDULES, Schedule, make_orders
from tests.reference import formulas

PRESETS = pytest.mark.parametrize("preset", sorted(presets()))


@cache
def planned(preset: str) -> dict[str, Any]:
    """The document of the first rank; read only."""
    return plan_document(load(preset), 0)


def sizes(config: Config) -> tuple[int, int, int, int]:
    """s, L, h, V."""
    m = config.model
    return m.seq_len, m.num_layers, m.hidden_size, int(m.vocab_size or 0)


# --- plan ---------------------------------------------------------------------------------------------------------


@PRESETS
def test_the_documents_hold_the_contracts_keys_and_are_json(preset: str) -> None:
    document = planned(preset)
    assert json.loads(json.dumps(document)) == document
    assert set(document) >= {"layout", "parameters", "model_flops", "comm", "total", "memory_bytes", "peak_rank"}
    assert set(document["total"]) == {"parameters", "model_flops", "comm"}
    parts = {"parameters", "gradients", "optimizer", "activations", "buffers", "peak", "host"}
    assert set(document["memory_bytes"]) == parts
    for key in ("step_s", "tokens_per_s", "tflops_per_gpu", "mfu", "hfu", "budget_s"):  # no cluster was named
        assert document[key] is None
    assert all(
        set(tally) == {"calls", "payload_bytes", "wire_bytes"}
        for ops in document["total"]["comm"].values()
        for tally in ops.values()
    )


@PRESETS
def test_total_parameters_and_flops_of_the_presets(preset: str) -> None:
    config = load(preset)
    s, L, h, V = sizes(config)
    total, B, m = planned(preset)["total"], config.train.global_batch, config.model
    if m.activation == "swiglu":
        kv, ffn = int(m.num_kv_heads or 0), int(m.ffn_size or 0)
        assert total["parameters"] == formulas.llama_parameters(L, h, V, m.num_heads, kv, ffn)
        assert total["model_flops"] == formulas.model_flops(B, s, L, h, V, m.num_heads, kv, ffn, True)
    else:
        assert total["parameters"] == formulas.gpt2_parameters(L, h, V, s)
        assert total["model_flops"] == formulas.gpt_model_flops(B, s, L, h, V)


def test_a_world_of_thousands_of_ranks() -> None:
    config = load("gpt3-175b", world=3072)
    document = plan_document(config, 3071)
    assert document["layout"]["world"] == 3072 and document["coords"] == {"pp": 11, "dp": 31, "cp": 0, "tp": 7}
    assert document["total"]["comm"]["world"]["all_reduce"]["calls"] == 3072
    assert document["total"]["model_flops"] == formulas.gpt_model_flops(1536, 2048, 96, 12288, 50257)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 8 is outside the world of 8 ranks"):
        plan_document(load("demo"), 8)


@pytest.mark.parametrize(
    ("schedule", "virtual_stages", "layers"),
    [("gpipe", 1, "[4, 3]"), ("1f1b", 1, "[4, 3]"), ("interleaved", 2, "[2, 2, 2, 1]")],
)
@pytest.mark.parametrize("m", [2, 4, 8])
def test_the_bubble_of_even_stages_is_the_closed_form(schedule: str, virtual_stages: int, layers: str, m: int) -> None:
    """With V = 12 h + 2 s the head costs as much as a layer, so these splits are even."""
    config = load("demo", [
        "model.num_layers=7", "model.hidden_size=24", "model.num_heads=4", "model.seq_len=8",
        f"model.vocab_size={12 * 24 + 2 * 8}", f"parallel.schedule={schedule}", f"parallel.layers={layers}",
        f"parallel.virtual_stages={virtual_stages}", f"train.global_batch={2 * m}", "train.micro_batch=1",
    ])  # fmt: skip
    assert simulated_bubble(config) == pytest.approx(float(formulas.bubble_rate(2, m, virtual_stages)), abs=1e-12)
    assert plan_document(config)["bubble"] == simulated_bubble(config)


def test_an_uneven_split_costs_bubble() -> None:
    even, uneven = (simulated_bubble(load("demo", [f"parallel.layers={layers}"])) for layers in ("[2, 2]", "[3, 1]"))
    assert uneven > even + 0.05
    assert simulated_bubble(load("gpt2-124m")) == 0.0


@pytest.mark.parametrize(
    "sets", [[], ["parallel.schedule=gpipe"], ["parallel.schedule=interleaved", "parallel.virtual_stages=2"]]
)
def test_the_schedule_in_the_document_is_the_one_that_runs(sets: list[str]) -> None:
    config = load("demo", sets)
    p, schedule = config.parallel, plan_document(config)["schedule"]
    assert [parse_order(text) for text in schedule["orders"]] == make_orders(p.schedule, p.pp, p.virtual_stages, 4)
    assert (schedule["name"], schedule["micro_batches"]) == (p.schedule, 4)
    assert (
        sum(schedule["chunks"]) == 4 and len(schedule["chunks"]) == len(schedule["placement"]) == 2 * p.virtual_stages
    )


def test_a_schedule_that_deadlocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    good = SCHEDULES["1f1b"]

    def backwards_first(rank: int, pp: int, v: int, m: int) -> list[object]:
        order = good.order(rank, pp, v, m)
        return order[::-1] if rank == 1 else order

    monkeypatch.setitem(SCHEDULES, "1f1b", Schedule("1f1b", backwards_first, good.placement, good.legal, good.rule))  # type: ignore[arg-type]
    for cached in (timeline.lowered_orders, timeline._timeline):
        cached.cache_clear()
    try:
        with pytest.raises(ScheduleError, match="before"):
            plan_document(load("demo"))
    finally:
        for cached in (timeline.lowered_orders, timeline._timeline):
            cached.cache_clear()


@PRESETS
def test_the_text_is_no_wider_than_110_columns_and_says_the_numbers(preset: str) -> None:
    config = load(preset)
    document = plan_document(config, config.world_size - 1)
    text = plan_text(document, config)
    assert max(map(len, text.splitlines())) <= 110
    assert f"{document['total']['parameters']:,} in the model" in text
    assert f"rank {config.world_size - 1} (pp {config.parallel.pp - 1}, " in text
    for axis, ops in document["comm"].items():
        for op, tally in ops.items():
            (line,) = [words for line in _section(text, "Traffic of rank") if (words := line.split())[:2] == [axis, op]]
            assert line[2] == f"{tally['calls']:,}"


def _section(text: str, title: str) -> list[str]:
    (section,) = [part for part in text.split("\n\n") if part.startswith(title)]
    return section.splitlines()[2:]


RARER = {
    "optim.shard_group=node": "inside nodes",
    "optim.reshard=step": "gathered for the step",
    "optim.offload=true": "state in host memory",
    "optim.grad_dtype=bf16": "grad dtype bf16",
    "optim.reduce_dtype=fp32": "reduce dtype fp32",
    "optim.state_dtype=bf16": "state dtype bf16",
}


def test_what_was_set_is_told_and_nothing_else() -> None:
    base = ["train.dtype=bf16", "optim.sharding=zero3"]
    plain, told = _memory_lines(*base), _memory_lines(*base, *RARER)
    assert plain == "sharding zero3, bf16, recompute none"
    assert told == plain + " " + ", ".join(RARER.values())
    for key in RARER:
        assert _memory_lines(*base, key) == f"{plain} {RARER[key]}"
    assert max(map(len, _text("demo", *base, *RARER).split("\n\n")[1].splitlines())) <= 110
    assert _memory_lines("train.dtype=fp16", "train.loss_scale=1024").endswith("recompute none loss scale 1024")
    engine = ["optim.engine=deepspeed", "parallel.pp=1", "parallel.sequence_parallel=false"]
    assert _memory_lines(*engine).endswith("by DeepSpeed")


def _memory_lines(*sets: str) -> str:
    rows = [line.strip() for line in _text("demo", *sets).split("\n\n")[1].splitlines()]
    first = next(i for i, row in enumerate(rows) if row.startswith("memory"))
    last = next(i for i, row in enumerate(rows) if row.startswith("batch"))
    return " ".join(rows[first:last]).removeprefix("memory").strip()


@pytest.mark.parametrize(
    ("sets", "note"),
    [
        (["optim.sharding=zero3", "parallel.dp=1"], "optim.sharding zero3 with one data rank: there is no other rank"),
        (["train.loss_scale=1024"], "train.loss_scale 1024 with train.dtype fp32: the loss is scaled with fp16 only"),
        (["optim.offload=true"], "adds to the peak, so offload saves none"),
        (["optim.shard_group=node"], "optim.shard_group node on one node"),
    ],
)
def test_what_a_setting_does_not_do_is_noted(sets: list[str], note: str) -> None:
    assert note in _text("demo", *sets)
    assert note not in _text("demo")


def test_small_schedules_are_drawn_and_large_ones_are_not() -> None:
    for sets, drawn in (([], True), (["train.global_batch=64"], True), (["train.global_batch=128"], False)):
        config = load("demo", sets)
        text = plan_text(plan_document(config), config)
        assert ("rank 1   |" in text) == drawn
        assert ("The grid is drawn for up to 8 pipeline ranks and 16 micro-batches" in text) != drawn
    assert "2 + 1 layers" in _text(
        "demo", "parallel.schedule=interleaved", "parallel.virtual_stages=2", "model.num_layers=7"
    )


def _text(preset: str, *sets: str) -> str:
    config = load(preset, sets)
    return plan_text(plan_document(config), config)


# --- flops --------------------------------------------------------------------------------------------------------


@PRESETS
def test_flops_per_token_are_the_textbooks(preset: str) -> None:
    config = load(preset)
    s, L, h, V = sizes(config)
    m, document = config.model, flops_document(config)
    kv, ffn = int(m.num_kv_heads or 0), int(m.ffn_size or 0)
    whole = formulas.model_flops(1, s, L, h, V, m.num_heads, kv, ffn, m.activation == "swiglu")
    assert document["model_flops_per_token"] * s == document["hardware_flops_per_token"] * s == whole
    rows = document["matmuls"]
    assert sum(r["forward_flops"] + r["backward_flops"] for r in rows) == whole
    assert sum(r["share"] for r in rows) == pytest.approx(1, abs=1e-12)
    for r in rows:
        assert r["forward_flops"] == 2 * r["shape"][0] * r["shape"][1] * r["shape"][2] * r["batch"] * r["count"]
        assert r["backward_flops"] == 2 * r["forward_flops"]
        assert r["share"] == pytest.approx((r["forward_flops"] + r["backward_flops"]) / whole)
    assert planned(preset)["total"]["model_flops"] == config.train.global_batch * whole


def test_shapes_of_llama() -> None:
    rows = {r["name"]: (r["shape"], r["batch"], r["count"]) for r in flops_document(load("llama-8b"))["matmuls"]}
    assert rows == {
        "attn.qkv": ([8192, 4096, 6144], 1, 32),
        "attention scores QK^T": ([8192, 128, 8192], 32, 32),
        "attention values PV": ([8192, 8192, 128], 32, 32),
        "attn.out": ([8192, 4096, 4096], 1, 32),
        "mlp.up": ([8192, 4096, 28672], 1, 32),
        "mlp.down": ([8192, 14336, 4096], 1, 32),
        "head": ([8192, 4096, 128256], 1, 1),
    }


def test_published_conventions() -> None:
    s, L, h, V = 1024, 12, 768, 50257
    published = flops_document(load("gpt2-124m"))["published"]
    assert published["n"] == 124_439_808 - s * h  # nanoGPT's count: without positions, the tied embedding once
    assert published["6n_12lht"] == formulas.per_token_flops(published["n"], L, h, s)
    assert published["causal"] == formulas.gpt_model_flops(1, s, L, h, V) // s - 6 * L * h * s
    assert flops_document(load("llama-8b"))["published"]["n"] == 8_030_261_248 - 128256 * 4096


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_flops_are_hardware_flops(recompute: str) -> None:
    config = load("gpt2-124m")
    config = config.model_copy(update={"train": config.train.model_copy(update={"recompute": recompute})})
    s, L, h, V = 1024, 12, 768, 50257
    document = flops_document(config)
    if recompute == "selective":
        expected = formulas.gpt_selective_recompute_flops_executed(1, s, L, h, V)
    else:  # the published full forward, less each layer's last matmul
        expected = formulas.gpt_full_recompute_flops(1, s, L, h, V) - L * 2 * s * 4 * h * h
    assert document["hardware_flops_per_token"] * s == expected
    assert document["model_flops_per_token"] * s == formulas.gpt_model_flops(1, s, L, h, V)


@PRESETS
def test_the_text_of_flops(preset: str) -> None:
    document = flops_document(load(preset))
    text = flops_text(document)
    assert max(map(len, text.splitlines())) <= 110
    assert f"{document['model_flops_per_token']:,}" in text
    assert all(r["name"] in text and f"{r['share']:.1%}" in text for r in document["matmuls"])
