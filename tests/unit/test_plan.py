"""Buckets, declared traffic, FLOPs and memory of the plan against textbook formulas, and counted rank by rank."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from math import prod

import pytest

from dist_gpt.config.load import load
from dist_gpt.config.schema import DTYPE_BYTES, Config
from dist_gpt.events import Counts, total
from dist_gpt.params import PARTIAL, parameter_table
from dist_gpt.plan.api import plan_document
from dist_gpt.plan.buckets import make_buckets
from dist_gpt.plan.count import count_comm, count_flops, count_memory, stored_parameters
from dist_gpt.plan.precision import shard_ranks
from dist_gpt.plan.split import split_blocks
from dist_gpt.plan.steps import RankPlan
from dist_gpt.schedule.action import Op, parse_grid
from dist_gpt.schedule.expand import BACKWARD, FORWARD, GATHER, REDUCE, SEND, UPDATE, WEIGHT, Step
from dist_gpt.schedule.lower import add_communication, add_reduce_and_step
from tests.reference import formulas

L, H, HEADS, T, V = 5, 24, 4, 8, 61
GPT = [f"model.num_layers={L}", f"model.hidden_size={H}", f"model.num_heads={HEADS}", f"model.seq_len={T}",
       f"model.vocab_size={V}", "train.global_batch=12", "train.micro_batch=1", "parallel.dp=1", "parallel.tp=1",
       "parallel.pp=1", "parallel.sequence_parallel=false", "optim.bucket_mb=0.02"]  # fmt: skip
LLAMA = ["model.num_kv_heads=2", "model.ffn_size=40", "model.norm=rmsnorm", "model.activation=swiglu",
         "model.position=rope", "model.tie_embeddings=false", "model.bias=false"]  # fmt: skip
INTERLEAVED = ["parallel.schedule=interleaved", "parallel.virtual_stages=2"]
SP = "parallel.sequence_parallel=true"


def axes(pp: int = 1, dp: int = 1, tp: int = 1) -> list[str]:
    return [f"parallel.pp={pp}", f"parallel.dp={dp}", f"parallel.tp={tp}"]


def small(*sets: str) -> Config:
    return load("demo", [*GPT, *sets])


LAYOUTS = {
    "one process": [],
    "all axes": axes(2, 2, 2),
    "all axes, sequence parallel": [*axes(2, 2, 2), SP],
    "uneven": [*axes(3, 4, 1), "optim.sharding=none"],
    "llama": [*axes(2, 3, 2), *LLAMA, SP],
    "interleaved": [*axes(2, 2, 1), *INTERLEAVED],
    "gpipe, wide tp": [*axes(2, 1, 4), "parallel.schedule=gpipe"],
    "one bucket a chunk": [*axes(2, 2, 2), "optim.bucket_mb=25.0"],
    "padded shards, most layers last": [*axes(2, 5, 1), "train.global_batch=60", "parallel.layers=[1, 4]"],
}
EVERY_LAYOUT = pytest.mark.parametrize("sets", LAYOUTS.values(), ids=list(LAYOUTS))


def plans(config: Config) -> list[RankPlan]:
    """Every rank, one by one."""
    return [RankPlan(config, rank) for rank in range(config.world_size)]


def comm(plan: RankPlan) -> dict[str, dict[str, dict[str, int]]]:
    return count_comm(plan, plan.steps).as_dict()


# --- buckets ------------------------------------------------------------------------------------------------------


@EVERY_LAYOUT
def test_every_parameter_of_a_rank_has_exactly_one_place(sets: list[str]) -> None:
    config = small(*sets)
    blocks = split_blocks(config)
    for plan in plans(config):
        held = [slot.param.name for bucket in plan.buckets for slot in bucket.slots]
        mine = [b for chunk, _ in plan.chunks for b in blocks[chunk]]
        expected = {p.name for p in parameter_table(config) if p.block in mine}
        if config.model.tie_embeddings and L + 1 in mine:
            expected.add("embed.weight")
        assert Counter(held) == Counter(expected)


@EVERY_LAYOUT
def test_slots_and_segments_tile_their_bucket(sets: list[str]) -> None:
    config = small(*sets)
    shards = shard_ranks(config)
    assert shards == (1 if config.optim.sharding == "none" else config.parallel.dp)
    for plan in plans(config):
        for index, bucket in enumerate(plan.buckets):
            assert bucket.index == index and bucket.chunk in dict(plan.chunks)
            at = 0
            for slot in bucket.slots:  # no gap, no overlap
                assert slot.start == at
                assert slot.numel == prod(slot.param.local_shape(config.parallel.tp, plan.coords.tp))
                at += slot.numel
            assert at == bucket.numel == bucket.segments[-1].stop
            assert bucket.segments[0].start == 0
            assert all(a.stop == b.start for a, b in zip(bucket.segments, bucket.segments[1:], strict=False))
            assert 0 <= bucket.padded - bucket.numel < shards and bucket.padded % shards == 0
            pieces = [bucket.shard(shards, i) for i in range(shards)]
            assert [e for start, stop in pieces for e in range(start, stop)] == list(range(bucket.padded))


@EVERY_LAYOUT
def test_a_segment_is_of_one_kind_and_partial_gradients_lead(sets: list[str]) -> None:
    for plan in plans(small(*sets)):
        for bucket in plan.buckets:
            for segment in bucket.segments:
                inside = [s for s in bucket.slots if segment.start <= s.start < segment.stop]
                assert inside and {(s.param.kind, s.param.decay) for s in inside} == {(segment.kind, segment.decay)}
            partial = [s for s in bucket.slots if s.param.kind == PARTIAL]
            assert bucket.partial_numel == sum(s.numel for s in partial)
            assert all(s.start + s.numel <= bucket.partial_numel for s in partial)


@pytest.mark.parametrize("limit", ["0.0001", "0.02", "25.0"])
def test_buckets_hold_whole_blocks_down_to_the_limit_in_reverse_order(limit: str) -> None:
    config = small(f"optim.bucket_mb={limit}")
    buckets = make_buckets(config, [(0, tuple(range(L + 2)))], 0)
    blocks = [{slot.param.block for slot in b.slots} for b in buckets]
    assert sorted(block for held in blocks[:-1] for block in held) == list(range(L + 2))  # position is in block 0
    assert buckets[-1].tied and [s.param.name for s in buckets[-1].slots] == ["embed.weight"]
    for bucket, held in zip(buckets[:-1], blocks[:-1], strict=True):
        assert bucket.last_block == min(held)
    lasts = [b.last_block for b in buckets]
    assert lasts == sorted(lasts, reverse=True)
    big_enough = [b.numel * 4 >= float(limit) * 1e6 for b in buckets[:-2]]
    assert all(big_enough)
    assert len(buckets) == {"0.0001": L + 3, "0.02": L + 2, "25.0": 2}[limit]


@pytest.mark.parametrize("sharding", ["none", "zero1"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_tied_bucket_is_equal_on_first_and_last_stage(tp: int, sharding: str) -> None:
    config = small(*axes(3, 5, tp), "train.global_batch=60", f"optim.sharding={sharding}")
    for first in range(5 * tp):
        last = RankPlan(config, first).layout.group("embed", first)[-1]
        pair = [[b for b in RankPlan(config, rank).buckets if b.tied] for rank in (first, last)]
        assert [len(tied) for tied in pair] == [1, 1]
        a, b = pair[0][0], pair[1][0]
        assert (a.slots, a.segments, a.numel, a.padded) == (b.slots, b.segments, b.numel, b.padded)
    assert not any(b.tied for b in RankPlan(config, 5 * tp).buckets)  # the middle stage holds none


# --- traffic ------------------------------------------------------------------------------------------------------


def test_one_process_communicates_nothing() -> None:
    assert comm(RankPlan(small(), 0)) == {}


@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_traffic(tp: int) -> None:
    """arXiv:2104.04473 section 3.2, plus: embedding 1 and head 1 of the same size, and two small ones for the loss."""
    m, hidden = 12, T * H * 4
    measured = comm(RankPlan(small(*axes(tp=tp)), 0))["tp"]
    assert list(measured) == ["all_reduce"]
    assert measured["all_reduce"]["calls"] == formulas.tp_all_reduces(L, m) + 2 * m + 2 * m
    loss = m * (T + 2 * T) * 4
    assert measured["all_reduce"]["payload_bytes"] == 4 * formulas.tp_payload(1, T, H, L, m) + 2 * m * hidden + loss
    deeper = comm(RankPlan(small(*axes(tp=tp), f"model.num_layers={L + 1}"), 0))["tp"]["all_reduce"]
    assert deeper["wire_bytes"] - measured["all_reduce"]["wire_bytes"] == 4 * m * formulas.tp_wire_elements(1, T, H, tp)


def test_sequence_parallel_traffic() -> None:
    """arXiv:2205.05198 section 4.2.2, plus embedding, head, the loss, and the sum of partial gradients per bucket."""
    m, hidden = 12, T * H * 4
    plan = RankPlan(small(*axes(tp=2), SP), 0)
    measured, expected = comm(plan)["tp"], formulas.sequence_parallel_calls(L, m)
    assert measured["all_gather"]["calls"] == expected["all_gather"] + m + 2 * m  # embedding backward; head: two
    assert measured["reduce_scatter"]["calls"] == expected["reduce_scatter"] + 2 * m
    for op in ("all_gather", "reduce_scatter"):
        assert measured[op]["payload_bytes"] == measured[op]["calls"] * hidden
    partial = [b.partial_numel for b in plan.buckets if b.partial_numel]
    assert sum(partial) == L * 6 * H + T * H + 2 * H  # norms and row biases; positions; the last norm
    assert measured["all_reduce"]["calls"] == 2 * m + len(partial)
    assert measured["all_reduce"]["payload_bytes"] == 4 * (m * 3 * T + sum(partial))


@pytest.mark.parametrize("sharding", ["none", "zero1"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("n", [2, 4, 5])
def test_data_parallel_traffic_is_2_psi(n: int, dtype: str, sharding: str) -> None:
    config = small(*axes(dp=n), "train.global_batch=60", f"optim.sharding={sharding}", f"train.dtype={dtype}")
    psi, element = sum(p.numel for p in parameter_table(config)), DTYPE_BYTES[dtype]
    plan = RankPlan(config, n - 1)
    padding = sum(b.padded - b.numel for b in plan.buckets)
    buckets = len(plan.buckets)
    data = comm(plan)["data"]
    ops = ["all_reduce"] if sharding == "none" else ["all_gather", "reduce_scatter"]
    assert list(data) == ops
    assert all(data[op]["calls"] == buckets > 2 for op in ops)
    assert all(data[op]["payload_bytes"] == (psi + padding) * element for op in ops)
    expected = formulas.dp_wire_elements(psi + padding, n, sharding) * element
    assert expected - len(ops) * buckets < sum(data[op]["wire_bytes"] for op in ops) <= expected  # floor per call
    assert (0 < padding < n * buckets) if (n, sharding) == (5, "zero1") else padding == 0  # H divides the others


@pytest.mark.parametrize("schedule", [["parallel.schedule=gpipe"], ["parallel.schedule=1f1b"], INTERLEAVED])
@pytest.mark.parametrize("sp", [[], [SP]])
def test_pipeline_traffic(schedule: list[str], sp: list[str]) -> None:
    """b s h per boundary, micro-batch and direction; sequence parallelism sends each tp rank's tokens once."""
    config = small(*axes(2, 2, 2), *schedule, *sp)
    m, v = 6, config.parallel.virtual_stages
    counted = total(count_comm(plan, plan.steps) for plan in plans(config)).as_dict()["pp"]
    one_way = 4 * formulas.pp_elements(1, T, H, 2, v, m)
    copies = 2 * (1 if sp else 2)  # dp x tp, unless the tokens are split over tp
    assert counted["send"]["payload_bytes"] == counted["send"]["wire_bytes"] == 2 * one_way * copies
    assert counted["send"]["calls"] == counted["recv"]["calls"] == 2 * m * (2 * v - 1) * 4
    assert counted["recv"]["payload_bytes"] == counted["recv"]["wire_bytes"] == 0


