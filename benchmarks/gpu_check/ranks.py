"""Compare several ranks with tensors on GPUs with one process on the CPU, in float64.

Ranks with a GPU each communicate over NCCL. Ranks that share one, which NCCL refuses, use gloo through host memory
(`dist_gpt.comm.staged`). Each rank is a process that trains one layout after another:

    python3 -m benchmarks.gpu_check.ranks      (started by the section, with torchrun's variables)
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.cases import tiny
from benchmarks.gpu_check.section import Context
from dist_gpt.comm.mesh import Backends, NcclBackends
from dist_gpt.comm.rendezvous import LOOPBACK, Store, connect_store, rank_env, scoped
from dist_gpt.comm.staged import StagedBackends
from dist_gpt.config.schema import Config
from dist_gpt.protocol import STORE_FD
from dist_gpt.verify import TOLERANCE, Verdict, certify_rank, merge_verdicts, write_reference

ROOT = Path(__file__).resolve().parents[2]
RANKS = 4
LAYOUT_S = 40.0
"""Seconds that a rank waits for the others on a GPU; starting and comparing take up to 60 s more."""
SHARED, OWN = "gloo through host memory", "nccl"

LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "dp2": ("gpt2", {"dp": 2}, {"sharding": "zero1"}, "none"),
    "tp2-sp": ("llama", {"tp": 2, "sequence_parallel": True}, {"sharding": "none"}, "none"),
    "pp2": ("gpt2", {"pp": 2}, {"sharding": "zero1"}, "none"),
    "zero3": ("llama", {"dp": 2}, {"sharding": "zero3", "bucket_mb": 0.02}, "full"),
    "dp2-tp2": ("gpt2", {"dp": 2, "tp": 2}, {"sharding": "zero2", "bucket_mb": 0.02}, "selective"),
    "pp2-tp2-interleaved": (
        "gpt2", {"pp": 2, "tp": 2, "virtual_stages": 2, "schedule": "interleaved"}, {"sharding": "zero1"}, "none",
    ),
}  # fmt: skip
"""Name -> family, parallel, optim, recompute; the most informative first."""


def layout_config(name: str) -> Config:
    """Return the configuration of a layout, in float64, with 8 sequences per step."""
    family, parallel, optim, recompute = LAYOUTS[name]
    layers = {"num_layers": 4 if "virtual_stages" in parallel else 2}
    return tiny(
        family, "fp64", {**layers, "dropout": 0.1, "attention_dropout": 0.0}, recompute, parallel, optim,
        micro_batches=4 // parallel.get("dp", 1),
    )  # fmt: skip


def run(context: Context) -> None:
    """Start the ranks, collect the verdict on every layout, and end the ranks."""
    own = context.device.count() >= RANKS and context.device_kind == "cuda"
    context.put("backend", OWN if own else SHARED)
    names = ["dp2", "pp2"] if context.small else list(LAYOUTS)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            write_reference(layout_config(name), Path(folder) / f"{name}.safetensors")
        limit_s = context.left_s() if context.small else LAYOUT_S  # a stand-in may share its CPUs with much else
        order = Order(context.device_kind, own, names, folder, limit_s)
        team = Team(order, 2 if context.small else RANKS)
        try:
            for name in names:
                context.attempt(name, certificate, context, team, name)
        finally:
            team.close()


def certificate(context: Context, team: Team, name: str) -> None:
    """Report the verdict on a layout and check it."""
    config = layout_config(name)
    answers = team.collect(name, config.world_size, min(team.limit_s + 60, max(1.0, context.left_s() - 3)))
    errors = [f"rank {rank}: {answer['error']}" for rank, answer in answers.items() if "error" in answer]
    if errors:
        context.check(False, f"{name}: {'; '.join(errors)}"[:1500])
        return
    found = merge_verdicts(config, [Verdict(**answer["verdict"]) for answer in answers.values()])
    seconds = max(answer["seconds"] for answer in answers.values())
    context.put(name, {**found["worst"], "accounting": found["accounting"], "seconds": seconds})
    for measure, error in found["worst"].items():
        context.check(error <= TOLERANCE, f"{name}: {measure} is off by {error:.3g}, at {found['where'][measure]}")
    context.check(found["accounting"] == "exact", f"{name}: {'; '.join(found['differences'][:3])}")


@dataclass(frozen=True)
class Order:
    """Work of every rank, passed to its process as JSON."""

    device: str
    own: bool
    """True if every rank has its own GPU."""
    names: list[str]
    """Layouts, in order."""
    folder: str
    """Folder of the references and the answers."""
    limit_s: float
    """Seconds that a rank waits for the others."""


class Team:
    """Processes of the ranks. They write their answers to `folder`, a file for each layout and rank."""

    def __init__(self, order: Order, ranks: int) -> None:
        self.folder, self.processes, self.limit_s = Path(order.folder), [], order.limit_s
        with socket.create_server((LOOPBACK, 0), backlog=64) as server:
            for rank in range(ranks):
                fd = {STORE_FD: str(server.fileno())} if rank == 0 else {}
                environment = {
                    **os.environ, **fd, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": LOOPBACK,
                    "MASTER_PORT": str(server.getsockname()[1]), "OMP_NUM_THREADS": "1",
                }  # fmt: skip
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "benchmarks.gpu_check.ranks", json.dumps(asdict(order))], cwd=ROOT,
                        env=environment, stdin=subprocess.DEVNULL, pass_fds=[server.fileno()] if rank == 0 else [],
                    )
                )  # fmt: skip

    def collect(self, name: str, world: int, timeout_s: float) -> dict[int, dict[str, Any]]:
        """Return the answers of the first `world` ranks for a layout; a missing answer is an error."""
        deadline, answers = time.monotonic() + timeout_s, {}
        for rank in range(world):
            path = self.folder / f"{name}.{rank}.json"
            while not path.exists() and time.monotonic() < deadline and self.processes[rank].poll() is None:
                time.sleep(0.02)
            code = self.processes[rank].poll()
            if path.exists():
                answers[rank] = json.loads(path.read_text())
            elif code is not None:
                answers[rank] = {"error": f"its process ended with exit code {code}"}
            else:
                answers[rank] = {"error": f"no answer within {timeout_s:.0f} s"}
        return answers

    def close(self) -> None:
        """Kill the processes that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


