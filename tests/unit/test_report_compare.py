"""Two reports compared: what is chance is not told, what is planted is found."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from dist_gpt.report.analysis.compare import compare, config_changes
from dist_gpt.report.analysis.statistics import FEWEST_STEPS, Steps, student

FEW, MANY = 200, 600
either_number = pytest.mark.parametrize("pairs", [FEW, pytest.param(MANY, marks=pytest.mark.all_cells)])


@dataclass(frozen=True)
class Machine:
    """How its times vary: standard deviations of logs, the chance of a hiccup, and the share of time that others may
    take from a run."""

    steps: float
    runs: float
    hiccups: float
    correlation: float
    load: tuple[float, float]


CALM = Machine(steps=0.02, runs=0.006, hiccups=0.0, correlation=0.0, load=(0.0, 0.0))
ORDINARY = Machine(steps=0.04, runs=0.015, hiccups=0.03, correlation=0.3, load=(0.0, 0.03))
BUSY = Machine(steps=0.12, runs=0.03, hiccups=0.08, correlation=0.4, load=(0.0, 1.0))
BASE = {"forward": 0.08, "backward": 0.16, "optimizer": 0.02, "transfer.tp": 0.05, "wait.tp": 0.03, "bubble": 0.04,
        "data": 0.005, "descheduled": 0.004, "unexplained": 0.001}  # fmt: skip
COMPUTING = ("forward", "backward", "optimizer")


def series(rng: np.random.Generator, n: int, deviation: float, correlation: float) -> np.ndarray:
    """A first-order autoregression, (n,)."""
    noise = rng.normal(0, deviation * math.sqrt(1 - correlation**2), n)
    values = np.empty(n)
    values[0] = rng.normal(0, deviation)
    for i in range(1, n):
        values[i] = correlation * values[i - 1] + noise[i]
    return values


def report(machine: Machine, seed: int, n: int = 20, slower: dict[str, float] | None = None) -> dict[str, Any]:
    """The document of a run whose categories take `slower` times as long as in BASE."""
    rng = np.random.default_rng(seed)
    run = math.exp(rng.normal(0, machine.runs))
    load = np.maximum(0, rng.uniform(*machine.load) * (1 + series(rng, n, 0.5, 0.6)))
    parts: dict[str, np.ndarray] = {}
    for name, seconds in BASE.items():
        common = 1.0 if name in COMPUTING else 1.5
        parts[name] = (
            seconds
            * run
            * (slower or {}).get(name, 1.0)
            * np.exp(common * series(rng, n, machine.steps, machine.correlation))
        )
        if name not in COMPUTING:  # a run's placement of processes matters to them
            parts[name] *= math.exp(rng.normal(0, 4 * machine.runs))
    computing = sum(parts[name] for name in COMPUTING)
    parts["descheduled"] += 0.5 * load * computing
    parts["wait.tp"] += 0.5 * load * computing  # the others are waited for
    for name in COMPUTING:
        parts[name] *= 1 + 0.1 * load
    hiccups = (rng.random(n) < machine.hiccups) * rng.exponential(0.5, n)
    parts["descheduled"] += hiccups * computing
    step = np.sum(list(parts.values()), axis=0)
    p50 = float(np.median(step))
    return {
        "name": f"run {seed}",
        "run_dir": f"runs/{seed}",
        "config": {"name": f"run {seed}", "run_dir": f"runs/{seed}", "train.steps": 200},
        "identity": {"steps_profiled": n, "world": 4},
        "headline": {
            "step_s_p50": p50,
            "step_s_samples": step.tolist(),
            "tokens_per_s": 2048 / float(step.mean()),
            "mfu": 0.03 / p50,
            "goodput": float(rng.normal(0.9, 0.01)),
        },
        "budget_s": {name: float(part.mean()) for name, part in parts.items()},
        "budget_spread_s": {name: float(part.std(ddof=1)) / math.sqrt(n) for name, part in parts.items()},
        "pipeline": {"bubble": {"measured": float(parts["bubble"].mean() / step.mean())}},
        "collectives": [
            {"axis": "tp", "op": "all_reduce", "calls": 40.0, "bytes_per_step": 40 * 65536,
             "time_s_p50": float(np.median(parts["transfer.tp"])) / 40,
             "time_s_p95": float(np.quantile(parts["transfer.tp"], 0.95)) / 40},
        ],
        "memory_bytes": [{"rank": 0, "allocated_peak": 4_000_000 + int(rng.integers(0, 50_000)), "measured": None}],
    }  # fmt: skip


def told(result: dict[str, Any]) -> list[str]:
    """What is called different."""
    return [f"{row['what']} {row['verdict']}" for row in result["rows"] if row["verdict"] != "same"]


@either_number
@pytest.mark.parametrize("machine", [CALM, ORDINARY, BUSY], ids=["calm", "ordinary", "busy"])
@pytest.mark.parametrize("n", [6, 11, 20])
def test_two_runs_of_one_configuration_show_nothing(machine: Machine, n: int, pairs: int) -> None:
    alarms = {
        seed: found
        for seed in range(pairs)
        if (found := told(compare(report(machine, 2 * seed, n), report(machine, 2 * seed + 1, n))))
    }
    assert len(alarms) <= 0.01 * pairs, alarms


@either_number
@pytest.mark.parametrize("machine", [CALM, ORDINARY], ids=["calm", "ordinary"])
@pytest.mark.parametrize("larger", ["this", "other"])
def test_a_step_slower_by_a_fifth_is_found(machine: Machine, larger: str, pairs: int) -> None:
    """And so is one that is faster by as much; the category that it comes from is named."""
    names = COMPUTING
    factor = 1 + 0.2 * sum(BASE.values()) / sum(BASE[name] for name in names)
    found = named = 0
    for seed in range(pairs):
        slow = report(machine, 2 * seed, 20, dict.fromkeys(names, factor))
        fast = report(machine, 2 * seed + 1, 20)
        result = compare(slow, fast) if larger == "this" else compare(fast, slow)
        verdicts = {row["what"]: row["verdict"] for row in result["rows"]}
        expected = "worse" if larger == "this" else "better"
        found += verdicts["step time"] == expected
        named += verdicts["budget: backward"] == expected
    assert found >= 0.95 * pairs
    assert named >= 0.95 * pairs


@either_number
def test_waiting_that_takes_a_fifth_of_the_step_more_is_found_and_named(pairs: int) -> None:
    factor = 1 + 0.2 * sum(BASE.values()) / BASE["wait.tp"]
    found = 0
    for seed in range(pairs):
        result = compare(report(ORDINARY, 2 * seed, 20, {"wait.tp": factor}), report(ORDINARY, 2 * seed + 1, 20))
        found += {"step time worse", "budget: wait.tp worse"} <= set(told(result))
    assert found >= 0.95 * pairs


# --- single facts ----------------------------------------------------------------------------------------------------


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in result["rows"]}


def test_the_form() -> None:
    result = compare(report(ORDINARY, 1), report(ORDINARY, 2))
    json.dumps(result, allow_nan=False)
    assert result["other"] == {"name": "run 2", "run_dir": "runs/2"}
    assert result.keys() == {"other", "rows", "verdict", "config_changes"}
    for row in result["rows"]:
        assert row.keys() == {"what", "unit", "this", "other", "change", "noise", "verdict"}
        assert row["verdict"] in ("same", "better", "worse", "changed")
    names = list(rows(result))
    assert names[:6] == ["step time", "tokens per second", "MFU", "goodput", "bubble", "memory peak"]
    assert {f"budget: {name}" for name in BASE} <= set(names)
    assert names[-3:] == ["tp collectives: time", "tp collectives: calls", "tp collectives: bytes"]
    assert len(names) == len(set(names))


def test_a_report_compared_with_itself_has_no_change() -> None:
    document = report(BUSY, 3)
    result = compare(document, copy.deepcopy(document))
    assert told(result) == [] and result["config_changes"] == []
    assert {row["change"] for row in result["rows"]} == {0.0}
    assert result["verdict"].startswith("No difference in step time beyond the noise (+0.0 %")


@pytest.mark.parametrize(
    ("key", "row"), [("bytes_per_step", "tp collectives: bytes"), ("calls", "tp collectives: calls")]
)
def test_bytes_and_calls_are_exact(key: str, row: str) -> None:
    this, other = report(BUSY, 4), report(BUSY, 5)
    this["collectives"][0][key] += 1
    result = compare(this, other)
    assert told(result) == [f"{row} changed"]
    assert f"Changed: {row}." in result["verdict"]


def test_an_axis_that_only_one_run_has_is_told() -> None:
    this, other = report(CALM, 6), report(CALM, 7)
    this["collectives"].append({**this["collectives"][0], "axis": "data"})
    result = rows(compare(this, other))
    assert (result["data collectives: bytes"]["this"], result["data collectives: bytes"]["other"]) == (40 * 65536, 0)
    assert result["data collectives: bytes"]["verdict"] == "changed"
    assert result["data collectives: bytes"]["change"] is None


def test_half_as_much_again_of_nearly_nothing_is_the_same() -> None:
    """`data` takes 1 % of the step."""
    result = rows(compare(report(CALM, 8, slower={"data": 1.5}), report(CALM, 9)))
    assert result["budget: data"]["change"] == pytest.approx(0.5, abs=0.1)
    assert result["budget: data"]["verdict"] == "same"


def test_memory_is_told_beyond_its_margin() -> None:
    this, other = report(CALM, 10), report(CALM, 11)
    this["memory_bytes"].append({"rank": 1, "allocated_peak": None, "measured": {"peak": 5_000_000}})
    row = rows(compare(this, other))["memory peak"]
    assert (row["this"], row["verdict"]) == (5_000_000, "worse")
    assert rows(compare(other, this))["memory peak"]["verdict"] == "better"


def test_a_larger_batch_changes_the_step_and_not_what_it_is_worth() -> None:
    """Twice the work in twice the time: tokens per second are the same, and no regression."""
    this, other = report(CALM, 12, slower=dict.fromkeys(BASE, 2.0)), report(CALM, 13)
    this["config"]["train.global_batch"] = 32
    this["headline"]["tokens_per_s"] *= 2
    this["headline"]["mfu"] *= 2
    result = compare(this, other)
    verdicts = {name: row["verdict"] for name, row in rows(result).items()}
    assert (verdicts["step time"], verdicts["tokens per second"], verdicts["MFU"]) == ("worse", "same", "same")
    assert "The configurations differ in train.global_batch." in result["verdict"]


def test_a_busier_machine_is_no_regression() -> None:
    """Another job took half of the processors during one of the runs."""
    crowded = Machine(ORDINARY.steps, ORDINARY.runs, ORDINARY.hiccups, ORDINARY.correlation, (0.4, 0.6))
    for seed in range(100):
        result = compare(report(crowded, 2 * seed), report(ORDINARY, 2 * seed + 1))
        assert told(result) == []
        assert "The machine was busier during this run" in result["verdict"]
    assert "during the other run" in compare(report(ORDINARY, 1), report(crowded, 2))["verdict"]


def test_one_burst_of_foreign_load_is_no_regression() -> None:
    """A third of the steps take twice as long."""
    document = report(CALM, 14, n=12)
    samples = np.array(document["headline"]["step_s_samples"])
    samples[4:8] *= 2
    document["headline"] |= {"step_s_samples": samples.tolist(), "step_s_p50": float(np.median(samples))}
    assert told(compare(document, report(CALM, 15, n=12))) == []


def test_the_verdict_says_how_much_and_where() -> None:
    result = compare(report(CALM, 16, slower={"wait.tp": 4.0}), report(CALM, 17))
    assert result["verdict"].startswith("Steps take 2")
    assert "% longer (0.39" in result["verdict"] or "% longer (39" in result["verdict"]
    assert "Largest changes: wait.tp (+9" in result["verdict"]


def test_keys_of_the_configuration() -> None:
    this = {"config": {"name": "a", "run_dir": "x", "parallel.tp": 2, "optim.lr": 0.1, "new": 1}}
    other = {"config": {"name": "b", "run_dir": "y", "parallel.tp": 4, "optim.lr": 0.1, "old": [1]}}
    assert config_changes(this, other) == [
        {"key": "new", "this": 1, "other": None},
        {"key": "old", "this": None, "other": [1]},
        {"key": "parallel.tp", "this": 2, "other": 4},
    ]


@pytest.mark.parametrize("n", [0, 1, FEWEST_STEPS - 1])
def test_too_few_steps_are_no_measurement(n: int) -> None:
    short = report(CALM, 18, slower=dict.fromkeys(BASE, 3.0))
    short["headline"]["step_s_samples"] = short["headline"]["step_s_samples"][:n]
    result = compare(short, report(CALM, 19))
    assert told(result) == []
    assert rows(result)["step time"]["noise"] is None
    assert f"at least {FEWEST_STEPS} are needed" in result["verdict"]


@pytest.mark.parametrize("broken", [None, [], "x", float("nan"), {"tp": None}, -1])
@pytest.mark.parametrize(
    "key", ["headline", "budget_s", "budget_spread_s", "pipeline", "collectives", "memory_bytes", "identity", "config"]
)
def test_documents_with_holes(key: str, broken: Any) -> None:
    good = report(ORDINARY, 20)
    for this, other in (({**good, key: broken}, good), (good, {**good, key: broken})):
        json.dumps(compare(this, other)["rows"], allow_nan=False)
    json.dumps(compare({}, good)["rows"], allow_nan=False)
    json.dumps(compare(good, {})["rows"], allow_nan=False)
    assert compare({}, {})["rows"] == []


# --- the statistics ---------------------------------------------------------------------------------------------------


def test_the_spread_is_that_of_the_ordinary_steps() -> None:
    rng = np.random.default_rng(0)
    times = 0.4 * np.exp(rng.normal(0, 0.05, 400))
    steps = Steps.of(times.tolist())
    times[::40] *= 5  # hiccups
    disturbed = Steps.of(times.tolist())
    assert steps is not None and disturbed is not None
    assert steps.spread == pytest.approx(0.05, rel=0.15)
    assert math.exp(steps.median) == pytest.approx(0.4, rel=0.01)
    assert disturbed.median == pytest.approx(steps.median, abs=0.005)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_the_error_of_the_median_is_the_one_that_is_seen(correlation: float) -> None:
    """Of steps that resemble the step before as well."""
    rng = np.random.default_rng(1)
    found = [Steps.of(np.exp(series(rng, 40, 0.05, correlation)).tolist()) for _ in range(400)]
    medians = [steps.median for steps in found if steps is not None]
    errors = [steps.error for steps in found if steps is not None]
    assert float(np.std(medians)) == pytest.approx(float(np.mean(errors)), rel=0.25)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(3.0, 7.453), (5.0, 4.773), (10.0, 3.581), (30.0, 3.030), (math.inf, 2.807)]
)
def test_students_quantiles(freedom: float, quantile: float) -> None:
    """Tables: 99.5 %, two-sided."""
    assert student(freedom) == pytest.approx(quantile, rel=0.06)
