"""Rendezvous of ranks: torchrun's variables, one store, one deadline, a roll call, and the choice of interface.

`rank_env` starts the deadline; `connect_store` and `roll_call` use it. The roll call compares the ranks' identities
and names ranks that are missing or differ. `make_backends` gives what is left of it to the creation of each group.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_gpt.comm.mesh import Backends, GlooBackends, NcclBackends
from dist_gpt.protocol import ATTEMPT, STORE_FD

Store = dist.Store
LOOPBACK = "127.0.0.1"
OUTLAST_S = 86400.0
"""Longest suspension, in seconds, that the collectives of a job survive."""
NONCE = "dist_gpt/attempt"
RESTARTS = "restarts"
POLL_S = 0.05
READ_S = 5.0  # seconds that rank 0, which may host the store, stays for the others to read why it ends


class RendezvousError(RuntimeError):
    """Ranks cannot start together: some are missing or unreachable, or their identities differ (`differs`)."""

    def __init__(self, text: str, differs: bool = False) -> None:
        super().__init__(text)
        self.differs = differs


@dataclass(frozen=True)
class RankEnv:
    """Values of torchrun's variables for a rank, and the deadline of its whole initialisation."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    master_addr: str
    master_port: int
    attempt: int
    deadline: float
    watched: bool = False
    """True if a launcher receives this rank's heartbeats; it ends the job if no rank moves for launch.timeout_s. Only a
    program that sends heartbeats (`dist_gpt.train`) sets it: without them, the collectives' own timeout must apply."""

    @property
    def one_node(self) -> bool:
        """True if all ranks are on one node."""
        return self.local_world == self.world

    def left_s(self) -> float:
        """Return the seconds until the deadline, at least one."""
        return max(1.0, self.deadline - time.monotonic())


def rank_env(timeout_s: float, environ: Mapping[str, str] | None = None) -> RankEnv:
    """Read torchrun's variables; raise RendezvousError if they are incomplete or malformed.

    Without RANK this is a single process, as is the only rank of a world of 1 without MASTER_ADDR (launch.rank.worker).
    """
    env = os.environ if environ is None else environ
    deadline = time.monotonic() + timeout_s
    alone = (env.get("RANK"), env.get("WORLD_SIZE")) == ("0", "1") and "MASTER_ADDR" not in env
    if "RANK" not in env or alone:
        return RankEnv(0, 1, 0, 1, LOOPBACK, 0, 0, deadline)
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise RendezvousError(
            f"RANK is set but {', '.join(missing)} is not: start ranks with dist-gpt launch or torchrun, "
            "or unset RANK for a single process"
        )
    world = _number(env, "WORLD_SIZE")
    local = [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name not in env]
    if world > 1 and local:
        raise RendezvousError(
            f"WORLD_SIZE is {world} but {' and '.join(local)} {'is' if len(local) == 1 else 'are'} not set, so this "
            "rank cannot know which ranks share its node: start ranks with dist-gpt launch or torchrun, which set both"
        )
    return RankEnv(
        rank=_number(env, "RANK"),
        world=world,
        local_rank=_number(env, "LOCAL_RANK", 0),
        local_world=_number(env, "LOCAL_WORLD_SIZE", world),
        master_addr=env["MASTER_ADDR"],
        master_port=_number(env, "MASTER_PORT"),
        attempt=_number(env, ATTEMPT if ATTEMPT in env else "TORCHELASTIC_RESTART_COUNT", 0),
        deadline=deadline,
    )


def _number(env: Mapping[str, str], name: str, default: int = 0) -> int:
    text = env.get(name, str(default))
    if not text.isdecimal():
        raise RendezvousError(f"{name} is {text!r}; it must be a whole number, as torchrun sets it")
    return int(text)


def connect_store(env: RankEnv) -> Store:
    """Return the store that all ranks share: torchrun's own where it hosts one, else rank 0's, on one interface.

    Keys are scoped to the attempt: a restarted rank must not read the addresses of the attempt before it. The launcher
    numbers attempts alike on all ranks; torchrun's agents each count their own restarts, so there ranks agree on one.
    """
    if env.world == 1:
        return dist.HashStore()
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listen_fd = None
    if env.rank == 0 and not hosted_by_agent:
        listen_fd = int(os.environ[STORE_FD]) if STORE_FD in os.environ else _listen(env)
    if listen_fd is None:
        _wait_for_host(env)
    timeout = timedelta(seconds=env.left_s())
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
            f"rank {env.rank}: no store at {env.master_addr}:{env.master_port} within {timeout.total_seconds():.0f} s. "
            f"Is rank 0 running, and MASTER_ADDR reachable from {socket.gethostname()}? ({_first_line(error)})"
        ) from error
    return join_attempt(store, env) if hosted_by_agent else dist.PrefixStore(f"attempt{env.attempt}", store)


