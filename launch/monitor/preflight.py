"""Preflight: judge what every rank found on its node (launch.rank.node_info) before training starts.

    problems = judge(answers, Expected(ranks=8, nodes=2), ...)     # pure
    print(text(problems))

    node1 (ranks 4-7): has torch 2.12.0, and rank 0 on node0 has 2.13.0. Install the same on all nodes (constraints.txt)

Each problem names the node and the remedy. An `error` is always wrong; a `warning` may be intended.
"""

from __future__ import annotations

import ipaddress
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_gpt.config.errors import ConfigError
from dist_gpt.wording import counted
from launch.monitor.diagnose import RankState
from launch.nodelist import expand
from launch.rank.node_info import facts, port_free
from launch.spec import JobSpec

__all__ = ["Answer", "Expected", "Problem", "check_answers", "facts", "judge", "port_free", "text", "warnings"]

CLOCK_S = 5.0
"""Seconds by which the clocks of a node and the launcher may differ."""
LEAST_FREE_BYTES = 1 << 30
ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Answer:
    """Hello message of a rank."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    node: int
    host: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    asked: float | None = None
    """Earliest time (s since 1970, launcher's clock) at which this rank can have read its own; None: not known."""
    arrived: float | None = None
    """Time (same clock) at which its hello came; None: not known."""

    @classmethod
    def of(cls, hello: Mapping[str, Any], asked: float | None = None, arrived: float | None = None) -> Answer:
        """Return the answer in the content of a `hello` message."""
        numbers = {name: int(hello[name]) for name in ("rank", "world", "local_rank", "local_world", "node")}
        return cls(**numbers, host=str(hello["host"]), facts=hello.get("facts") or {}, asked=asked, arrived=arrived)


@dataclass(frozen=True)
class Expected:
    """Job as the launcher knows it."""

    ranks: int
    nodes: int = 1
    layout: str = ""
    """Mesh in words, for messages."""
    mesh: int | None = None
    """Number of ranks of the mesh; None: the same as `ranks`."""
    interface: str | None = None
    config: str = ""
    """node_info.config_digest of config.yaml as the launcher sees it; empty: the one that the ranks were told."""
    log: Callable[[int], str] = lambda rank: f"rank{rank}.log"
    hosts: tuple[str, ...] = ()
    """Names of the nodes, in order, if they are known before any rank has come."""

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks per node."""
        return max(1, self.ranks // self.nodes)


@dataclass(frozen=True)
class Problem:
    """One problem of one node."""

    node: str
    ranks: tuple[int, ...]
    what: str
    remedy: str
    severity: str = ERROR


Nodes = Mapping[int, Sequence[Answer]]
"""Answers of each node, by its number, ordered by rank."""


def judge(answers: Mapping[int, Answer], expected: Expected, extra: Sequence[Answer] = ()) -> list[Problem]:
    """Return all problems of the ranks that answered and of those that did not.

    `extra`: further hello messages of ranks that had said hello already.
    """
    nodes: dict[int, list[Answer]] = defaultdict(list)
    for _, answer in sorted(answers.items()):
        nodes[answer.node].append(answer)
    found = [*_missing(nodes, answers, expected), *_duplicates(answers, extra), *_shape(nodes, expected)]
    found += _port(answers, expected)
    for look in (_master, _interface, _gpus, _cores, _folder, _clock):
        for _, group in sorted(nodes.items()):
            found += look(group, expected, nodes)
    return [*found, *_differences(answers, expected)]


def text(problems: Iterable[Problem]) -> str:
    """Return a line per problem for users, errors first; empty if there are none."""
    ordered = sorted(problems, key=lambda problem: problem.severity != ERROR)
    lines = []
    for p in ordered:
        who = f"{p.node} ({named(p.ranks)})" if p.ranks else p.node
        lines.append(f"preflight {p.severity}: {who}: {p.what}. {p.remedy}")
    return "\n".join(lines)


def named(ranks: Iterable[int]) -> str:
    """Return `rank 3` or `ranks 0-3, 8`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    alone = len(spans) == 1 and spans[0][0] == spans[0][1]
    return ("rank " if alone else "ranks ") + ", ".join(shown)


def _at(group: Sequence[Answer], what: str, remedy: str, severity: str = ERROR) -> Problem:
    return Problem(group[0].host, tuple(answer.rank for answer in group), what, remedy, severity)


def _missing(nodes: Nodes, answers: Mapping[int, Answer], expected: Expected) -> Iterator[Problem]:
    absent: dict[int, list[int]] = defaultdict(list)
    for rank in range(expected.ranks):
        if rank not in answers:
            absent[rank // expected.ranks_per_node].append(rank)
    for node, ranks in sorted(absent.items()):
        log = expected.log(ranks[0])
        if group := nodes.get(node):
            came = named(answer.rank for answer in group)
            what, where = f"did not report to the launcher, but {came} of the same node did", group[0].host
            remedy = f"They exited or hang at startup: see {log}"
        else:
            what, where = f"no rank of node {node} (counted from 0) reported to the launcher", f"node {node}"
            if node < len(expected.hosts):
                what, where = "no rank of this node reported to the launcher", expected.hosts[node]
            remedy = f"Check {log}, that the node is up, starts processes and reaches the launcher (launch.interface)"
        yield Problem(where, tuple(ranks), what, remedy)


def _duplicates(answers: Mapping[int, Answer], extra: Sequence[Answer]) -> Iterator[Problem]:
    for one in extra:
        other = answers[one.rank].host if one.rank in answers else "another node"
        what = f"claims rank {one.rank}, which a process on {other} already holds"
        yield _at([one], what, "Give every process its own rank: start them with dist-gpt launch, srun or torchrun, "
                               "and unset RANK, LOCAL_RANK and WORLD_SIZE in the job's environment")  # fmt: skip


def _shape(nodes: Nodes, expected: Expected) -> Iterator[Problem]:
    """Yield the differences between the mesh and the ranks that were started."""
    every_answer = [answer for group in nodes.values() for answer in group]
    mesh = expected.mesh if expected.mesh is not None else expected.ranks
    mesh_name = f"the layout {expected.layout} has {mesh}" if expected.layout else f"the layout has {mesh}"
    fix = "Change parallel.*, or --nodes and --ranks-per-node"
    if expected.ranks != mesh or expected.ranks % expected.nodes:
        yield Problem("all nodes", (), f"the job has {counted(expected.ranks, 'rank')} on "
                      f"{counted(expected.nodes, 'node')} ({expected.ranks / expected.nodes:g} per node), but "
                      f"{mesh_name}", fix)  # fmt: skip
    for world in sorted({answer.world for answer in every_answer} - {expected.ranks}):
        group = [answer for answer in every_answer if answer.world == world]
        yield _at(group, f"was started as one of {counted(world, 'rank')}, but {mesh_name}", fix)
    if sum(map(len, nodes.values())) < expected.ranks:
        return  # missing ranks are reported already
    sizes = {node: max(len(group), *(a.local_world for a in group)) for node, group in nodes.items()}
    for node, size in sorted(sizes.items()):
        if size != expected.ranks_per_node:
            want = expected.ranks_per_node
            yield _at(nodes[node], f"has {counted(size, 'rank')}, but should have {want} ("
                      f"{counted(expected.ranks, 'rank')} on {counted(expected.nodes, 'node')})",
                      f"Spread them evenly and in order: --ntasks-per-node={want}, with Open MPI --map-by "
                      f"ppr:{want}:node")  # fmt: skip


# --- the network ---------------------------------------------------------------------------------------------------


def _port(answers: Mapping[int, Answer], expected: Expected) -> Iterator[Problem]:
    first = answers.get(0)
    if first is not None and first.facts.get("port_free") is False:
        master = first.facts.get("master", {})
        port = f"{master.get('name')}:{master.get('port')}"
        yield Problem(first.host, (0,), f"another program listens on {port}, where the ranks would meet",
                      "Choose another port (MASTER_PORT), or end that program (ss -ltnp shows it)")  # fmt: skip


def _master(group: Sequence[Answer], expected: Expected, nodes: Nodes) -> Iterator[Problem]:
    master = group[0].facts.get("master") or {}
    name, addresses = master.get("name"), master.get("addresses", [])
    if not name:
        return
    if "error" in master:
        yield _at(group, f"cannot resolve {name}, where the ranks meet ({master['error']})",
                  "Set MASTER_ADDR to an IP address of the first node, or add the name to /etc/hosts or the name "
                  "service")  # fmt: skip
    hosts = {other.host for answers in nodes.values() for other in answers}
    if len(hosts) > 1 and any(ipaddress.ip_address(address).is_loopback for address in addresses):
        found = ", ".join(addresses)
        what = f"resolves {name}, where the ranks meet, to {found}: loopback, which other nodes cannot reach"
        yield _at(group, what, "Set MASTER_ADDR to the first node's address on the network between the nodes, or "
                  f"remove {name} from the 127.* lines of /etc/hosts")  # fmt: skip


def _interface(group: Sequence[Answer], expected: Expected, nodes: Nodes) -> Iterator[Problem]:
    here = group[0].facts.get("interfaces") or {}
    wanted = [expected.interface] if expected.interface else group[0].facts.get("named_interfaces", [])
    for name in wanted:
        if here and not any(one == name or (name.endswith("*") and one.startswith(name[:-1])) for one in here):
            listed = "; ".join(f"{one} {', '.join(addresses)}".strip() for one, addresses in sorted(here.items()))
            yield _at(group, f"has no interface {name} that is up; it has {listed}",
                      "Set launch.interface to one that all nodes have, or omit it to use the route to the first "
                      "node")  # fmt: skip


def gpu_of(answer: Answer) -> str | None:
    """Return the GPU that this rank will use: the one at its local rank, or the only one it sees; else None."""
    gpus = answer.facts.get("gpus") or []
    if len(gpus) == 1:
        return str(gpus[0])
    return str(gpus[answer.local_rank]) if answer.local_rank < len(gpus) else None


def _gpus(group: Sequence[Answer], expected: Expected, nodes: Nodes) -> Iterator[Problem]:
    if not any(answer.facts.get("gpus") for answers in nodes.values() for answer in answers):
        return  # a job on CPUs
    used = {answer.rank: gpu_of(answer) for answer in group}
    seen = {gpu for answer in group for gpu in answer.facts.get("gpus") or []}
    without = [answer for answer in group if used[answer.rank] is None]
    if without or len(seen) < len(group):
        yield _at(without or group, f"sees {counted(len(seen), 'GPU')} for {counted(len(group), 'rank')}: each rank "
                  "needs one", f"Request {counted(len(group), 'GPU')} per node (launch.slurm.gpus_per_node), or start "
                  "fewer ranks (--ranks-per-node)")  # fmt: skip
        return
    counts = Counter(used.values())
    for gpu in sorted(str(gpu) for gpu, count in counts.items() if count > 1):
        sharing = [answer for answer in group if used[answer.rank] == gpu]
        yield _at(sharing, f"would share the GPU {gpu}", "Give each rank its own: srun --gpus-per-task=1, or the same "
                  "CUDA_VISIBLE_DEVICES for all ranks of a node")  # fmt: skip


def _cores(group: Sequence[Answer], expected: Expected, nodes: Nodes) -> Iterator[Problem]:
    masks = [set(answer.facts["cores"]) for answer in group if answer.facts.get("cores")]
    if len(masks) < len(group):
        return
    cores = len(set().union(*masks))
    machine = max(int(answer.facts.get("machine_cores", cores)) for answer in group)
    has_gpus = any(answer.facts.get("gpus") for answer in group)
    need = len(group) * (2 if has_gpus else 1)
    if cores >= need:
        return
    each = min(max(2 if has_gpus else 1, machine // len(group)), 16)
    bound = machine >= need  # the machine has them, but the launcher gave the ranks fewer
    slurm = any(answer.facts.get("slurm") for answer in group)
    if not bound and not has_gpus:
        return  # a small machine is no mistake
    ranks = counted(len(group), "rank") + (" with GPUs" if has_gpus else "")
    what = f"{ranks} may run on {cores} of the machine's {machine} cores"
    if slurm:
        remedy = (
            f"Set launch.slurm.cpus_per_rank: {each} (srun gives a task one core unless --cpus-per-task={each} or "
            f"SRUN_CPUS_PER_TASK={each} is set; it does not inherit sbatch's)"
        )
    else:
        remedy = "Widen the ranks' CPU mask (taskset, --cpuset-cpus, mpirun --bind-to none)"
    yield _at(group, what, remedy, ERROR if bound and slurm else WARNING)


def _folder(group: Sequence[Answer], expected: Expected, nodes: Nodes) -> Iterator[Problem]:
    for answer in group:
        here = answer.facts.get("run_dir") or {}
        if not here:
            continue
        path = here["path"]
        if not here["visible"]:
            yield _at(group, f"does not see the run directory {path}",
                      "Put run_dir on a file system that all nodes share")  # fmt: skip
            return
        if not here["writable"]:
            yield _at([answer], f"cannot write to the run directory {path}",
                      "Mount it writable for this user on all nodes, or set run_dir elsewhere")  # fmt: skip
            return
        if here["free_bytes"] < LEAST_FREE_BYTES:
            free = here["free_bytes"] / 2**20
            yield _at(group, f"has {free:.0f} MiB left on the file system of {path}",
                      "Free space before checkpoints need it", WARNING)  # fmt: skip
            return


def _clock(group: Sequence[Answer], expected: Expected, nodes: Nodes) -> Iterator[Problem]:
    """Yield a problem if the clock is off: ranks read it between `asked`, if known, and `arrived`; the best counts."""
    known = [
        (answer.facts["time"], answer) for answer in group if "time" in answer.facts and answer.arrived is not None
    ]
    offsets = [theirs - max(a.arrived if a.asked is None else a.asked, min(theirs, a.arrived)) for theirs, a in known]
    offset = min(offsets, key=abs, default=0.0)
    if abs(offset) > CLOCK_S:
        way = "ahead of" if offset > 0 else "behind"
        yield _at(group, f"has a clock that is {abs(offset):.0f} s {way} the launcher's",
                  "Set it (chronyc makestep, or ntpd): otherwise profiles and logs of nodes do not match")  # fmt: skip


def _differences(answers: Mapping[int, Answer], expected: Expected) -> Iterator[Problem]:
    if not answers:
        return
    first = answers[min(answers)]

    def differ(read: Callable[[Answer], str], want: str, what: str, remedy: str) -> Iterator[Problem]:
        """Yield a problem for each node and value that is not `want`."""
        groups: dict[tuple[int, str], list[Answer]] = defaultdict(list)
        for _, answer in sorted(answers.items()):
            if (value := read(answer)) and value != want:
                groups[answer.node, value].append(answer)
        for (_, value), group in sorted(groups.items()):
            yield _at(group, what.format(value=value, want=want), remedy)

    reference = f"rank {first.rank} on {first.host}"
    for package, want in sorted((first.facts.get("versions") or {}).items()):
        yield from differ(
            lambda answer, name=package: str((answer.facts.get("versions") or {}).get(name, "")),  # type: ignore[misc]
            want, f"has {package} {{value}}, and {reference} has {{want}}",
            "Install the same on all nodes, or use one environment on a shared file system")  # fmt: skip
    yield from differ(
        lambda answer: str(answer.facts.get("code", "")), str(first.facts.get("code", "")),
        f"runs different source files of dist_gpt (digest {{value}}) than {reference} ({{want}})",
        "Use one checkout on a shared file system, or bring all nodes to the same version")  # fmt: skip
    config = expected.config or str(first.facts.get("config_expected") or first.facts.get("config", ""))
    if not config:
        return  # a job without a config.yaml of its own
    yield from differ(
        _config_read, config,
        "reads a different config.yaml in the run directory (digest {value}) than the launcher wrote ({want})",
        "Put run_dir on a file system that all nodes share; this node has a copy on its own disk")  # fmt: skip


def _config_read(answer: Answer) -> str:
    seen = (answer.facts.get("run_dir") or {}).get("visible")
    return str(answer.facts.get("config") or ("none" if seen else ""))


# --- for the supervisor ---------------------------------------------------------------------------------------------


def hosts(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the allocation's nodes; empty outside of one or if unreadable, as only messages use them."""
    try:
        return tuple(expand(environ["SLURM_JOB_NODELIST"])) if environ.get("SLURM_JOB_NODELIST") else ()
    except ConfigError:
        return ()


def look(spec: JobSpec, states: Iterable[RankState]) -> list[Problem]:
    """Judge what the watch knows now of the job `spec`."""
    answers, extra = {}, []
    for state in states:
        if state.hello is not None:
            answers[state.rank] = Answer.of(state.hello, arrived=state.arrived)
            extra += [Answer.of(hello) for hello in state.rivals]
    layout = spec.layout
    expected = Expected(
        ranks=spec.ranks,
        nodes=spec.nodes,
        layout=str(layout or ""),
        mesh=layout.world if layout is not None else None,
        interface=spec.interface,
        log=lambda rank: str(spec.log_path(rank)),
        hosts=hosts(os.environ),
    )
    return judge(answers, expected, extra)


def check_answers(spec: JobSpec, states: Iterable[RankState], missing: Iterable[int] = ()) -> str:
    """Return the errors that keep the job from starting, with the warnings after them; empty if there is no error.

    Ranks in `missing` count as absent even if they have come by now.
    """
    absent = set(missing)
    problems = look(spec, [state for state in states if state.rank not in absent])
    return text(problems) if any(problem.severity == ERROR for problem in problems) else ""


def warnings(spec: JobSpec, states: Iterable[RankState]) -> str:
    """Return the warnings for the user of a job that starts; empty if there are none."""
    return text(problem for problem in look(spec, states) if problem.severity == WARNING)
