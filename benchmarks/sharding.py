"""`sharding`: compare ours with DeepSpeed at the same ZeRO stage and with PyTorch's fully_shard, on one machine.

Every contender trains the same GPT from the same weights on the same micro-batches, with fused AdamW and clipping, on
gloo in float32, with one thread per rank and the same C heap, matmul kernels and CPU pinning as ours. Each has its own
processes, which stay alive and take turns step by step; a waiting process is blocked in a read. Peers run twice: as
they are, and with a true reduce-scatter (`+ rs`), since gloo's own is an all-reduce inside. Ours reads other ranks'
memory, as by default; with `--set launch.single_copy=off` it uses gloo like the peers. The ideal is one rank's share of
the work, done by the plain GPT in as many processes at once, without communication.

Memory is the peak of the resident size during two steps (VmHWM, reset before) less the size after the imports, for the
rank with the most. Bytes sent are counted by the ledger for ours and at torch's dispatcher for the peers, with gloo's
own factors; the raw figures also hold the loopback's counters.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders import OURS, SHARE, Case, Choice, Contender, cases, contenders
from benchmarks.pairs import Rounds, measure_rounds, summarise
from benchmarks.processes import Team
from benchmarks.result import FOLDER, Result, Row, machine
from benchmarks.settings import Settings
from dist_gpt.config.errors import ConfigError

NAME = "sharding"
PAIRS = 20
LOSS_TOLERANCE = 1e-4
NEVER_SLOWER, HALF, BOUND_BY_COMMUNICATION, FASTER = 1.0, 0.5, 0.3, 1 / 0.75
TUNING_WARM_UP, TUNING_STEPS = 2, 5
HEAD = (
    "case",
    "",
    "bucket",
    "ms a step",
    "ours is x as fast",
    "lower 95 %",
    "above ideal",
    "CPU ms",
    "peak MB",
    "sent MB",
)


@dataclass(frozen=True)
class Measured:
    """Figures of one contender: CPU seconds of a step (mean rank), largest memory peak of a rank, and bytes sent in a
    step: by the rank that sends most, and per rank by the loopback's counters."""

    choice: str
    step_s: float
    cpu_s: float
    memory_bytes: int
    sent_bytes: float
    loopback_bytes: float


def run(settings: Settings, say: Callable[[str], None]) -> Result:
    """Measure the cases that `--only` selects, one after the other."""
    try:
        chosen = cases(settings.only)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    result = Result(
        NAME, "ZeRO, one thread a rank, gloo, float32; x as fast is the median of pairs", settings.document()
    )
    result.grid.append(HEAD)
    cores = machine()["cores"]
    for ranks in sorted({case.ranks for case in chosen if case.ranks > cores}):
        result.notes.append(f"{ranks} ranks share {cores} cores: their times include waiting for a core")
    for case in chosen:
        _case(case, settings, result, say)
    if not settings.only:
        keep(result)
    return result


