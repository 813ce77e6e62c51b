"""What is planted in a run is what its report finds: who was late and by how much, which stage is slow, what ran under
a collective, which message was too large, whose clock is off. Real processes.

How long anything takes depends on the machine, so no duration is compared with the one that was asked for: `Truth`
works out what happened from the stamps that every rank left apart from the ledger, and the report is held against that.
What a plant guarantees on any machine (that it slept at least so long, that the others were there before) is asserted
besides. Verdicts on planted times are tested in tests/unit/test_report_analyze.py, where the clock is simulated.
"""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from dist_gpt.config.load import load as load_config
from dist_gpt.data.tokens import prepare
from dist_gpt.plan.api import plan_document
from dist_gpt.report.analysis.analyze import Profile, analyze, profile
from dist_gpt.report.read.load import load
from launch import run as launch_run
from tests.ranks.planted_run import (
    BACKWARD_S,
    CLOCK_RANK,
    CLOCK_S,
    EXTRA,
    FORWARD_S,
    LATE_S,
    OVERSIZED_STEP,
    SENDER,
    SLOW_STAGE,
    UNDER_S,
)
from tests.ranks.runs import Place, launch_ranks

FIRST, LAST = 3, 12
STEPS = {"train.steps": 13, "profile.steps": f"[{FIRST}, {LAST}]", "train.eval_batches": 0, "train.eval_every": 0}
NEAR_S = 0.003
_runs = count()
Action = tuple[int, str]
"""Step and action of the step list, as its text."""


class Truth:
    """What happened in the profiled steps of a run on one machine, from the ranks' own stamps. Seconds."""

    def __init__(self, folder: Path, world: int) -> None:
        stamps = [json.loads((folder / f"stamps.rank{rank}.json").read_text()) for rank in range(world)]
        self.calls = [[row for row in one["calls"] if FIRST <= row[0] <= LAST] for one in stamps]
        self.compiler = any(one["compiler"] for one in stamps)
        self.entries = [[row for row in one["entries"] if FIRST <= row[0] <= LAST] for one in stamps]

    @cached_property
    def arrivals(self) -> dict[Any, dict[int, int]]:
        """When each member issued each collective or message, by (axis, ranks, number)."""
        found: dict[Any, dict[int, int]] = defaultdict(dict)
        for rank, rows in enumerate(self.calls):
            for _, axis, ranks, seq, op, issue, _, _ in rows:
                found[axis, tuple(ranks), seq, op in ("send", "recv")][rank] = issue
        return found

    def waits(self, rank: int, axis: str) -> list[tuple[int, int, float]]:
        """(step, rank that came last, seconds that `rank` stood still until then) of each of its waits along `axis`."""
        found = []
        for step, name, ranks, seq, op, _, wait, waited in self.calls[rank]:
            if name == axis and wait:
                came = self.arrivals[axis, tuple(ranks), seq, op in ("send", "recv")]
                last = max(came, key=lambda member: came[member])
                found.append((step, last, max(0, min(waited, came[last]) - wait) / 1e9))
        return found

    def wait(self, rank: int, axis: str) -> float:
        """Seconds of a step, median over steps."""
        by_step = dict.fromkeys(range(FIRST, LAST + 1), 0.0)
        for step, _, seconds in self.waits(rank, axis):
            by_step[step] += seconds
        return median(by_step.values())

    def actions(self, rank: int) -> dict[Action, tuple[int, int, int]]:
        """Begin, end, and ns blocked by messages that had not been sent, of each F and B of `rank`."""
        found: dict[Action, tuple[int, int, int]] = {}
        idle = [(row[6], row[7], min(row[7], max(self.arrivals["pp", tuple(row[2]), row[3], True].values())))
                for row in self.calls[rank] if row[4] == "recv"]  # fmt: skip
        for step, action, kind, begin, end in self.entries[rank]:
            if kind in ("forward", "backward"):
                lost = sum(max(0, came - wait) for wait, _, came in idle if begin <= wait < end)
                first, last, before = found.get((step, action), (begin, end, 0))
                found[step, action] = min(first, begin), max(last, end), before + lost
        return found

    def action_s(self, rank: int, op: str) -> float:
        """Median seconds of `rank`'s actions `op` (F or B), without waiting for messages."""
        spans = [span for (_, action), span in self.actions(rank).items() if op in action]
        return median(end - begin - lost for begin, end, lost in spans) / 1e9

    def bubble(self, world: int) -> float:
        """Idle share of the pipelined part of a step, mean over stages and steps."""
        shares = []
        stages = [self.actions(rank) for rank in range(world)]
        for step in range(FIRST, LAST + 1):
            spans = [span for actions in stages for (at, _), span in actions.items() if at == step]
            whole = max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans)
            shares.append(1 - sum(end - begin - lost for begin, end, lost in spans) / (world * whole))
        return float(np.mean(shares))


