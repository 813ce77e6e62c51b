"""The parity certificate: compare a layout with one process, in float64.

It compares losses (of training and of a validation batch), gradients, gradient norm and updated weights. Rank 0 trains
the model alone, with every degree of parallelism at 1 and nothing sharded, and writes the reference; then all ranks
train it in the layout under test, and each compares its own part, with gradients gathered, with the reference.
Errors: gradients max|d| / max(max|ref|, 1e-4 x the model's largest gradient); weights max|d|, absolute; loss and norm
relative.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_gpt.comm.mesh import Backends, FakeBackends
from dist_gpt.comm.rendezvous import Store, connect_store, make_backends, rank_env
from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.dryrun import dryrun_document
from dist_gpt.events import TRAIN, Counts
from dist_gpt.model.init import local_part
from dist_gpt.plan.count import count_comm, count_flops, count_memory, count_recomputed
from dist_gpt.replica import Rank, Samples

STEPS = 2
VERIFY_TIMEOUT_S = 300.0
TOLERANCE = 1e-10
GRADIENT_FLOOR = 1e-4
MEASURES = ("loss", "gradient", "gradient_norm", "weight")


def verify_samples(config: Config, step: int) -> Samples:
    """Return a reader of uniform random tokens for step `step`, the same for every layout."""
    t, m = config.train, config.model
    generator = np.random.Generator(np.random.Philox(key=[config.data.seed, step]))
    ids = generator.integers(0, m.vocab_size, size=(t.global_batch, m.seq_len + 1), dtype=np.int64)
    return lambda first, count: ids[first : first + count]


@dataclass
class Trace:
    """Values that a certificate compares: losses, gradient norms, gradients by step and parameter, final weights."""

    losses: list[float] = field(default_factory=list)  # of each step; the last one is of a validation batch
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def run_steps(replica: Rank, config: Config) -> Trace:
    """Train STEPS steps and return their trace; gradients are taken before clipping, summed over all axes."""
    trace = Trace()
    replica.initialise()
    step_now = 0

    def keep_gradients() -> None:
        for name, gradient in replica.whole_gradients().items():
            trace.gradients[f"{step_now}:{name}"] = gradient

    replica.optimizer.before_clip = keep_gradients
    for step_now in range(STEPS):
        replica.train_step(step_now, verify_samples(config, step_now))
        loss, norm = replica.optimizer.statistics.tolist()
        trace.losses.append(loss)
        trace.norms.append(norm)
    replica.optimizer.before_clip = None
    trace.losses.append(replica.evaluate([verify_samples(config, STEPS)]).item())
    trace.weights = replica.whole_parameters()
    return trace


def reference_config(config: Config) -> Config:
    """Return the configuration of the same training on one process: every degree 1, nothing sharded."""
    alone = {"dp": 1, "tp": 1, "pp": 1, "cp": 1, "virtual_stages": 1, "schedule": "1f1b"}
    parallel = config.parallel.model_copy(update={**alone, "sequence_parallel": False, "layers": "balanced"})
    return config.model_copy(
        update={
            "parallel": parallel,
            "optim": config.optim.model_copy(update={"sharding": "none", "shard_group": "data"}),
            "train": config.train.model_copy(update={"recompute": "none"}),
        }
    )


def write_reference(config: Config, path: Path) -> None:
    """Train on one process, on the CPU, and write the trace to `path` (safetensors)."""
    alone = reference_config(config)
    replica = Rank(alone, 0, FakeBackends(), torch.device("cpu"))
    trace = run_steps(replica, alone)
    numbers = {name: torch.tensor(getattr(trace, name), dtype=torch.float64) for name in ("losses", "norms")}
    tensors = {f"g:{k}": v for k, v in trace.gradients.items()} | {f"w:{k}": v for k, v in trace.weights.items()}
    save_file({k: v.contiguous() for k, v in (tensors | numbers).items()}, path)
    replica.close()


@dataclass
class Verdict:
    """Largest error of each measure on one rank and its place, and the differences in the accounting."""

    rank: int
    worst: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEASURES, 0.0))
    where: dict[str, str] = field(default_factory=dict)
    accounting: list[str] = field(default_factory=list)

    def see(self, measure: str, error: float, where: str) -> None:
        """Record `error` if it is the largest of its measure so far; NaN counts as infinite."""
        error = math.inf if math.isnan(error) else error
        if error > self.worst[measure] or measure not in self.where:
            self.worst[measure] = max(error, self.worst[measure])
            self.where[measure] = where


def certify_rank(
    config: Config,
    rank: int,
    backends: Backends,
    reference: Path,
    device: torch.device | None = None,
    with_dry_run: bool = True,
) -> Verdict:
    """Train in the layout of `config` as rank `rank` on `device` (default CPU); compare with the file `reference`.

    Compare the plan with a dry run too, unless `with_dry_run` is false.
    """
    replica = Rank(config, rank, backends, device or torch.device("cpu"))
    try:
        trace = run_steps(replica, config)
        verdict = Verdict(rank)
        _compare(verdict, replica, trace, load_file(reference))
        _account(verdict, replica)
        if with_dry_run:
            _compare_dry_run(verdict, replica)
        return verdict
    finally:
        replica.close()


def _compare(verdict: Verdict, replica: Rank, trace: Trace, ref: dict[str, Tensor]) -> None:
    tp, index = replica.mesh.tp.size, replica.mesh.tp.index
    for measure, got, want in (("loss", trace.losses, ref["losses"]), ("gradient_norm", trace.norms, ref["norms"])):
        for step, (a, b) in enumerate(zip(got, want.tolist(), strict=True)):
            verdict.see(measure, abs(a - b) / abs(b), f"step {step}" if step < STEPS else "validation")
    largest = max(t.abs().max().item() for k, t in ref.items() if k.startswith("g:"))
    for param in replica.params:
        weight = ref[f"w:{param.name}"]
        here = trace.weights[param.name].cpu()
        error = (here - local_part(param, weight, tp, index)).abs().max().item()
        verdict.see("weight", error, f"{param.name} on rank {verdict.rank}")
        for step in range(STEPS):
            key = f"{step}:{param.name}"
            whole = ref[f"g:{key}"]
            scale = max(whole.abs().max().item(), GRADIENT_FLOOR * largest)
            error = (trace.gradients[key].cpu() - local_part(param, whole, tp, index)).abs().max().item() / scale
            verdict.see("gradient", error, f"{param.name}, step {step}, rank {verdict.rank}")


def _account(verdict: Verdict, replica: Rank) -> None:
    """Compare the ledger with the declared steps exactly, and check that every parameter got a gradient."""
    plan = replica.plan
    declared = Counts()
    declared.merge(count_comm(plan, plan.steps), STEPS)
    verdict.accounting += replica.mesh.ledger.differences
    verdict.accounting += replica.mesh.ledger.counts(TRAIN).differences(declared)
    verdict.accounting += [f"no gradient was written for {tuple(p.shape)}" for p in replica.sink.unwritten()]


def _compare_dry_run(verdict: Verdict, replica: Rank) -> None:
    """Compare the counts of a dry run of this rank with the plan exactly."""
    plan = replica.plan
    dry = dryrun_document(replica.config, verdict.rank)
    planned = {
        "comm": count_comm(plan, plan.steps).as_dict(),
        "model_flops": count_flops(plan, plan.steps),
        "recompute_flops": count_recomputed(plan, plan.steps),
        "memory_bytes": count_memory(plan, plan.steps),
    }
    for key, value in planned.items():
        if dry[key] != value:
            verdict.accounting.append(f"{key}: dry run {dry[key]}, plan {value}")


def merge_verdicts(config: Config, verdicts: list[Verdict]) -> dict[str, Any]:
    """Return the certificate: the largest errors over all ranks, with the tolerance and the configuration."""
    worst, where = {}, {}
    for measure in MEASURES:
        top = max(verdicts, key=lambda v, m=measure: v.worst[m])  # type: ignore[misc]
        worst[measure], where[measure] = top.worst[measure], top.where[measure]
    differences = [f"rank {v.rank}: {line}" for v in verdicts for line in v.accounting]
    passed = all(error <= TOLERANCE for error in worst.values()) and not differences
    return {
        "verdict": "pass" if passed else "fail",
        "worst": worst,
        "where": where,
        "tolerance": TOLERANCE,
        "accounting": "differs" if differences else "exact",
        "differences": differences[:50],
        "verified_config": config.model_dump(mode="json"),
    }


def certify(
    config: Config,
    rank: int,
    store: Store,
    backends: Callable[[Store], Backends],
    folder: Path,
    with_dry_run: bool = True,
) -> dict[str, Any] | None:
    """Return the certificate of `config` (in float64) on rank 0, None on others. All ranks call this together.

    `store` must be fresh for every call: it carries the ranks' verdicts. `folder` is shared by the ranks. A rank whose
    `with_dry_run` is false leaves out its own dry run.
    """
    reference = folder / "reference.safetensors"
    if rank == 0:
        write_reference(config, reference)
        store.set("reference", "written")
    store.wait(["reference"])
    verdict = certify_rank(config, rank, backends(store), reference, with_dry_run=with_dry_run)
    store.set(f"verdict/{rank}", json.dumps(vars(verdict)))
    if rank != 0:
        return None
    keys = [f"verdict/{r}" for r in range(config.world_size)]
    store.wait(keys)
    return merge_verdicts(config, [Verdict(**json.loads(store.get(key))) for key in keys])


def main(folder: str) -> None:
    """Certify FOLDER/config.yaml as one rank of `dist-gpt verify`; rank 0 writes FOLDER/certificate.json."""
    torch.set_num_threads(1)
    path = Path(folder)
    env = rank_env(VERIFY_TIMEOUT_S)
    config = load(str(path / "config.yaml"), world=env.world)
    store = connect_store(env)

    def backends(scope: Store) -> Backends:
        return make_backends(scope, env, torch.device("cpu"), VERIFY_TIMEOUT_S, config.launch.reads_memory)

    document = certify(config, env.rank, store, backends, path)
    if document is not None:
        (path / "certificate.json").write_text(json.dumps(document))
    store.set(f"left/{env.rank}", "")
    if env.rank == 0:  # it hosts the store, so it exits last
        store.wait([f"left/{rank}" for rank in range(env.world)])


if __name__ == "__main__":
    main(sys.argv[1])
