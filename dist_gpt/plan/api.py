"""Documents of `plan` and `flops`, and their text. Torch-free: a login node can make them.

Everything here is a fold over the steps' declarations (`steps.RankPlan.declare`). Ranks that do the same work are
counted once and multiplied, and the schedule is checked and simulated once, so a plan for thousands of ranks is quick.
"""

from __future__ import annotations

from typing import Any

from dist_gpt.config.schema import Config, TrainConfig
from dist_gpt.events import Counts
from dist_gpt.layout import BASE_AXES
from dist_gpt.plan.buffers import needs_room
from dist_gpt.plan.count import (
    count_comm,
    count_flops,
    count_memory,
    count_recomputed,
    rank_kinds,
    stored_parameters,
    total_parameters,
)
from dist_gpt.plan.flops import flops_document
from dist_gpt.plan.steps import RankPlan, layout_of
from dist_gpt.plan.text import flops_text, plan_text
from dist_gpt.plan.timeline import schedule_document, simulated_bubble

__all__ = ["flops_document", "flops_text", "plan_document", "plan_text", "simulated_bubble"]


def plan_document(config: Config, rank: int = 0) -> dict[str, Any]:
    """Return the plan of a resolved configuration, as `dist-gpt plan --json` prints it and plan.json holds it.

    `parameters` (elements stored), `model_flops` and `comm` are those of rank `rank` for one training step; `total` is
    for the whole job, with each parameter counted once; `memory_bytes` is for the rank that needs most, `peak_rank`
    (the first such rank), and `rank_memory_bytes` for `rank`. `bubble` is simulated, with FLOPs as the cost of an
    action; keys that need a cluster's speeds are null. Raises ScheduleError if the schedule is incomplete or would
    deadlock, ValueError if `rank` is outside the world.
    """
    layout = layout_of(config)
    coords = layout.coords(rank)
    schedule = schedule_document(config)
    plan = RankPlan(config, rank)
    total, memory_bytes, peak_rank = _whole_job(config)
    return {
        "schema": 1,
        "name": config.name,
        "rank": rank,
        "coords": {axis: getattr(coords, axis) for axis in BASE_AXES},
        "layout": _layout_document(config),
        "parameters": stored_parameters(plan),
        "model_flops": count_flops(plan, plan.steps),
        "recompute_flops": count_recomputed(plan, plan.steps),
        "comm": count_comm(plan, plan.steps).as_dict(),
        "total": total,
        "memory_bytes": memory_bytes,
        "peak_rank": peak_rank,
        "rank_memory_bytes": count_memory(plan, plan.steps),
        "notes": _notes(config),
        "schedule": schedule,
        "bubble": schedule["simulated_bubble"],
        **dict.fromkeys(("step_s", "tokens_per_s", "tflops_per_gpu", "mfu", "hfu", "budget_s")),
    }


def _notes(config: Config) -> list[str]:
    """Return notes on what the numbers assume, and on settings without effect."""
    notes = []
    if config.optim.engine == "deepspeed":
        notes.append("comm: excludes DeepSpeed's own communication; memory: DeepSpeed's peak during a step")
        whole = 4 * max(stored_parameters(kind.plan) for kind in rank_kinds(config))
        held = f"every rank holds all its parameters in float32, {whole / 1e9:.3g} GB"
        notes.append(f"start: before the first step {held}")
    if config.model.attention_dropout:
        notes.append(
            "activations: attention dropout is counted as fused; on a CPU it is not fused and keeps T x T more values"
        )
    o, t, plan = config.optim, config.train, RankPlan(config, 0)
    if t.dtype in ("bf16", "fp16") and config.launch.backend != "nccl":
        notes.append(
            f"activations: a CPU without {t.dtype} instructions computes attention in float32, and keeps more bytes"
        )
    if o.sharding in ("zero2", "zero3") and plan.layout.data == 1:  # zero1 is the default
        notes.append(f"optim.sharding {o.sharding} with one data rank: there is no other rank to share state with")
    if t.dtype != "fp16" and t.loss_scale != TrainConfig.model_fields["loss_scale"].default:
        notes.append(f"train.loss_scale {t.loss_scale:g} with train.dtype {t.dtype}: the loss is scaled with fp16 only")
    if o.shard_group == "node" and config.launch.nodes == 1:
        notes.append("optim.shard_group node on one node: the group is all data ranks, as with shard_group data")
    if o.offload and config.launch.backend != "nccl":
        notes.append("host: on a CPU, host memory is the same memory and adds to the peak, so offload saves none")
    if config.launch.backend == "auto" and plan.stage and needs_room(plan):
        notes.append("buffers: counted for gloo; with --set launch.backend=nccl, reductions need none")
    return notes


def _layout_document(config: Config) -> dict[str, Any]:
    p, o, t = config.parallel, config.optim, config.train
    return {
        "world": config.world_size,
        "pp": p.pp,
        "dp": int(p.dp),
        "cp": p.cp,
        "tp": p.tp,
        "sequence_parallel": p.sequence_parallel,
        "virtual_stages": p.virtual_stages,
        "schedule": p.schedule,
        "sharding": o.sharding,
        "engine": o.engine,
        "shard_group": o.shard_group,
        "reshard": o.reshard,
        "offload": o.offload,
        "dtype": t.dtype,
        "grad_dtype": o.grad_dtype,
        "reduce_dtype": o.reduce_dtype,
        "state_dtype": o.state_dtype,
        "loss_scale": t.loss_scale if t.dtype == "fp16" else None,
        "recompute": t.recompute,
        "global_batch": t.global_batch,
        "micro_batch": t.micro_batch,
        "micro_batches": config.micro_batches,
        "seq_len": config.model.seq_len,
    }


def _whole_job(config: Config) -> tuple[dict[str, Any], dict[str, int], int]:
    """Return `total`, and the memory and number of the rank that needs most."""
    comm, flops = Counts(), 0
    worst: dict[str, int] = {}
    worst_rank = 0
    for kind in rank_kinds(config):
        plan, steps = kind.plan, kind.plan.steps
        comm.merge(count_comm(plan, steps), kind.ranks)
        flops += kind.ranks * count_flops(plan, steps)
        memory = count_memory(plan, steps)
        if not worst or memory["peak"] > worst["peak"]:
            worst, worst_rank = memory, plan.rank
    total = {"parameters": total_parameters(config), "model_flops": flops, "comm": comm.as_dict()}
    return total, worst, worst_rank