@dataclass
class Found:
    """A planted run: its exit code, the profile and the document of its report, and what truly happened."""

    code: int
    profile: Profile
    document: dict[str, Any]
    truth: Truth

    def part(self, name: str, rank: int) -> float:
        """Median seconds over the steps of a category on a rank."""
        budget = self.profile.budget
        return float(np.median(budget.parts[name][budget.ranks.index(rank)])) / 1e9


@pytest.fixture
def planted(place: Place) -> Callable[..., Found]:
    def run(plant: str, name: str = "", **sets: object) -> Found:
        folder = place.folder / f"{name or plant}_{next(_runs)}"
        pairs = {"model.dropout": 0.0, "run_dir": folder, **STEPS, **sets}
        config = load_config(str(place.config), [f"{key}={value}" for key, value in pairs.items()])
        prepare(config)
        launch_run.create_run_dir(config, plan_document(config, 0))
        program = [str(Path(__file__).with_name("planted_run.py")), plant, str(folder / "config.yaml")]
        env = {"DIST_GPT_RUN_DIR": str(folder)}
        code, said = launch_ranks(folder, program, config.world_size, env, ("dist_gpt.train.trainer",))
        assert code in (0, 1) and "accounting" in said, said
        found = profile(load(folder))
        truth = Truth(folder, config.world_size)
        assert not truth.compiler, "torch._dynamo or sympy was imported: seconds of every rank's start"
        return Found(code, found, analyze(found.run, found), truth)

    return run


def near(value: float, truth: float) -> bool:
    """Within 10 % or 3 ms."""
    return abs(value - truth) <= max(0.1 * truth, NEAR_S)


def closes(found: Found) -> None:
    """Categories add up to the step and nothing is negative, on every rank and in every step."""
    budget = found.profile.budget
    assert all((part >= 0).all() for part in budget.parts.values()), {k: v.min() for k, v in budget.parts.items()}
    assert np.allclose(sum(budget.parts.values()), budget.wall)
    assert found.document["problems"] == []


@pytest.mark.parametrize("axis", ["tp", "data"])
def test_late_rank(axis: str, planted: Callable[..., Found]) -> None:
    """The other rank waits for it, in the next collective."""
    split = {"parallel.tp": 2, "train.micro_batch": 2} if axis == "tp" else {"parallel.dp": 2}
    found = planted("late_rank", f"late_{axis}", **split, **{"model.num_layers": 1, "train.global_batch": 2})
    closes(found)
    late, other = 0, 1
    for rank in (late, other):
        assert near(found.part(f"wait.{axis}", rank), found.truth.wait(rank, axis))
    assert found.part(f"wait.{axis}", other) >= LATE_S, "it was there before the late one went to sleep"
    assert found.part("descheduled", late) >= LATE_S, "it slept"
    caused = defaultdict(float)
    for victim in (late, other):
        for name in ("tp", "data", "world"):
            for _, cause, seconds in found.truth.waits(victim, name):
                caused[cause] += seconds / (LAST - FIRST + 1) if cause != victim else 0.0
    rows = {row["rank"]: row for row in found.document["stragglers"]["culprits"]}
    assert near(rows[late]["caused_s"], caused[late]) and rows[late]["caused_s"] >= LATE_S
    assert found.document["stragglers"]["culprits"][0]["rank"] == max(caused, key=lambda rank: caused[rank])


def test_the_cause_is_named_not_the_messenger(planted: Callable[..., Found]) -> None:
    """Rank 2's tp partner waits for it, and the other copy then waits for either of them: both is rank 2's doing."""
    found = planted("late_rank", **{"parallel.dp": 2, "parallel.tp": 2, "model.num_layers": 1, "train.global_batch": 2})
    closes(found)
    late, partner = 2, 3
    assert near(found.part("wait.tp", partner), found.truth.wait(partner, "tp"))
    last_of_copies = {last for _, last, seconds in found.truth.waits(1, "data") if seconds >= LATE_S}
    assert last_of_copies == {partner}, "the messenger comes last"
    matrix = np.array(found.document["stragglers"]["matrix_s"])
    assert (matrix[late][[0, 1, partner]] >= 0.95 * LATE_S).all(), "all that it slept is charged to it, three times"


