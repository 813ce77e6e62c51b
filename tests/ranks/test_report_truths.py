"""What is planted in a run is what its report finds: who was late and by how much, which stage is slow, what ran under
a collective, which message was too large, whose clock is off. Real processes; times are medians of ten steps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pytest

from dist_gpt.config.load import load as load_config
from dist_gpt.data.tokens import prepare
from dist_gpt.plan.api import plan_document
from dist_gpt.report.analyze import Profile, analyze, profile
from dist_gpt.report.load import load
from launch import run as launch_run
from launch.local import launch_local
from launch.spec import JobSpec
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
from tests.ranks.runs import Place

STEPS = {"train.steps": 13, "profile.steps": "[3, 12]", "train.eval_batches": 0, "train.eval_every": 0}
NEAR_S = 0.003
T = TypeVar("T", bound=Callable[..., None])
_runs = count()


@dataclass
class Found:
    """A planted run: its exit code, the profile and the document of its report."""

    code: int
    profile: Profile
    document: dict[str, Any]

    def part(self, name: str, rank: int) -> float:
        """Median seconds over the steps of a category on a rank."""
        budget = self.profile.budget
        return float(np.median(budget.parts[name][budget.ranks.index(rank)])) / 1e9


@pytest.fixture
def planted(place: Place, capfd: pytest.CaptureFixture[str]) -> Callable[..., Found]:
    def run(plant: str, name: str = "", **sets: object) -> Found:
        folder = place.folder / f"{name or plant}_{next(_runs)}"
        pairs = {"model.dropout": 0.0, "run_dir": folder, **STEPS, **sets}
        config = load_config(str(place.config), [f"{key}={value}" for key, value in pairs.items()])
        prepare(config)
        launch_run.create_run_dir(config, plan_document(config, 0))
        program = str(Path(__file__).with_name("planted_run.py"))
        argv = (sys.executable, "-m", "launch.worker", program, plant, str(folder / "config.yaml"))
        code = launch_local(JobSpec(argv, config.world_size, folder / "logs", env={"DIST_GPT_RUN_DIR": str(folder)}))
        out, err = capfd.readouterr()
        assert code in (0, 1) and "accounting" in out, out + err
        found = profile(load(folder))
        return Found(code, found, analyze(found.run, found))

    return run


def undisturbed(test: T) -> T:
    """What else a shared machine does meanwhile can only add to a time: a truth must be found in one of three runs."""

    @wraps(test)
    def thrice(*args: Any, **kwargs: Any) -> None:
        for left in (2, 1, 0):
            try:
                return test(*args, **kwargs)
            except AssertionError:
                if not left:
                    raise

    return cast("T", thrice)


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
@undisturbed
def test_late_rank(axis: str, planted: Callable[..., Found]) -> None:
    """The other one waits for it, in the next collective. Two ranks: more would take each other's processors."""
    split = {"parallel.tp": 2, "train.micro_batch": 2} if axis == "tp" else {"parallel.dp": 2}
    found = planted("late_rank", f"late_{axis}", **split, **{"model.num_layers": 1, "train.global_batch": 2})
    closes(found)
    late, other = 0, 1
    assert near(found.part(f"wait.{axis}", other), LATE_S)
    assert near(LATE_S + found.part(f"wait.{axis}", late), LATE_S), "it waits for nobody"
    assert near(found.part("descheduled", late), LATE_S), "it slept"
    said = found.document["verdict"]
    assert said["culprit"] == late and said["bound_by"] in (f"wait.{axis}", f"transfer.{axis}"), said
    assert f"waiting for rank {late}" in said["line"]
    worst = found.document["stragglers"]["culprits"][0]
    assert (worst["rank"], worst["kind"]) == (late, "persistent") and near(worst["caused_s"], LATE_S)
    rows = [row for row in found.document["collectives"] if row["axis"] == axis]
    assert rows and all(row["time_s_p50"] < LATE_S / 2 for row in rows), "a late rank is no slow network"


@undisturbed
def test_the_cause_is_named_not_the_messenger(planted: Callable[..., Found]) -> None:
    """Rank 2's tp partner waits for it, and the other copy then waits for either of them: both is rank 2's doing."""
    found = planted("late_rank", **{"parallel.dp": 2, "parallel.tp": 2, "model.num_layers": 1, "train.global_batch": 2})
    closes(found)
    late, partner = 2, 3
    assert near(found.part("wait.tp", partner), LATE_S)
    said = found.document["verdict"]
    assert said["culprit"] == late and said["bound_by"] in ("wait.data", "wait.tp"), said
    matrix = np.array(found.document["stragglers"]["matrix_s"])
    # what gloo itself takes meanwhile in the other copy shortens its wait: how much is the machine's affair
    assert matrix[late].sum() > 0.8 * matrix.sum()


@undisturbed
def test_slow_stage(planted: Callable[..., Found]) -> None:
    pipeline = {"parallel.pp": 4, "model.num_layers": 4, "parallel.layers": "[1, 1, 1, 1]", "train.global_batch": 4}
    found = planted("slow_stage", **pipeline)
    closes(found)
    stages = found.document["pipeline"]["stages"]
    for stage in stages:
        times = 2 if stage["stage"] == SLOW_STAGE else 1
        assert near(stage["forward_s"], times * FORWARD_S) and near(stage["backward_s"], times * BACKWARD_S)
    said = found.document["verdict"]
    assert said["bound_by"] == "bubble" and said["culprit"] == SLOW_STAGE, said
    assert f"stage {SLOW_STAGE} takes" in said["next"]


@undisturbed
def test_balanced_pipeline(planted: Callable[..., Found]) -> None:
    pipeline = {"parallel.pp": 4, "model.num_layers": 4, "parallel.layers": "[1, 1, 1, 1]", "train.global_batch": 8}
    found = planted("balanced_stages", **pipeline)
    closes(found)
    bubble = found.document["pipeline"]["bubble"]
    p, m = 4, 8
    assert bubble["structural"] == pytest.approx((p - 1) / (m + p - 1), abs=0.001)
    assert abs(bubble["measured"] - bubble["simulated"]) < 0.05
    assert abs(bubble["measured"] - bubble["structural"]) < 0.05
    in_budget = np.mean([found.part("bubble", rank) for rank in range(p)])
    step = float(np.median(found.profile.budget.wall)) / 1e9
    assert abs(in_budget / step - bubble["structural"]) < 0.05, "the drain is bubble too"


@undisturbed
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
    assert near(float(np.median((p.calls.wait - p.calls.issued)[calls])) / 1e9, UNDER_S)
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
@undisturbed
def test_shifted_clock(planted: Callable[..., Found]) -> None:
    found = planted("shifted_clock", **{"parallel.tp": 2})
    closes(found)
    row = next(row for row in found.document["identity"]["clocks"] if row["rank"] == CLOCK_RANK)
    assert abs(row["offset_s"] + CLOCK_S) <= row["error_s"] < 0.001
    assert found.document["verdict"]["culprit"] is None or found.part("wait.tp", 0) < LATE_S
