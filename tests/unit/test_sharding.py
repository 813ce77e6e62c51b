"""Sharded state and recomputation as the step list has them: traffic against the textbook, what is gathered when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config
from dist_gpt.events import scatter_room
from dist_gpt.layout import Layout
from dist_gpt.params import parameter_table
from dist_gpt.plan.buffers import needs_room, peak_transients, scatter_bytes
from dist_gpt.plan.count import count_comm, count_memory, count_recomputed, peak_activations, rank_kinds
from dist_gpt.plan.flops import flops_document
from dist_gpt.plan.memory import _finished
from dist_gpt.plan.steps import RankPlan, layout_of
from dist_gpt.schedule.expand import BACKWARD, FORWARD, FREE, GATHER, RECOMPUTE, REDUCE, UPDATE, WEIGHT, Step
from tests.unit.test_plan import LLAMA, L, axes, small

STAGES = ("none", "zero1", "zero2", "zero3")
PIPELINES = {
    "one stage": axes(dp=4),
    "1f1b": axes(2, 2, 1),
    "gpipe": [*axes(2, 2, 1), "parallel.schedule=gpipe"],
    "interleaved": [*axes(2, 2, 1), "parallel.schedule=interleaved", "parallel.virtual_stages=2", "model.num_layers=6"],
    "tensor": axes(1, 2, 2),
}


def of(*sets: str, batch: int = 48, dtype: str = "fp32") -> Config:
    return small(*sets, f"train.global_batch={batch}", f"train.dtype={dtype}")


def elements(plan: RankPlan) -> int:
    """Psi of a rank, padding included."""
    return sum(b.padded for b in plan.buckets)


def data_payload(plan: RankPlan) -> dict[str, int]:
    """Elements on the data axis in one step, by operation."""
    counts = count_comm(plan, plan.steps).as_dict().get("data", {})
    return {op: tally["payload_bytes"] // plan.element for op, tally in counts.items()}


class TestTextbook:
    """arXiv:1910.02054, section 7, with m micro-batches: each rank moves (n - 1) / n of it."""

    @pytest.mark.parametrize("n", [2, 4])
    @pytest.mark.parametrize("m", [1, 3])
    @pytest.mark.parametrize("family", [[], LLAMA])
    def test_elements_a_step(self, n: int, m: int, family: list[str]) -> None:
        def plan(*sets: str) -> RankPlan:
            return RankPlan(of(*axes(dp=n), *family, *sets, batch=n * m), 0)

        none = plan("optim.sharding=none")
        assert data_payload(none) == {"all_reduce": elements(none)}  # on the wire twice
        one = plan("optim.sharding=zero1")
        assert data_payload(one) == {"reduce_scatter": elements(one), "all_gather": elements(one)}
        two = plan("optim.sharding=zero2")
        assert data_payload(two) == {"reduce_scatter": m * elements(two), "all_gather": elements(two)}
        kept = plan("optim.sharding=zero3", "optim.reshard=step")
        assert data_payload(kept) == {"reduce_scatter": m * elements(kept), "all_gather": elements(kept)}

        # resharded: 2 m gathers and m reductions, of the layers exactly; the embedding's backward reads no weight, and
        # the head is kept from its forward to the backward that follows at once
        three = plan("optim.sharding=zero3")
        layers = sum(b.padded for b in three.buckets if set(b.blocks) <= set(range(1, L + 1)))
        first = sum(b.padded for b in three.buckets if b.blocks == (0,))
        head = sum(b.padded for b in three.buckets if L + 1 in b.blocks)
        assert layers + first + head == elements(three)
        again = sum(b.padded for b in three.buckets if 0 in b.blocks and L + 1 in b.blocks)  # tied: gathered twice
        gathered = m * (2 * layers + first + head + again)
        assert data_payload(three) == {"reduce_scatter": m * elements(three), "all_gather": gathered}
        assert gathered <= 2 * m * elements(three)

    @pytest.mark.parametrize("stage", STAGES)
    def test_wire_bytes_are_the_rings(self, stage: str) -> None:
        plan = RankPlan(of(*axes(dp=4), f"optim.sharding={stage}"), 0)
        for op, tally in count_comm(plan, plan.steps).as_dict()["data"].items():
            factor = 2 if op == "all_reduce" else 1
            assert tally["wire_bytes"] == factor * tally["payload_bytes"] * 3 // 4

    def test_reductions_may_be_narrower_than_gradients(self) -> None:
        wide = RankPlan(of(*axes(dp=4), "optim.sharding=zero2"), 0)
        narrow = RankPlan(of(*axes(dp=4), "optim.sharding=zero2", "optim.reduce_dtype=bf16"), 0)
        both = [count_comm(p, p.steps).as_dict()["data"]["reduce_scatter"]["payload_bytes"] for p in (wide, narrow)]
        assert both[0] == 2 * both[1]


def gathered_at(plan: RankPlan, steps: Sequence[Step]) -> list[tuple[Step, set[int]]]:
    """For each step, the buckets whose parameters are there. Gathering or freeing twice is an error."""
    there: set[int] = set()
    found = []
    for step in steps:
        if step.kind == GATHER:
            assert step.bucket not in there, f"{step}: it is there"
            there.add(step.bucket or 0)
        elif step.kind == FREE:
            assert step.bucket in there, f"{step}: it is not there"
            there.discard(step.bucket or 0)
        found.append((step, set(there)))
    assert not there, "left gathered"
    return found


@pytest.mark.parametrize("reshard", ["pass", "step"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("pipeline", PIPELINES)
class TestStage3:
    def plans(self, pipeline: str, recompute: str, reshard: str) -> list[RankPlan]:
        sets = [*PIPELINES[pipeline], "optim.sharding=zero3", f"train.recompute={recompute}"]
        return [kind.plan for kind in rank_kinds(of(*sets, f"optim.reshard={reshard}"))]

    def test_what_is_read_is_there(self, pipeline: str, recompute: str, reshard: str) -> None:
        for plan in self.plans(pipeline, recompute, reshard):
            for steps in (plan.steps, plan.eval_steps):
                for step, there in gathered_at(plan, steps):
                    if step.kind in (FORWARD, RECOMPUTE) or (step.kind == BACKWARD and step.block):
                        used = {
                            b.index for b in plan.buckets if b.chunk == step.action.chunk and step.block in b.blocks
                        }
                        assert used and used <= there, step

    def test_at_most_two_blocks_are_gathered(self, pipeline: str, recompute: str, reshard: str) -> None:
        for plan in self.plans(pipeline, recompute, reshard):
            block = {
                b.index: b.blocks[0] for b in plan.buckets if len(b.blocks) == 1
            }  # a tied embedding is of either end
            most = max(len({block[i] for i in there if i in block}) for _, there in gathered_at(plan, plan.steps))
            if reshard == "pass":
                assert most <= 2
            elif pipeline == "one stage":
                assert most > 2

    def test_a_gather_runs_under_the_block_before(self, pipeline: str, recompute: str, reshard: str) -> None:
        """But for the very first, something is computed between each gather and its use."""
        computes = (FORWARD, RECOMPUTE, BACKWARD, WEIGHT)
        for plan in self.plans(pipeline, recompute, reshard):
            kinds = [step.kind for step in plan.steps]
            first = next(i for i, kind in enumerate(kinds) if kind in computes)
            for i, step in enumerate(plan.steps):
                if step.kind == GATHER and i > first:
                    after = [s for s in plan.steps[i + 1 :] if s.kind in computes]
                    blocks = plan.buckets[step.bucket or 0].blocks
                    assert after[0].block not in blocks or after[0].action.chunk != step.action.chunk, step


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_micro_batch_is_reduced_once_its_gradients_are_there(stage: str, pipeline: str) -> None:
    for kind in rank_kinds(of(*PIPELINES[pipeline], f"optim.sharding={stage}")):
        plan, seen = kind.plan, set()
        for step in plan.steps:
            if step.kind == BACKWARD:
                seen.add((step.action.chunk, step.action.micro_batch, step.block))
            elif step.kind == REDUCE:
                bucket = plan.buckets[step.bucket or 0]
                assert all((bucket.chunk, step.action.micro_batch, block) in seen for block in bucket.blocks), step
        micro_batches = plan.config.micro_batches
        assert sum(s.kind == REDUCE for s in plan.steps) == micro_batches * len(plan.buckets)
        assert plan.steps[-1].kind in (UPDATE, FREE)


class TestInsideANode:
    def test_the_groups(self) -> None:
        config = of(*axes(dp=4, tp=2), "launch.nodes=2", "optim.sharding=zero1", "optim.shard_group=node")
        layout = layout_of(config)
        assert layout == Layout(dp=4, tp=2, shard=2)
        assert [layout.group("shard", r) for r in (0, 1, 4, 7)] == [(0, 2), (1, 3), (4, 6), (5, 7)]
        assert [layout.group("replica", r) for r in (0, 3, 6)] == [(0, 4), (3, 7), (2, 6)]
        for rank in range(8):
            node = {other // 4 for other in layout.group("shard", rank)}
            assert node == {rank // 4}, "shards leave the node"

    @pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
    def test_alone_in_a_node_there_is_nothing_to_share(self, stage: str) -> None:
        with pytest.raises(ConfigError, match="shards nothing.*one data rank of 2"):
            of(*axes(dp=2, tp=2), "launch.nodes=2", f"optim.sharding={stage}", "optim.shard_group=node")

    @pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
    def test_across_nodes_only_shards_go_and_once(self, stage: str) -> None:
        config = of(*axes(dp=4), "launch.nodes=2", f"optim.sharding={stage}", "optim.shard_group=node")
        plan = RankPlan(config, 0)
        counts = count_comm(plan, plan.steps).as_dict()
        assert "data" not in counts and set(counts) == {"shard", "replica", "world"}
        assert counts["replica"]["all_reduce"]["payload_bytes"] == elements(plan) // 2 * plan.element
        assert plan.shards == 2 and plan.replicas == 2
        whole = RankPlan(of(*axes(dp=4), f"optim.sharding={stage}"), 0)
        assert count_memory(plan, plan.steps)["optimizer"] > count_memory(whole, whole.steps)["optimizer"]


class TestRecompute:
    @pytest.mark.parametrize("family", [[], LLAMA])
    @pytest.mark.parametrize("recompute", ["none", "selective", "full"])
    @pytest.mark.parametrize("layout", [axes(), axes(2), axes(1, 1, 2)])
    def test_flops_are_those_of_the_flops_verb(self, layout: list[str], recompute: str, family: list[str]) -> None:
        config = of(*layout, *family, f"train.recompute={recompute}")
        verb = flops_document(config)
        extra = verb["hardware_flops_per_token"] - verb["model_flops_per_token"]
        tokens = config.train.global_batch * config.model.seq_len
        found = sum(kind.ranks * count_recomputed(kind.plan, kind.plan.steps) for kind in rank_kinds(config))
        assert found == extra * tokens
        assert (found > 0) == (recompute != "none")

    def test_less_is_kept(self) -> None:
        kept = {}
        for recompute in ("none", "selective", "full"):
            plan = RankPlan(of(*axes(2), f"train.recompute={recompute}"), 0)
            kept[recompute] = peak_activations(plan, plan.steps)
        assert kept["full"] < kept["selective"] < kept["none"]

    def test_right_before_the_backward_of_its_block(self) -> None:
        plan = RankPlan(of(*axes(2), "train.recompute=full"), 1)
        for i, step in enumerate(plan.steps):
            if step.kind == BACKWARD and 1 <= (step.block or 0) <= L:
                before = plan.steps[i - 1]
                assert (before.kind, before.block) == (RECOMPUTE, step.block)
                assert before.action.micro_batch == step.action.micro_batch
        assert not [s for s in plan.steps if s.kind == RECOMPUTE and s.block in (0, L + 1)]


def test_transient_buffers_of_one_bucket_each() -> None:
    """Stage 3, one data bucket per block: two gathered, one gradient filling and one on its way, at most."""
    plan = RankPlan(of(*axes(dp=4), *LLAMA, "optim.sharding=zero3"), 0)
    largest = max(b.padded for b in plan.buckets) * plan.element
    assert largest < peak_transients(plan, plan.steps) <= 4 * largest
    whole = RankPlan(of(*axes(dp=4), "optim.sharding=zero1"), 0)
    assert peak_transients(whole, whole.steps) == 0
    cast = RankPlan(of(*axes(dp=4), "optim.sharding=zero1", "optim.reduce_dtype=bf16"), 0)
    sizes = [b.padded * 2 for b in cast.buckets]
    assert peak_transients(cast, cast.steps) == max(map(sum, zip(sizes, sizes[1:], strict=False)))


def test_receive_buffers_of_gloo() -> None:
    """Of two reductions in stage 1, of one in stages 2 and 3, without one's own part where ranks send it themselves:
    between two, and where it is large. NCCL needs none, nor do ranks that read each other's memory."""
    for stage, together in (("zero1", 2), ("zero2", 1)):
        for ranks, share in ((2, 0.5), (4, 1.0)):
            plan = RankPlan(of(*axes(dp=ranks), f"optim.sharding={stage}", "launch.single_copy=off"), 0)
            sizes = [b.padded * 4 * share for b in plan.buckets]
            expected = max(sum(sizes[i : i + together]) for i in range(len(sizes)))
            assert scatter_bytes(plan, plan.steps) == expected
            plan = RankPlan(of(*axes(dp=ranks), f"optim.sharding={stage}"), 0)
            assert scatter_bytes(plan, plan.steps) == 0
    assert [scatter_room(1 << 20, 4), scatter_room(1 << 24, 4)] == [1 << 20, 3 << 22]
    plan = RankPlan(of(*axes(dp=4), "optim.sharding=zero1", "launch.backend=nccl"), 0)
    assert scatter_bytes(plan, plan.steps) == 0


def test_ranks_on_several_nodes_do_not_read_each_others_memory() -> None:
    """Four data ranks with two tensor ranks each, on two nodes: data ranks are on both, unless state is sharded in a
    node."""
    wanted = {"data": True, "node": False}
    for group, room in wanted.items():
        more = ("optim.sharding=zero1", "launch.nodes=2", "launch.ranks_per_node=4", f"optim.shard_group={group}")
        plan = RankPlan(of(*axes(dp=4, tp=2), *more), 5)
        assert needs_room(plan) == room == (scatter_bytes(plan, plan.steps) > 0)


@pytest.mark.parametrize("family", [[], LLAMA])
def test_gradients_that_wait_for_the_weight_step(family: list[str]) -> None:
    """Of every parameter that no product of the weight step makes; by the table's names."""
    config = of(*axes(dp=2), *family, "optim.sharding=zero2")
    names = ("norm", "position", "attn.out.bias", "mlp.down.bias")
    for block in range(L + 2):
        rows = [p for p in parameter_table(config) if p.block == block and any(name in p.name for name in names)]
        assert _finished(config, block) == sum(p.numel for p in rows)