def test_slow_stage(planted: Callable[..., Found]) -> None:
    pipeline = {"parallel.pp": 4, "model.num_layers": 4, "parallel.layers": "[1, 1, 1, 1]", "train.global_batch": 4}
    found = planted("slow_stage", **pipeline)
    closes(found)
    stages = found.document["pipeline"]["stages"]
    loads = []
    for stage in stages:
        rank = stage["stage"]
        forward, backward = found.truth.action_s(rank, "F"), found.truth.action_s(rank, "B")
        assert near(stage["forward_s"], forward) and near(stage["backward_s"], backward)
        times = 2 if rank == SLOW_STAGE else 1
        assert stage["forward_s"] >= times * FORWARD_S and stage["backward_s"] >= times * BACKWARD_S
        loads.append(forward + backward)
    slowest = found.document["pipeline"]["slow_stage"]
    assert slowest in (int(np.argmax(loads)), None)


def test_balanced_pipeline(planted: Callable[..., Found]) -> None:
    pipeline = {"parallel.pp": 4, "model.num_layers": 4, "parallel.layers": "[1, 1, 1, 1]", "train.global_batch": 8}
    found = planted("balanced_stages", **pipeline)
    closes(found)
    bubble = found.document["pipeline"]["bubble"]
    p, m = 4, 8
    assert bubble["structural"] == pytest.approx((p - 1) / (m + p - 1), abs=0.001)
    assert bubble["measured"] == pytest.approx(found.truth.bubble(p), abs=0.02)
    assert bubble["structural"] + bubble["imbalance"] + bubble["transfer"] == pytest.approx(bubble["measured"])


def test_compute_under_a_collective(planted: Callable[..., Found]) -> None:
    wide = {"model.hidden_size": 256, "model.num_heads": 4, "model.num_layers": 1, "train.micro_batch": 8}
    found = planted("under_collective", **{"parallel.tp": 2, "train.dtype": "fp32", **wide})
    closes(found)
    p = found.profile
    entries = [step.kind for step in p.run.plan_of(0).steps]
    backward = np.array([index >= 0 and entries[index] == "backward" for index in p.calls.index.tolist()])
    calls = backward & (p.calls.rank == 0) & (p.calls.axis == p.calls.axes.index("tp"))
    assert int(calls.sum()) == 3 * len(p.budget.steps), "qkv, up and the head"
    assert np.median(p.stood.transfer[calls]) / 1e9 < NEAR_S, "what is computed under a collective hides it"
    assert (p.calls.wait - p.calls.issued)[calls].min() / 1e9 >= UNDER_S
    row = next(row for row in found.document["overlap"]["axes"] if row["axis"] == "tp")
    assert row["exposed_s"] < row["busy_s"]


def test_oversized_message(planted: Callable[..., Found]) -> None:
    found = planted("oversized_message", **{"parallel.pp": 2, "train.global_batch": 2})
    assert found.code == 1
    right = 32 * 32 * 8  # tokens x hidden x float64
    rows = found.document["accounting"]["differences"]
    places = {(row["rank"], row["step"], row["axis"], row["op"]) for row in rows}
    assert places == {(SENDER, OVERSIZED_STEP, "pp", "send")}
    sizes = {(row["payload_bytes"], row["calls"]) for row in rows}
    assert sizes == {(right, -1), (right + EXTRA * 8, 1)}
    assert {row["action"] for row in rows} == {"send 0SEND_F0", "send 0SEND_F1"}
    line = f"train step {OVERSIZED_STEP}, send 0SEND_F0: 1 more pp send of {right + EXTRA * 8} bytes than declared"
    assert any(line in found_line for found_line in found.document["accounting"]["lines"])
    assert found.document["accounting"]["exact"] is False
    wrong = [row for row in found.document["predicted"] if row["must_be_equal"] and row["error"]]
    assert [row["what"] for row in wrong] == ["pp send, payload of all ranks"]


def _time_namespaces() -> bool:
    probe = ["unshare", "--time", "--monotonic", "1", "--fork", "true"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not _time_namespaces(), reason="the kernel gives this user no time namespaces")
def test_shifted_clock(planted: Callable[..., Found]) -> None:
    found = planted("shifted_clock", **{"parallel.tp": 2})
    closes(found)
    row = next(row for row in found.document["identity"]["clocks"] if row["rank"] == CLOCK_RANK)
    assert abs(row["offset_s"] + CLOCK_S) <= row["error_s"] < CLOCK_S / 2
    # Of two ranks one at a time can wait. If CLOCK_S were taken for waiting, there would be more of it than time.
    assert sum(found.document["stragglers"]["caused_s"]) < sum(found.document["budget_s"].values())
