"""Measure training steps on one GPU: speed, memory, and how often the host waits.

MFU is model FLOPs (as `dist-gpt flops` counts them, without recomputation) over the published peak of the device; the
fastest matmul of the section `ceiling` serves as a second reference. Weights are random and made on the device.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check.cases import config_of, tiny
from benchmarks.gpu_check.section import Context
from dist_gpt.comm.mesh import FakeBackends
from dist_gpt.config.schema import Config
from dist_gpt.plan.api import plan_document
from dist_gpt.plan.flops import flops_document
from dist_gpt.plan.peaks import published_peak
from dist_gpt.replica import Rank, Samples

GPT2_124M = {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "seq_len": 1024, "vocab_size": 50257}
LLAMA_1B = {
    "num_layers": 16, "hidden_size": 2048, "num_heads": 32, "num_kv_heads": 8, "ffn_size": 8192, "seq_len": 2048,
    "vocab_size": 32000,
}  # fmt: skip
WARM_UP, LEAST_STEPS, CASE_S = 3, 3, 10.0
ROOM = 0.9
"""Fraction of the device's memory that a model's planned peak may take."""


def cases(small: bool) -> dict[str, Config]:
    """Return {name: configuration}, the most informative first."""
    if small:
        return {"gpt2-tiny bf16": tiny("gpt2", "bf16"), "llama-tiny fp32": tiny("llama")}
    train = {"global_batch": 16, "micro_batch": 16}
    found = {
        "gpt2-124m bf16": config_of("gpt2", GPT2_124M, {**train, "dtype": "bf16"}),
        "llama-1b bf16": config_of("llama", LLAMA_1B, {"global_batch": 4, "micro_batch": 4, "dtype": "bf16"}),
        "gpt2-124m fp32": config_of("gpt2", GPT2_124M, {**train, "dtype": "fp32"}),
        "gpt2-124m bf16, 4 micro-batches": config_of(
            "gpt2", GPT2_124M, {"global_batch": 16, "micro_batch": 4, "dtype": "bf16"}
        ),
        "gpt2-124m bf16, full recompute": config_of("gpt2", GPT2_124M, {**train, "dtype": "bf16", "recompute": "full"}),
    }
    found["gpt2-124m bf16, dropout 0.1"] = config_of("gpt2", {**GPT2_124M, "dropout": 0.1}, {**train, "dtype": "bf16"})
    return found


def run(context: Context) -> None:
    """Measure the cases until the time runs out."""
    for name, config in cases(context.small).items():
        if context.left_s() < 10:
            context.put(name, "not measured: no time left")
            continue
        context.attempt(name, measure, context, name, config)
        context.device.empty()


def measure(context: Context, name: str, config: Config) -> None:
    """Report the figures of one case."""
    device, planned = context.device, plan_document(config)["memory_bytes"]["peak"]
    total = device.total_memory()
    if total is not None and planned > ROOM * total:
        context.put(name, f"not measured: the plan needs {planned:,} bytes, and the device has {total:,}")
        return
    baseline = device.reset_peak()
    replica = Rank(config, 0, FakeBackends(), device.torch_device)
    try:
        fill(replica)
        batch = random_samples(config)
        for step in range(WARM_UP):
            train(replica, step, batch)
        peak = device.peak()
        times, host = timed_steps(context, replica, batch)
        waits = device.waits(lambda: replica.train_step(0, batch))
        context.put(name, figures(context, config, times, host))
        context.put(f"{name}, memory", memory_figures(planned, peak, baseline))
        context.put(f"{name}, host waits in a step", {"count": sum(waits.values()), "places": waits})
    finally:
        replica.close()


def fill(replica: Rank) -> None:
    """Fill the model with random weights on the device: drawing 1e9 on a CPU, as training does, takes half a minute."""
    with torch.no_grad():
        for index, flat in enumerate(replica.buffers.buckets):
            flat.parameters.normal_(std=0.02)
            if replica.optimizer.separate:
                replica.optimizer.masters[index].copy_(flat.parameter_shard)


def random_samples(config: Config) -> Samples:
    """Return a reader of one batch of random tokens, the same in every step."""
    shape = (config.train.global_batch, config.model.seq_len + 1)
    ids = np.random.Generator(np.random.Philox(key=[0, 0])).integers(0, int(config.model.vocab_size or 0), size=shape)
    return lambda first, count: ids[first : first + count]


def train(replica: Rank, step: int, batch: Samples) -> float:
    """Train a step and read its loss, as training does. Return the seconds that the host took to issue the step."""
    began = time.perf_counter()
    replica.train_step(step, batch)
    issued = time.perf_counter() - began
    loss, _ = replica.optimizer.statistics.tolist()
    if loss != loss:
        raise ArithmeticError("the loss is not a number (NaN)")
    return issued


def timed_steps(context: Context, replica: Rank, batch: Samples) -> tuple[list[float], list[float]]:
    """Train for about CASE_S seconds. Return the seconds of each step, and those that the host took to issue it."""
    times: list[float] = []
    host: list[float] = []
    until = time.perf_counter() + min(0.2 if context.small else CASE_S, context.left_s() / 2)
    while len(times) < LEAST_STEPS or time.perf_counter() < until:
        began = time.perf_counter()
        host.append(train(replica, len(times), batch))
        times.append(time.perf_counter() - began)
    return times, host


def figures(context: Context, config: Config, times: list[float], host: list[float]) -> dict[str, Any]:
    """Return the speed, also relative to the published and the measured peak of the device."""
    step_s, tokens = statistics.median(times), config.train.global_batch * config.model.seq_len
    flops = flops_document(config)["model_flops_per_token"] * tokens / step_s
    facts = context.device.facts()
    peak = None if facts.get("mig_slice") else published_peak(facts["name"])  # published peaks are of whole GPUs
    found: dict[str, Any] = {
        "step_s": step_s, "fastest_step_s": min(times), "steps": len(times), "host_issue_s": statistics.median(host),
        "tokens_per_s": tokens / step_s, "model_tflops": flops / 1e12,
    }  # fmt: skip
    if peak is not None and config.train.dtype in peak.flops_per_s:
        found["mfu"] = flops / peak.flops_per_s[config.train.dtype]
        found["peak_source"] = f"{peak.name}: {peak.source}"
    measured = measured_ceiling(context, config.train.dtype)
    if measured:
        found["of_measured_ceiling"] = flops / 1e12 / measured
    return found


def measured_ceiling(context: Context, dtype: str) -> float | None:
    """Return the best TFLOP/s for `dtype` that the section `ceiling` wrote to the folder; None if it has not run."""
    path = context.out / "ceiling.json"
    try:
        best = json.loads(path.read_text())["figures"]["best_tflops"]
    except (OSError, ValueError, KeyError):
        return None
    return float(best[dtype]) if dtype in best else None


def memory_figures(planned: int, peak: int | None, baseline: int) -> dict[str, Any]:
    """Return planned and measured bytes, and the plan's relative error."""
    if peak is None:
        return {"planned_bytes": planned, "measured_bytes": None}
    used = peak - baseline
    return {"planned_bytes": planned, "measured_bytes": used, "plan_error": planned / used - 1 if used else None}