def _first_line(error: Exception) -> str:
    """Return the text of one of torch's errors without its C++ frames."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _wait_for_host(env: RankEnv) -> None:
    """Wait until something listens at MASTER_ADDR and MASTER_PORT. Raise RendezvousError at the deadline.

    torch would wait too, but print many warnings and C++ frames.
    """
    started, wait_s = time.monotonic(), env.left_s()
    while True:
        left_s = started + wait_s - time.monotonic()
        try:
            return socket.create_connection((env.master_addr, env.master_port), timeout=max(left_s, 0.1)).close()
        except OSError as error:
            if left_s <= POLL_S:
                raise RendezvousError(
                    f"rank {env.rank}: no store at {env.master_addr}:{env.master_port} within {wait_s:.0f} s. Is rank "
                    f"0 running, and MASTER_ADDR reachable from {socket.gethostname()}? ({error})"
                ) from error
        time.sleep(POLL_S * (1 + env.world / 256))


def join_attempt(store: Store, env: RankEnv) -> Store:
    """Return the part of `store` for this attempt alone, agreed by all ranks; `store` may hold keys of earlier ones.

    The ranks also agree on how often they have been restarted (`restarts`), which each agent counts for itself. Rank 0
    publishes a fresh nonce. Every other rank sets a fresh token under the nonce that it finds, and has joined once rank
    0 has published that token; until then it looks for a newer nonce, since one of an earlier attempt is never
    answered. Raise RendezvousError at the deadline, naming the missing ranks.
    """
    return _open_attempt(store, env) if env.rank == 0 else _enter_attempt(store, env)


def _open_attempt(store: Store, env: RankEnv) -> Store:
    nonce = secrets.token_hex(8)
    scope = scoped(store, nonce)
    store.set(NONCE, nonce)
    keys = {rank: f"join/{rank}" for rank in range(1, env.world)}
    try:
        wait_for(scope, env, keys, "join this attempt", env.left_s())
    except RendezvousError as error:
        with suppress(Exception):  # ranks that are here need not wait for their own deadline
            here = {rank: scope.get(key).decode() for rank, key in keys.items() if scope.check([key])}
            scope.set("joined", json.dumps({"tokens": here, "problem": str(error)}))
        raise
    tokens = {rank: scope.get(key).decode() for rank, key in keys.items()}
    scope.set(RESTARTS, str(max([env.attempt, *(int(scope.get(f"{RESTARTS}/{rank}")) for rank in keys)])))
    scope.set("joined", json.dumps({"tokens": tokens, "problem": ""}))
    return scope


def _enter_attempt(store: Store, env: RankEnv) -> Store:
    token, nonce, scope = secrets.token_hex(8), "", store
    started, stale = time.monotonic(), False
    until = started + env.left_s() + READ_S  # rank 0's verdict, which names other ranks, comes first
    poll_s = POLL_S * (1 + env.world / 256)  # thousands of ranks poll one store
    try:
        while time.monotonic() < until:
            current = store.get(NONCE).decode() if store.check([NONCE]) else ""
            if current != nonce:
                nonce, scope, stale = current, scoped(store, current), False
                scope.set(f"{RESTARTS}/{env.rank}", str(env.attempt))
                scope.set(f"join/{env.rank}", token)
            if nonce and not stale and scope.check(["joined"]):
                verdict = json.loads(scope.get("joined"))
                stale = verdict["tokens"].get(str(env.rank)) != token
                if not stale and verdict["problem"]:
                    raise RendezvousError(verdict["problem"])
                if not stale:
                    return scope
            time.sleep(poll_s)
    except RendezvousError:
        raise
    except Exception as error:  # torch raises its own C++ error types here
        raise RendezvousError(
            f"rank {env.rank} lost torchrun's store at {env.master_addr}:{env.master_port} while it waited for rank 0 "
            f"to admit it: has the torchrun that hosts the store exited? ({error})"
        ) from error
    raise RendezvousError(
        f"rank {env.rank}: rank 0 did not admit it to this attempt within {time.monotonic() - started:.0f} s. "
        f"See the log of rank 0{': it may be in an attempt that this rank joined too late' if stale else ''}"
    )


def restarts(store: Store, env: RankEnv) -> int:
    """Return how often the ranks have been restarted: the same on all ranks of `store`, which connect_store made.

    torchrun's agents count differently: one that restarts its ranks because those of another node failed does not count
    it. The largest count is taken, since callers only need to know whether there was an attempt before this one.
    """
    return int(store.get(RESTARTS)) if store.check([RESTARTS]) else env.attempt


def _listen(env: RankEnv) -> int:
    """Return a descriptor for the store that listens on MASTER_ADDR alone; raise RendezvousError if that fails."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        _refuse_loopback_name(env)
        server.bind((env.master_addr, env.master_port))
    except OSError as error:
        raise RendezvousError(
            f"rank 0 cannot listen on {env.master_addr}:{env.master_port}: {error}. "
            "Choose another MASTER_PORT, or a MASTER_ADDR that is an address of this host"
        ) from error
    server.listen(2048)
    return server.detach()


