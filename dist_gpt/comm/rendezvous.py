"""How ranks meet: torchrun's variables, one store, one deadline, a roll call, and the group's end.

`with joined(...) as rank_env` connects the store; `roll_call` compares what every rank brought and names who is
missing or differs; both spend the same deadline.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_gpt.comm.mesh import Backends, GlooBackends, NcclBackends

Store = dist.Store
LOOPBACK = "127.0.0.1"
STORE_FD = "DIST_GPT_STORE_FD"


class RendezvousError(RuntimeError):
    """Ranks are missing, or did not come with the same configuration."""


@dataclass(frozen=True)
class RankEnv:
    """What a rank was told by torchrun's variables, and the deadline of its whole initialisation."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    master_addr: str
    master_port: int
    attempt: int
    deadline: float

    @property
    def one_node(self) -> bool:
        return self.local_world == self.world

    def left_s(self) -> float:
        """Seconds until the deadline, at least one."""
        return max(1.0, self.deadline - time.monotonic())


def rank_env(timeout_s: float, environ: Mapping[str, str] | None = None) -> RankEnv:
    """Read torchrun's variables; without RANK this is a single process."""
    env = os.environ if environ is None else environ
    deadline = time.monotonic() + timeout_s
    if "RANK" not in env:
        return RankEnv(0, 1, 0, 1, LOOPBACK, 0, 0, deadline)
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise RendezvousError(
            f"RANK is set but {', '.join(missing)} is not: start ranks with dist-gpt launch or torchrun, "
            "or unset RANK for a single process"
        )
    world = _number(env, "WORLD_SIZE")
    return RankEnv(
        rank=_number(env, "RANK"),
        world=world,
        local_rank=_number(env, "LOCAL_RANK", 0),
        local_world=_number(env, "LOCAL_WORLD_SIZE", world),
        master_addr=env["MASTER_ADDR"],
        master_port=_number(env, "MASTER_PORT"),
        attempt=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
        deadline=deadline,
    )


def _number(env: Mapping[str, str], name: str, default: int = 0) -> int:
    text = env.get(name, str(default))
    if not text.isdecimal():
        raise RendezvousError(f"{name} is {text!r}; it must be a whole number, as torchrun sets it")
    return int(text)


def connect_store(env: RankEnv) -> Store:
    """The store all ranks share: torchrun's own where it hosts one, else rank 0's, on one interface.

    Keys are scoped to the attempt: a restarted rank must not read the addresses of the attempt before it.
    """
    if env.world == 1:
        return dist.HashStore()
    timeout = timedelta(seconds=env.left_s())
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listen_fd = None
    if env.rank == 0 and not hosted_by_agent:
        listen_fd = int(os.environ[STORE_FD]) if STORE_FD in os.environ else _listen(env)
    try:
        store = dist.TCPStore(
            env.master_addr,
            env.master_port,
            is_master=listen_fd is not None,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listen_fd,
        )
    except Exception as error:  # torch raises its own C++ error types here
        raise RendezvousError(
            f"rank {env.rank}: no store at {env.master_addr}:{env.master_port} within {env.left_s():.0f} s. "
            f"Is rank 0 running, and MASTER_ADDR reachable from {socket.gethostname()}? ({error})"
        ) from error
    return dist.PrefixStore(f"attempt{env.attempt}", store)


def _listen(env: RankEnv) -> int:
    """A socket bound to MASTER_ADDR alone, for the store to listen on."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((env.master_addr, env.master_port))
    except OSError as error:
        raise RendezvousError(
            f"rank 0 cannot listen on {env.master_addr}:{env.master_port}: {error}. "
            "Choose another MASTER_PORT, or a MASTER_ADDR that is an address of this host"
        ) from error
    server.listen(2048)
    return server.detach()


def identity(config_hash: str, data_digest: str) -> dict[str, str]:
    """What must be equal on all ranks."""
    return {
        "config": config_hash[:16],
        "data": data_digest[:16],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def roll_call(store: Store, env: RankEnv, mine: Mapping[str, str]) -> None:
    """Every rank answers with its identity; RendezvousError names who is missing or differs, on every rank."""
    if env.world == 1:
        return
    answer = {**mine, "host": socket.gethostname(), "pid": str(os.getpid())}
    store.set(f"roll/{env.rank}", json.dumps(answer))
    if env.rank == 0:
        store.set("roll/verdict", _take_roll(store, env, mine))
    try:
        store.wait(["roll/verdict"], timedelta(seconds=env.left_s() + 5.0))
    except Exception as error:
        raise RendezvousError(f"rank {env.rank}: rank 0 did not finish the roll call in time") from error
    verdict = store.get("roll/verdict").decode()
    if verdict:
        raise RendezvousError(verdict)


def _take_roll(store: Store, env: RankEnv, mine: Mapping[str, str]) -> str:
    """Rank 0's verdict: empty, or the sentence that every rank will raise."""
    missing = set(range(env.world))
    while missing:
        missing -= {rank for rank in sorted(missing) if store.check([f"roll/{rank}"])}
        if missing and time.monotonic() > env.deadline:
            names = ", ".join(map(str, sorted(missing)))
            return f"roll call: {len(missing)} of {env.world} ranks did not appear in time: {names}. See their logs"
        if missing:
            time.sleep(0.02)
    problems = []
    for rank in range(env.world):
        theirs = json.loads(store.get(f"roll/{rank}"))
        for key, value in mine.items():
            if theirs[key] != value:
                problems.append(f"rank {rank} on {theirs['host']} has {key} {theirs[key]}, rank 0 has {value}")
    return "roll call: " + "; ".join(problems) if problems else ""


def scoped(store: Store, prefix: str) -> Store:
    """`store` with every key under `prefix`."""
    return dist.PrefixStore(prefix, store)


def make_backends(store: Store, env: RankEnv, device: torch.device, timeout_s: float) -> Backends:
    """NCCL on GPUs, gloo otherwise; gloo listens on loopback when all ranks are on one node."""
    if device.type == "cuda":
        return NcclBackends(store, device, timeout_s)
    host = LOOPBACK if env.one_node else socket.gethostname()
    return GlooBackends(store, host, timeout_s)


def choose_device(env: RankEnv) -> torch.device:
    """One GPU per process where there are GPUs, else the CPU."""
    if torch.cuda.is_available():
        if env.local_rank >= torch.cuda.device_count():
            raise RendezvousError(
                f"local rank {env.local_rank} has no GPU of its own: {torch.cuda.device_count()} visible on "
                f"{socket.gethostname()}. Start at most one rank per GPU (--ranks-per-node)"
            )
        device = torch.device("cuda", env.local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")