def test_the_tied_gradient_is_summed_on_the_reduced_shard() -> None:
    for sharding, part in (("zero1", 2), ("none", 1)):
        config = small(*axes(2, 2, 1), f"optim.sharding={sharding}")
        assert comm(RankPlan(config, 0))["embed"]["all_reduce"] == {
            "calls": 1, "payload_bytes": V * H * 4 // part, "wire_bytes": V * H * 4 // part,
        }  # fmt: skip
    assert "embed" not in comm(RankPlan(small(*axes(2, 2, 1), *LLAMA), 0))
    assert "embed" not in comm(RankPlan(small(*axes(1, 2, 2)), 0))  # one rank holds both ends


@EVERY_LAYOUT
def test_the_whole_job_is_the_sum_over_its_ranks(sets: list[str]) -> None:
    config = small(*sets)
    every = plans(config)
    document = plan_document(config, config.world_size - 1)
    counted = Counts()
    for plan in every:
        counted.merge(count_comm(plan, plan.steps))
    assert document["total"]["comm"] == counted.as_dict()
    assert document["total"]["model_flops"] == sum(count_flops(plan, plan.steps) for plan in every)
    memory = [count_memory(plan, plan.steps) for plan in every]
    assert document["memory_bytes"] == memory[document["peak_rank"]]
    assert document["memory_bytes"]["peak"] == max(m["peak"] for m in memory)
    assert (document["peak_rank"] > 0) == ("parallel.layers=[1, 4]" in sets)
    assert document["comm"] == comm(every[-1]) and document["rank_memory_bytes"] == memory[-1]
    assert document["model_flops"] == count_flops(every[-1], every[-1].steps)
    assert document["parameters"] == stored_parameters(every[-1])