def _refuse_loopback_name(env: RankEnv) -> None:
    """Raise RendezvousError if the name MASTER_ADDR resolves to a loopback address, which other nodes cannot reach."""
    name = env.master_addr
    if env.one_node or name == "localhost" or name.startswith("127.") or ":" in name:
        return
    address = socket.gethostbyname(name)
    if address.startswith("127."):
        raise RendezvousError(
            f"rank 0 cannot be reached from other nodes: on {socket.gethostname()}, {name} resolves to {address}; "
            "set DIST_GPT_MASTER=ADDRESS:PORT for all ranks, with an address of this host that other nodes can reach"
        )


def wait_for(store: Store, env: RankEnv, keys: Mapping[int, str], purpose: str, timeout_s: float | None = None) -> None:
    """Wait until every rank of `keys` has set its key; raise RendezvousError, naming those that did not `purpose`.

    Without `timeout_s` the store's own timeout applies: the one that its connection had.
    """
    started = time.monotonic()
    try:
        if timeout_s is None:
            store.wait(list(keys.values()))
        else:
            store.wait(list(keys.values()), timedelta(seconds=timeout_s))
    except Exception as error:  # torch raises its own C++ error types here
        try:
            absent = [rank for rank, key in keys.items() if not store.check([key])]
        except Exception:
            raise RendezvousError(
                f"rank {env.rank} lost the store while it waited for {_named(keys)} to {purpose}: has the process "
                f"that hosts it, at {env.master_addr}:{env.master_port}, exited? See the log of rank 0 ({error})"
            ) from error
        raise RendezvousError(
            f"rank {env.rank}: {_named(absent or keys)} did not {purpose} within {time.monotonic() - started:.0f} s. "
            f"See the log of {_named(absent or keys)}"
        ) from error


def _named(ranks: Iterable[int]) -> str:
    """Return `rank 3`, `ranks 1, 3`, or the first eight and how many more."""
    names = [str(rank) for rank in sorted(ranks)]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ("rank " if len(names) == 1 else "ranks ") + ", ".join(names[:8]) + more


def identity(config_hash: str) -> dict[str, str]:
    """Return the values that must be equal on all ranks."""
    return {"config": config_hash[:16], "torch": torch.__version__, "python": platform.python_version()}


def roll_call(store: Store, env: RankEnv, mine: Mapping[str, str]) -> None:
    """Compare the identities of all ranks; raise RendezvousError on all of them, naming those missing or different.

    An answer with the key `error` ends the roll call at once: its sentence, after the rank's name, is the verdict.
    After a bad verdict rank 0 stays until the others have read it, READ_S at most: the store may end with it.
    """
    if env.world == 1:
        return
    answer = {**mine, "host": socket.gethostname(), "pid": str(os.getpid())}
    store.set(f"roll/{env.rank}", json.dumps(answer))
    readers: set[int] = set()
    if env.rank == 0:
        verdict, differs, readers = _take_roll(store, env, mine)
        if differs:
            store.set("roll/differs", "")
        store.set("roll/verdict", verdict)
    wait_for(store, env, {0: "roll/verdict"}, "finish the roll call", env.left_s() + 5.0)
    verdict = store.get("roll/verdict").decode()
    if not verdict:
        return
    differs = store.check(["roll/differs"])
    with suppress(Exception):  # the verdict matters more than a store that fails now
        store.set(f"roll/read/{env.rank}", "")
        if readers:
            store.wait([f"roll/read/{rank}" for rank in sorted(readers)], timedelta(seconds=READ_S))
    raise RendezvousError(verdict, differs)