def keep(result: Result, folder: Path = FOLDER) -> Path:
    """Write the figures of a full run to a file named after the date. Return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y-%m-%d")
    path = folder / f"{NAME}-{stamp}.json"
    path.write_text(json.dumps(result.document(stamp), indent=1) + "\n")
    return path


def choose(case: Case, contender: Contender, settings: Settings, say: Callable[[str], None]) -> Choice:
    """Return the choice with the fastest of a few steps.

    The choices are tried one after the other in separate processes, whose memory is then no longer representative: the
    measured contender starts afresh.
    """
    if len(contender.choices) == 1:
        return contender.choices[0]
    found: dict[str, float] = {}
    with ExitStack() as stack:
        team: Team | None = None
        for choice in contender.choices:
            config = case.config(settings, choice.bucket_mb)
            if team is None:
                team = stack.enter_context(Team(contender.side, config, _threads(settings), options=choice.options))
            else:
                team.build(config, choice.options)
            team.run(TUNING_WARM_UP)
            found[choice.name] = min(team.run(1).seconds for _ in range(TUNING_STEPS))
    best = min(contender.choices, key=lambda choice: found[choice.name])
    times = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in found.items())
    say(f"{case.label}: {contender.name}: {times}: {best.name}")
    return best


def _threads(settings: Settings) -> int:
    return settings.threads or 1


def _case(case: Case, settings: Settings, result: Result, say: Callable[[str], None]) -> None:
    field = contenders(case)
    chosen = {contender.name: choose(case, contender, settings, say) for contender in field}
    with ExitStack() as stack:
        teams = {}
        for contender in field:
            choice = chosen[contender.name]
            config = case.config(settings, choice.bucket_mb)
            team = Team(contender.side, config, _threads(settings), options=choice.options)
            teams[contender.name] = stack.enter_context(team)
        compared = [contender.name for contender in field if contender.is_peer]
        rounds = measure_rounds(
            teams, settings.pairs or PAIRS, settings.warm_up, compared,
            lambda pair, times: say(f"{case.label}, {pair}: " + _times(times)),
        )  # fmt: skip
        measured = {
            name: _measured(team, chosen[name].name, statistics.median(rounds.seconds[name]), case.ranks)
            for name, team in teams.items()
        }
    result.raw[case.label] = {
        "steps_per_sample": rounds.steps, "seconds": rounds.seconds,
        "measured": {name: vars(found) for name, found in measured.items()},
    }  # fmt: skip
    lines = grid(case, rounds, measured)
    for line in lines:  # so that an interrupted run still shows its finished cases
        say("  ".join(cell for cell in line if cell))
    result.grid += lines
    result.rows += judge(case, rounds, measured)


def _times(times: dict[str, float]) -> str:
    return ", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in times.items()) + " ms"


def _measured(team: Team, choice: str, step_s: float, ranks: int) -> Measured:
    """Measure after the timing: memory in two steps, the contender's own count in one, the loopback's in another."""
    cpu_s = team.cpu_s / team.steps
    memory = max(team.step_memory(2))
    sent = max(sum(found.values()) for found in team.sent_bytes())
    before = loopback_bytes()
    team.run(1)
    return Measured(choice, step_s, cpu_s, memory, sent, (loopback_bytes() - before) / ranks)


def loopback_bytes(path: Path = Path("/proc/net/dev")) -> int:
    """Return the bytes that the loopback interface has sent since it came up, for all processes."""
    line = next(line for line in path.read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


# --- the results --------------------------------------------------------------------------------------------------


def above_ideal(rounds: Rounds, name: str) -> float:
    """Return the seconds per step of `name` above the ideal, the median over rounds."""
    return statistics.median(a - b for a, b in zip(rounds.seconds[name], rounds.seconds[SHARE], strict=True))


def share_of(ours: float, theirs: float) -> float:
    """Return `ours` / `theirs`, where negative values are noise and count as 0; infinite if only `theirs` is 0."""
    return max(0.0, ours) / theirs if theirs > 0 else (math.inf if ours > 0 else 0.0)


def grid(case: Case, rounds: Rounds, measured: dict[str, Measured]) -> list[tuple[str, ...]]:
    """Return the lines of the table, one for each contender."""
    lines: list[tuple[str, ...]] = []
    for name, found in measured.items():
        ratio, lower, above = "", "", ""
        if name not in (OURS, SHARE):
            summary = summarise(rounds.ratios(OURS, name))
            ratio, lower = f"{summary.median:.3f}", f"{summary.lower:.3f}"
        if name != SHARE:
            above = f"{1e3 * above_ideal(rounds, name):.1f} ms"
        lines.append((
            case.label if name == OURS else "", name, found.choice, f"{1e3 * found.step_s:.1f}", ratio, lower, above,
            f"{1e3 * found.cpu_s:.0f}", f"{found.memory_bytes / 1e6:.0f}", f"{found.sent_bytes / 1e6:.1f}",
        ))  # fmt: skip
    return lines


def judge(case: Case, rounds: Rounds, measured: dict[str, Measured]) -> list[Row]:
    """Return the rows that compare ours with the fastest peer in time, and with the leanest peer in memory."""
    peers = [name for name in measured if name not in (OURS, SHARE)]
    ideal_s = measured[SHARE].step_s
    fastest = min(peers, key=lambda name: measured[name].step_s)
    leanest = min(peers, key=lambda name: measured[name].memory_bytes)
    summary = summarise(rounds.ratios(OURS, fastest))
    share = 1 - ideal_s / measured[fastest].step_s
    bound = share >= BOUND_BY_COMMUNICATION
    overhead = share_of(above_ideal(rounds, OURS), above_ideal(rounds, fastest))
    what = case.label
    return [
        Row(f"{what}: speed over {fastest}", summary.median, target=FASTER if bound else NEVER_SLOWER),
        Row(f"{what}: lower 95 % bound of the mean (t)", summary.lower),
        Row(f"{what}: {fastest}'s share above the ideal", share),
        Row(f"{what}: time above the ideal over {fastest}'s", overhead, target=HALF, at_least=False),
        Row(
            f"{what}: peak memory over {leanest}'s",
            measured[OURS].memory_bytes / measured[leanest].memory_bytes, target=1.0, at_least=False,
        ),
        Row(f"{what}: difference of the losses", rounds.loss_error, target=LOSS_TOLERANCE, at_least=False),
    ]  # fmt: skip