# --- work and memory ----------------------------------------------------------------------------------------------


@EVERY_LAYOUT
def test_model_flops_are_the_textbooks(sets: list[str]) -> None:
    """72 B L s h^2 (1 + s/6h + V/12hL), for any layout and any vocabulary; the same form for Llama."""
    config = small(*sets)
    B, flops = config.train.global_batch, plan_document(config)["total"]["model_flops"]
    if config.model.activation == "swiglu":
        assert flops == formulas.model_flops(B, T, L, H, V, HEADS, 2, 40, True)
    else:
        assert flops == formulas.gpt_model_flops(B, T, L, H, V)


@pytest.mark.parametrize(
    ("sets", "state"),
    [(["optim.name=adamw"], 2), (["optim.name=sgd"], 1), (["optim.name=sgd", "optim.momentum=0.0"], 0)],
)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_bytes_per_parameter(sets: list[str], state: int, dtype: str) -> None:
    """Weights, gradients and AdamW's two averages: 16 bytes per parameter in fp32, state over N with ZeRO-1."""
    e = DTYPE_BYTES[dtype]
    whole = small(*axes(dp=5), "train.global_batch=60", *sets, f"train.dtype={dtype}", "optim.sharding=none")
    psi = sum(p.numel for p in parameter_table(whole))
    memory = count_memory(RankPlan(whole, 0), RankPlan(whole, 0).steps)
    assert [memory[k] for k in ("parameters", "gradients", "optimizer")] == [psi * e, psi * e, psi * e * state]
    shard = small(*axes(dp=5), "train.global_batch=60", *sets, f"train.dtype={dtype}")
    each = [count_memory(plan, plan.steps) for plan in plans(shard)]
    assert sum(m["optimizer"] for m in each) == psi * e * state
    assert max(m["optimizer"] for m in each) - psi * e * state / 5 < 5 * e * 2 * len(RankPlan(shard, 0).buckets)
    assert all(psi * e <= m["parameters"] == m["gradients"] for m in each)
    for m in each:
        assert m["peak"] == sum(value for key, value in m.items() if key != "peak")