# --- a rank ------------------------------------------------------------------------------------------------------


def backends_for(store: Store, device: torch.device, own: bool, limit_s: float) -> Backends:
    """Return the factory of groups: NCCL if every rank has its own GPU, else gloo through host memory."""
    if own:
        return NcclBackends(store, device, limit_s)
    return StagedBackends(store, LOOPBACK, limit_s, stages_all=device.type == "cpu")


def train_layout(name: str, rank: int, store: Store, device: torch.device, order: Order) -> dict[str, Any]:
    """Return this rank's verdict on a layout, or its error."""
    started = time.monotonic()
    try:
        backends = backends_for(scoped(store, name), device, order.own, order.limit_s)
        reference = Path(order.folder) / f"{name}.safetensors"
        verdict = certify_rank(layout_config(name), rank, backends, reference, device)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"verdict": vars(verdict), "seconds": time.monotonic() - started}


def main(order: Order) -> int:
    """Train the layouts that this rank is part of; write each answer to a file."""
    torch.set_num_threads(1)
    env, folder = rank_env(order.limit_s + 60), Path(order.folder)
    device = torch.device("cpu")
    if order.device == "cuda":
        device = torch.device("cuda", env.local_rank if order.own else 0)
        torch.cuda.set_device(device)
    store = connect_store(env)
    for name in order.names:
        world = layout_config(name).world_size
        if env.rank < world:
            answer = train_layout(name, env.rank, store, device, order)
            aside = folder / f"{name}.{env.rank}.part"
            aside.write_text(json.dumps(answer))
            aside.replace(folder / f"{name}.{env.rank}.json")
        # rank 0 hosts the store, and no rank may start the next layout before the others give up on a failed one
        store.set(f"done/{name}/{env.rank}", "")
        store.wait([f"done/{name}/{rank}" for rank in range(env.world)])
    return 0


if __name__ == "__main__":
    sys.exit(main(Order(**json.loads(sys.argv[1]))))
