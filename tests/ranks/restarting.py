"""What the ranks of test_restart run under torchrun: in the first attempt one of them kills itself, in the second they
make groups and sum; each writes `done RANK ATTEMPT SUM`."""

from __future__ import annotations

import os
import signal
import sys

import torch

from dist_gpt.comm.mesh import build_mesh
from dist_gpt.comm.rendezvous import connect_store, make_backends, rank_env, roll_call
from dist_gpt.layout import Layout


def main(victim: int, when: str, timeout_s: float) -> None:
    """`when`: start (before it meets anybody) or groups (when all have made theirs)."""
    env = rank_env(timeout_s)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and env.rank == victim and when == "start":
        os.kill(os.getpid(), signal.SIGKILL)
    store = connect_store(env)
    roll_call(store, env, {"config": "same"})
    mesh = build_mesh(Layout(dp=env.world), env.rank, (0,), make_backends(store, env, torch.device("cpu"), timeout_s))
    tensor = torch.tensor([2.0**env.rank])
    mesh.world.all_reduce(tensor).wait()
    if first and env.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    mesh.world.barrier()  # in the first attempt nobody comes further
    mesh.close()
    os.write(1, f"done {env.rank} {os.environ['TORCHELASTIC_RESTART_COUNT']} {tensor.item():g}\n".encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
