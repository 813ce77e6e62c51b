"""The parts of which report_document.py makes its documents: budgets, time lines, charts, tables."""

from __future__ import annotations

import math
import random
from typing import Any

from dist_gpt.layout import Layout
from dist_gpt.schedule.action import Action
from dist_gpt.schedule.orders import make_orders, placement
from dist_gpt.schedule.simulate import simulate

Document = dict[str, Any]
COSTS = {"F": 0.0205, "B": 0.0410, "STEP": 0.0151, "REDUCE": 0.004}
SLOW = 5


def budget(rank: int, layout: Layout, noise: random.Random) -> Document:
    """One rank's step of 339 ms: what is left of it is bubble."""
    here, partner = layout.coords(rank), SLOW ^ 1
    slow = 1.35 if rank == SLOW else 1.0
    row = {
        "forward": 0.082 * slow * noise.uniform(0.98, 1.02),
        "backward": 0.121 * slow * noise.uniform(0.98, 1.02),
        "optimizer": 0.0071 * noise.uniform(0.9, 1.1),
        "transfer.tp": 0.0223 * noise.uniform(0.95, 1.05),
        "wait.tp": 0.0688 if rank == partner else 0.0021 * noise.uniform(0.5, 2),
        "transfer.data": 0.0043 * noise.uniform(0.9, 1.1),
        "wait.data": 0.0018 if here.pp == 1 else 0.0012,
        "transfer.pp": 0.0031 * noise.uniform(0.9, 1.1),
        "data": 0.0009,
        "checkpoint": 0.0,
        "descheduled": 0.0052 * noise.uniform(0.5, 1.5),
        "unexplained": 0.0019 * noise.uniform(0.3, 1.5),
    }
    wall = 0.3391
    row["bubble"] = max(wall - sum(row.values()), 0.0)
    return {"rank": rank, "wall_s": sum(row.values()), **row}