def _take_roll(store: Store, env: RankEnv, mine: Mapping[str, str]) -> tuple[str, bool, set[int]]:
    """Return rank 0's verdict, whether it is that ranks differ, and the ranks that will read it.

    The verdict is empty, or the sentence that every rank will raise.
    """
    answers: dict[int, dict[str, str]] = {}
    all_ranks = set(range(env.world))
    while missing := sorted(all_ranks - set(answers)):
        late = time.monotonic() > env.deadline  # read before the last look: a rank in time is not called missing
        for rank in missing:
            if store.check([f"roll/{rank}"]):
                answers[rank] = json.loads(store.get(f"roll/{rank}"))
        for rank, theirs in sorted(answers.items()):
            if "error" in theirs:
                return f"roll call: rank {rank} on {theirs['host']} {theirs['error']}", False, all_ranks
        missing = sorted(all_ranks - set(answers))
        if missing and late:
            names = ", ".join(map(str, missing))
            verdict = f"{len(missing)} of {env.world} ranks did not appear in time: {names}. See their logs"
            return f"roll call: {verdict}", False, set(answers)
        if missing:
            time.sleep(0.02)
    problems = []
    for rank, theirs in sorted(answers.items()):
        for key, value in mine.items():
            if theirs[key] != value:
                problems.append(f"rank {rank} on {theirs['host']} has {key} {theirs[key]}, rank 0 has {value}")
    return "roll call: " + "; ".join(problems) if problems else "", bool(problems), all_ranks


def scoped(store: Store, prefix: str) -> Store:
    """Return `store` with every key under `prefix`."""
    return dist.PrefixStore(prefix, store)


def make_backends(
    store: Store, env: RankEnv, device: torch.device, timeout_s: float, single_copy: bool = True
) -> Backends:
    """Return a factory of NCCL groups on GPUs, of gloo groups otherwise; on one node both stay on loopback.

    Groups are created within what is left of `env`'s deadline; `timeout_s` is then that of each collective. Under a
    launcher, gloo's timeout is OUTLAST_S longer: gloo's clock counts suspensions, the launcher's does not.
    `single_copy`: ranks of a node read each other's memory where the system permits it. On several nodes gloo listens
    on the interfaces that GLOO_SOCKET_IFNAME names (separated by commas), else on the one whose route leads to
    MASTER_ADDR: a host's own name often means an address that only the host itself can reach.
    """
    if device.type != "cuda" and env.watched:
        timeout_s += OUTLAST_S
    if device.type == "cuda":
        if env.one_node:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        return NcclBackends(store, device, timeout_s, env.left_s)
    if env.one_node:
        return GlooBackends(store, LOOPBACK, timeout_s, left_s=env.left_s, single_copy=single_copy)
    interfaces = [name.strip() for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name.strip()]
    host = "" if interfaces else address_towards(env.master_addr, env.master_port)
    return GlooBackends(store, host, timeout_s, interfaces, env.left_s, one_node=False, single_copy=single_copy)


def address_towards(host: str, port: int) -> str:
    """Return this machine's address on the route to `host`; raise RendezvousError if there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # a datagram socket only asks the kernel and sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RendezvousError(
            f"no route from {socket.gethostname()} to MASTER_ADDR {host}: {error}. Set MASTER_ADDR to an address that "
            "all nodes reach, or GLOO_SOCKET_IFNAME to the interface that leads to the other nodes"
        ) from error


def choose_device(env: RankEnv, backend: str = "auto") -> torch.device:
    """Select this rank's GPU, or the CPU if there are none; `backend` nccl insists on a GPU, gloo on the CPU."""
    if backend == "nccl" and not torch.cuda.is_available():
        raise RendezvousError("launch.backend: nccl, but torch sees no GPU; --set launch.backend=gloo runs on the CPU")
    if torch.cuda.is_available() and backend != "gloo":
        if env.local_rank and torch.cuda.device_count() == 1 and _given_one_gpu(os.environ):
            print(
                f"rank {env.rank} (local {env.local_rank} of {env.local_world} on {socket.gethostname()}) was given "
                "one GPU by its launcher, as with srun --gpus-per-task=1, and uses cuda:0",
                flush=True,
            )
            env = replace(env, local_rank=0)
        if env.local_rank >= torch.cuda.device_count():
            raise RendezvousError(
                f"local rank {env.local_rank} has no GPU of its own: {torch.cuda.device_count()} visible on "
                f"{socket.gethostname()}. Start at most one rank per GPU (--ranks-per-node)"
            )
        device = torch.device("cuda", env.local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def _given_one_gpu(environ: Mapping[str, str]) -> bool:
    """Return whether the launcher chose this rank's GPU, rather than the machine having only one."""
    names = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    return any(environ.get(name, "") != "" and "," not in environ[name] for name in names)