def test_activations_grow_with_the_micro_batches_in_flight() -> None:
    """GPipe keeps all, 1F1B p - stage (arXiv:2104.04473 section 2.2): stage 1 of 3 holds whole layers only."""

    def held(schedule: str, m: int) -> int:
        config = small(
            *axes(3), "parallel.layers=[1, 2, 2]", f"parallel.schedule={schedule}", f"train.global_batch={m}"
        )
        plan = RankPlan(config, 1)
        return count_memory(plan, plan.steps)["activations"]

    one = held("1f1b", 1)
    assert [held("1f1b", m) for m in (2, 3, 12)] == [formulas.in_flight_1f1b(3, 1, m) * one for m in (2, 3, 12)]
    assert [held("gpipe", m) for m in (2, 3, 12)] == [2 * one, 3 * one, 12 * one]


# --- steps --------------------------------------------------------------------------------------------------------

SPLIT = """
0F0 0F1 0B0 0F2 0W0 0B1 0W1 0B2 0W2
1F0 1B0 1F1 1B1 1W0 1F2 1B2 1W1 1W2
"""  # weight gradients apart, written by hand; all reductions wait for the last W


SPLIT_SETS = [[*axes(2, 2), "train.global_batch=6", *more] for more in ([], LLAMA)]  # 3 micro-batches
CASES = [*((sets, False) for sets in LAYOUTS.values()), *((sets, True) for sets in SPLIT_SETS)]
EVERY_LIST = pytest.mark.parametrize(("sets", "split"), CASES)