def head(name: str, layout: Layout, hosts: list[str], noise: random.Random) -> Document:
    world, per_host = layout.world, -(-layout.world // len(hosts))
    ranks = []
    for rank in range(world):
        c = layout.coords(rank)
        ranks.append({"rank": rank, "pp": c.pp, "dp": c.dp, "cp": c.cp, "tp": c.tp, "host": hosts[rank // per_host],
                      "device": "cpu" if world == 8 else "NVIDIA H100 80GB HBM3", "pid": 4100 + rank})  # fmt: skip
    clocks = [
        {"rank": r, "offset_s": 0.0 if r == 0 else noise.gauss(0, 21e-6) + (3.0 if r > 900 else 0.0),
         "drift_ppm": 0.0 if r == 0 else noise.gauss(0, 4), "error_s": 0.0 if r == 0 else noise.uniform(8e-6, 17e-6),
         "repaired_s": 0.0}
        for r in range(world)
    ]  # fmt: skip
    return {
        "schema": 1,
        "name": name,
        "run_dir": f"runs/{name}",
        "generated": "2026-11-24T10:12:03Z",
        "verdict": {
            "line": f"bound by waiting in the tensor-parallel axis: rank {SLOW} computes 35 % longer than its peers",
            "why": f"10 % of the step (mean over ranks) is exposed tp communication; 3 points of it are spent waiting "
                   f"for rank {SLOW}, which came last in 93 % of the tp collectives.",
            "next": f"Look at what else runs on rank {SLOW}'s cores (n1, pid {4100 + SLOW}); if it stays slow, move "
                    "the rank to another host.",
            "bound_by": "wait.tp", "share": 0.101, "wait_share": 0.031, "culprit": SLOW,
            "profiling": {"step_s_inside": 0.3402, "step_s_outside": 0.3377, "ratio": 1.0074, "record_s": 2.13e-6,
                          "records_per_step": 412.5, "share": 0.0026},
        },
        "problems": [],
        "identity": {
            "world": world,
            "layout": {"pp": layout.pp, "dp": layout.dp, "cp": layout.cp, "tp": layout.tp},
            "changed": [
                {"key": "name", "value": name, "default": "(required)"},
                {"key": "model.num_layers", "value": "4", "default": "(required)"},
                {"key": "model.hidden_size", "value": "128", "default": "(required)"},
                {"key": "parallel.tp", "value": str(layout.tp), "default": "1"},
                {"key": "parallel.pp", "value": str(layout.pp), "default": "1"},
                {"key": "parallel.sequence_parallel", "value": "true", "default": "false"},
                {"key": "optim.sharding", "value": "zero1", "default": "none"},
                {"key": "profile.steps", "value": "[10, 20]", "default": "null"},
            ],
            "ranks": ranks,
            "versions": {"python": "3.11.7", "torch": "2.13.0", "dist_gpt": "0.1", "kernel": "6.1.0-28-amd64"},
            "environment": {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"},
            "backend": "gloo", "clocks": clocks, "attempts": 1, "window": [10, 20], "steps_profiled": 11,
            "steps_total": 200,
        },
        "headline": {
            "step_s_p50": 0.3391, "step_s_p95": 0.3588, "tokens_per_s": 6039.4, "tokens_per_s_per_gpu": 6039.4 / world,
            "tflops_per_gpu": 0.0071, "mfu": 0.412, "hfu": 0.412, "goodput": 0.871, "loss_first": 5.551,
            "loss_last": 2.318,
            "formula": "MFU = model FLOPs per step / (step time x ranks x peak); 6 x parameters + 12 x layers x hidden "
                       "x sequence FLOPs a token (attention not halved for causality)",
            "peak": {"flops_per_s": 17.3e9, "source": "matmul 1024 x 1024 x 1024 measured on this device, fp32"},
            "wall_s": {"train": 67.8, "eval": 3.1, "start": 5.9, "between": 1.0},
        },
    }  # fmt: skip


def costs(budgets: list[Document]) -> Document:
    keys = [key for key in budgets[0] if key not in ("rank", "wall_s")]
    mean = {key: sum(row[key] for row in budgets) / len(budgets) for key in keys}
    useful = 0.412 * 0.3391
    rows = [
        {"what": "model FLOPs at the ceiling", "s": useful},
        {"what": "matmuls below the ceiling", "s": mean["forward"] + mean["backward"] - useful},
        *({"what": key, "s": mean[key]} for key in keys if key not in ("forward", "backward") and mean[key] > 1e-4),
    ]
    total = sum(row["s"] for row in rows)
    return {
        "budget_s": mean,
        "budget_by_rank": budgets,
        "waterfall": [*rows, {"what": "measured step", "s": total}],
        "free": [
            {"axis": "tp", "step_s": 0.2619, "saving": 0.228},
            {"axis": "pp", "step_s": 0.3351, "saving": 0.012},
            {"axis": "data", "step_s": 0.3318, "saving": 0.021},
        ],
        "replay_error": 0.011,
        "overlap": {
            "axes": [
                {"axis": "tp", "busy_s": 0.0229, "exposed_s": 0.0221, "overlapped": 0.035},
                {"axis": "pp", "busy_s": 0.0102, "exposed_s": 0.0031, "overlapped": 0.696},
                {"axis": "data", "busy_s": 0.0221, "exposed_s": 0.0043, "overlapped": 0.805},
                {"axis": "world", "busy_s": 0.0004, "exposed_s": 0.0004, "overlapped": 0.0},
            ],
            "buckets": [
                {
                    "stage": 0,
                    "bucket": 0,
                    "bytes": 1_581_056,
                    "busy_s": 0.0092,
                    "exposed_s": 0.0004,
                    "under": "backward",
                },
                {
                    "stage": 0,
                    "bucket": 1,
                    "bytes": 1_581_056,
                    "busy_s": 0.0088,
                    "exposed_s": 0.0010,
                    "under": "backward",
                },
                {"stage": 1, "bucket": 0, "bytes": 264_192, "busy_s": 0.0041, "exposed_s": 0.0041, "under": "nothing"},
            ],
        },
    }


OPERATIONS = [
    ("tp", "all_gather", 131_072, 56.0, 0.00021, 0.0118, 0.0061),
    ("tp", "reduce_scatter", 131_072, 48.0, 0.00020, 0.0094, 0.0049),
    ("tp", "all_reduce", 2_048, 12.0, 0.00009, 0.0009, 0.0004),
    ("pp", "send", 131_072, 4.0, 0.00042, 0.0030, 0.0),
    ("data", "reduce_scatter", 1_581_056, 2.0, 0.0046, 0.0021, 0.0007),
    ("data", "reduce_scatter", 264_192, 1.0, 0.0011, 0.0007, 0.0002),
    ("data", "all_gather", 1_581_056, 2.0, 0.0041, 0.0011, 0.0004),
    ("data", "all_gather", 264_192, 1.0, 0.0009, 0.0004, 0.0001),
    ("world", "all_reduce", 16, 1.0, 0.00021, 0.0, 0.0),
]


def traffic(layout: Layout) -> Document:
    rows = []
    for axis, op, payload, calls, seconds, exposed, wait in OPERATIONS:
        n = layout.size(axis)
        factor = {"all_reduce": 2 * (n - 1) / n, "send": 1.0}.get(op, (n - 1) / n)
        rows.append({"axis": axis, "op": op, "payload_bytes": payload, "ranks": n, "calls": calls,
                     "bytes_per_step": calls * payload, "time_s_p50": seconds, "time_s_p95": 1.6 * seconds,
                     "algbw_bytes_per_s": payload / seconds, "busbw_bytes_per_s": factor * payload / seconds,
                     "exposed_s": exposed, "wait_s": wait, "emulated": op == "reduce_scatter"})  # fmt: skip
    world = min(layout.world, 8)
    wire = [[0.0] * world for _ in range(world)]
    for rank in range(world):
        for axis, bytes_ in (("tp", 6.9e6), ("dp", 5.1e6), ("pp", 5.2e5)):
            for other in layout.group(axis, rank):
                if other != rank and other < world:
                    wire[rank][other] = bytes_
    bins: dict[str, list[Document]] = {}
    for axis, _, payload, calls, *_ in OPERATIONS:
        low = 2 ** int(math.log2(payload))
        bins.setdefault(axis, []).append({"low": low, "high": 2 * low, "calls": calls})
    return {
        "collectives": rows,
        "traffic": {"ranks": list(range(world)), "wire_bytes": wire, "grouped": False},
        "sizes": [{"axis": axis, "bins": rows} for axis, rows in bins.items()],
    }


def cost(rank: int, action: Action) -> float:
    return COSTS[str(action.op)] * (1.12 if rank == 0 else 1.0)


def pipeline(schedule: str, stages: int, virtual: int, micro_batches: int) -> Document:
    orders, where = make_orders(schedule, stages, virtual, micro_batches), placement(schedule, stages, virtual)
    ideal = simulate(orders, where, cost)
    measured = simulate(orders, where, lambda rank, a: cost(rank, a) * (1.3 if rank else 1.04), 0.0021)
    charts = [
        [
            [[span.start, span.end, str(span.action)] for span in row if str(span.action.op) in COSTS]
            for row in line.spans
        ]
        for line in (measured, ideal)
    ]
    return {
        "schedule": schedule, "micro_batches": micro_batches,
        "bubble": {"measured": 0.236, "structural": 0.171, "imbalance": 0.052, "transfer": 0.013, "simulated": 0.219,
                   "planned": 0.2},
        "stages": [{"stage": s, "forward_s": 0.021 + 0.002 * s, "backward_s": 0.041, "weight_s": None, "busy": 0.78}
                   for s in range(stages)],
        "measured": charts[0], "ideal": charts[1],
        "advice": f"{2 * micro_batches} micro-batches instead of {micro_batches} would halve the structural bubble.",
    }  # fmt: skip


def timeline(rank: int, layout: Layout, blocks: int = 2) -> Document:
    """One step of a rank: blocks inside every action, tensor-parallel calls between them, reductions at the end."""
    stage, where = layout.coords(rank).pp, placement("1f1b", min(layout.pp, 4), 1)
    line = simulate(make_orders("1f1b", min(layout.pp, 4), 1, 4), where, cost, 0.002).spans[min(stage, 3)]
    lanes: dict[str, list[list[Any]]] = {"compute": [], "tp": [], "pp": [], "data": []}
    for span in line:
        name, length = str(span.action), (span.end - span.start) / blocks
        kind = {"F": "forward", "B": "backward"}.get(str(span.action.op))
        if kind is None:
            lanes["pp"].append([span.end - 0.002, span.end, "overlapped", f"send {name}"])
            continue
        for block in range(blocks):
            start = span.start + block * length
            late = 0.35 * length if rank == SLOW ^ 1 else 0.0
            lanes["compute"].append([start, start + 0.86 * length - late, kind, f"{name} block {block}"])
            if late:
                lanes["tp"].append([start + 0.86 * length - late, start + 0.86 * length, "wait", "all_gather 128 kB"])
            lanes["tp"].append([start + 0.86 * length, start + length, "transfer", "all_gather 128 kB"])
    end = max(span.end for span in line)
    lanes["data"] += [[end - 0.021, end - 0.004, "overlapped", "reduce_scatter 1.6 MB"],
                      [end, end + 0.004, "transfer", "reduce_scatter 264 kB"]]  # fmt: skip
    lanes["compute"].append([end + 0.004, end + 0.011, "optimizer", "STEP"])
    return {"rank": rank, "lanes": [{"lane": lane, "spans": spans} for lane, spans in lanes.items()]}


def stragglers(ranks: list[int], steps: list[int], noise: random.Random) -> Document:
    n = min(len(ranks), 64)
    matrix = [[0.0] * n for _ in range(n)]
    for culprit in range(n):
        for victim in range(n):
            if victim == culprit ^ 1:
                matrix[culprit][victim] = 0.0668 if culprit == SLOW else noise.uniform(0.0002, 0.002)
            elif culprit == SLOW and victim % 4 == SLOW % 4:
                matrix[culprit][victim] = 0.0031
    compute = [[0.203 * noise.uniform(0.98, 1.03) * (1.35 if r == SLOW else 1.0) for _ in steps] for r in ranks]
    for row in compute[: len(ranks) // 2]:
        row[3] *= 1.12
    return {
        "matrix_s": matrix, "ranks": ranks[:n],
        "heat": {"steps": steps, "ranks": ranks, "compute_s": compute},
        "culprits": [
            {"rank": SLOW, "caused_s": 0.0699, "last_share": 0.93, "kind": "persistent",
             "axes": {"tp": 0.0668, "data": 0.0031}},
            {"rank": 2, "caused_s": 0.0014, "last_share": 0.31, "kind": "transient", "axes": {"tp": 0.0014}},
        ],
        "slow_compute": [{"rank": SLOW, "ratio": 1.35}],
    }  # fmt: skip


def memory(rank: int, layout: Layout) -> Document:
    stage = layout.coords(rank).pp
    parts = {"parameters": 3.4e6, "gradients": 3.4e6, "optimizer": 6.8e6 / 2, "activations": 21.5e6 / (1 + stage),
             "buffers": 1.6e6}  # fmt: skip
    measured = {key: value * (1 + 0.01 * (rank % 3)) for key, value in parts.items()}
    predicted = parts | {"peak": sum(parts.values()) * 0.97}
    return {"rank": rank, "predicted": predicted, "measured": measured | {"peak": sum(measured.values()) * 0.98},
            "allocated_peak": sum(measured.values()), "source": "mallinfo2", "rss": 412e6 + 1e6 * rank}  # fmt: skip


def tail() -> Document:
    kernels = []
    for name, m, k, n, speed in (("attention.qkv", 256, 128, 192, 9.1e9), ("attention.core", 128, 32, 128, 4.2e9),
                                 ("attention.out", 256, 64, 128, 8.0e9), ("mlp.up", 256, 128, 256, 12.1e9),
                                 ("mlp.down", 256, 256, 128, 11.7e9), ("head", 256, 128, 128, 9.8e9)):  # fmt: skip
        work, traffic = 2 * m * k * n, 4 * (m * k + k * n + m * n)
        kernels.append({"name": name, "shape": [m, k, n], "batch": 1, "flops": work, "bytes": traffic,
                        "seconds": work / speed, "flops_per_s": speed, "share_of_ceiling": speed / 17.3e9})  # fmt: skip
    path = [(SLOW, "backward", 0.131), (SLOW, "forward", 0.094), (0, "forward", 0.041),
            (SLOW, "transfer.tp", 0.028),
            (0, "backward", 0.022), (1, "transfer.pp", 0.009), (4, "optimizer", 0.0141)]  # fmt: skip
    return {
        "predicted": [
            {"what": "tp all_gather bytes a step, rank 0", "predicted": 7_340_032, "measured": 7_340_032, "error": 0.0,
             "unit": "B", "must_be_equal": True},
            {"what": "data reduce_scatter bytes a step, rank 0", "predicted": 3_426_304, "measured": 3_426_304,
             "error": 0.0, "unit": "B", "must_be_equal": True},
            {"what": "peak memory, rank 0", "predicted": 32.2e6, "measured": 32.6e6, "error": 0.012, "unit": "B",
             "must_be_equal": False},
            {"what": "bubble", "predicted": 0.2, "measured": 0.236, "error": 0.18, "unit": "share",
             "must_be_equal": False},
            {"what": "step time", "predicted": None, "measured": 0.3391, "error": None, "unit": "s",
             "must_be_equal": False},
        ],
        "roofline": {"ceiling": {"flops_per_s": 17.3e9, "bytes_per_s": 6.2e9, "dtype": "fp32",
                                 "source": "a large matmul and a large copy on rank 0"}, "kernels": kernels},
        "critical_path": {"step_s": 0.3391, "parts": [{"rank": r, "what": w, "s": s, "share": s / 0.3391}
                                                      for r, w, s in path]},
        "torch_kernels": [
            {"rank": 0, "action": "forward", "name": "aten::mm", "s": 0.0412, "calls": 96},
            {"rank": 0, "action": "forward", "name": "aten::_scaled_dot_product_flash_attention_for_cpu", "s": 0.0121,
             "calls": 16},
            {"rank": 0, "action": "backward", "name": "aten::mm", "s": 0.0803, "calls": 192},
        ],
        "device_samples": [{"rank": r, "at_s": float(t), "sm_clock_hz": 1.98e9 - 3e7 * (t % (4 + r)),
                            "power_w": 610.0 + 9 * t - r, "temperature_c": 51 + t + r / 4}
                           for r in (0, 4) for t in range(12)],
        "accounting": {"exact": True, "differences": [], "lines": []},
        "definitions": [
            ["exposed", "a rank computes nothing because it waits for communication"],
            ["transfer", "from the last arrival at a collective to its last end"],
            ["wait", "from a rank's own arrival to the last arrival; charged to the rank that came last"],
            ["busbw", "bus bandwidth as nccl-tests defines it, with the group's own number of ranks"],
        ],
        "files": ["config.yaml (1.2 kB)", "plan.json (48 kB)", *[f"events.rank{r}.jsonl (212 kB)" for r in range(8)]],
    }  # fmt: skip