def steps_of(plan: RankPlan, split: bool) -> list[Step]:
    return plan.expand(add_reduce_and_step(add_communication(parse_grid(SPLIT), (0, 1)))) if split else plan.steps


@EVERY_LIST
def test_every_block_and_micro_batch_exactly_once(sets: list[str], split: bool) -> None:
    config = small(*sets)
    for plan in plans(config):
        steps = steps_of(plan, split)
        expected = Counter((b, m) for _, blocks in plan.chunks for b in blocks for m in range(config.micro_batches))
        for kind in (FORWARD, BACKWARD, WEIGHT) if split else (FORWARD, BACKWARD):
            assert Counter((s.block, s.action.micro_batch) for s in steps if s.kind == kind) == expected, kind
        assert split or not any(s.kind == WEIGHT for s in steps)
        assert all(s.split == (split and s.kind == BACKWARD) for s in steps)
        assert [s.kind for s in steps].count(UPDATE) == 1
        assert steps[-1].kind == UPDATE
        gathers = [(i, s.bucket) for i, s in enumerate(steps) if s.kind == GATHER]  # in the order of the forward
        assert gathers == list(enumerate(b.index for b in reversed(plan.buckets))) if plan.stage else not gathers
        assert Counter(s.bucket for s in steps if s.kind == REDUCE) == Counter(b.index for b in plan.buckets)


@EVERY_LIST
def test_a_bucket_is_reduced_right_after_its_last_gradient(sets: list[str], split: bool) -> None:
    for plan in plans(small(*sets)):
        steps = steps_of(plan, split)
        gradient = WEIGHT if split else BACKWARD
        for bucket in plan.buckets:
            # of a tied embedding: the lookup's gradient and the head's
            writers = {0, L + 1} if bucket.tied else {slot.param.block for slot in bucket.slots}
            last = max(i for i, s in enumerate(steps) if s.kind == gradient and s.block in writers)
            (at,) = [i for i, s in enumerate(steps) if s.kind == REDUCE and s.bucket == bucket.index]
            assert at > last
            assert all(s.kind in (REDUCE, SEND) for s in steps[last + 1 : at]), "something was computed between"


def test_work_and_traffic_do_not_depend_on_splitting_weight_gradients() -> None:
    for more in ([], LLAMA, [SP, *axes(2, 1, 2)]):
        config = small(*axes(2), "train.global_batch=3", *more)
        for plan in plans(config):
            split = steps_of(plan, True)
            assert count_flops(plan, split) == count_flops(plan, plan.steps) > 0
            assert count_comm(plan, split).as_dict() == count_comm(plan, plan.steps).as_dict()


def test_an_action_runs_its_blocks_together_forwards_up_and_backwards_down() -> None:
    plan = RankPlan(small(*axes(2), *INTERLEAVED), 0)
    blocks = dict(plan.chunks)
    compute = [s for s in plan.steps if s.kind in (FORWARD, BACKWARD)]
    for action, steps in groupby(compute, key=lambda s: s.action):
        up = list(blocks[action.chunk])
        assert [s.block for s in steps] == (up if action.op is Op.F else up[::-1])
