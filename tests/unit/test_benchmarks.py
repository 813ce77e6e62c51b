"""The benchmarks' alternation and statistics, and the life of their processes. No torch, nothing is timed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import bubble
from benchmarks.__main__ import NAMES, main, parser, settings_of
from benchmarks.pairs import (
    Pairs,
    Sample,
    measure,
    measure_rounds,
    order,
    relative_error,
    steps_per_sample,
    summarise,
    t_quantile,
    t_two_sided,
)  # fmt: skip
from benchmarks.processes import Team, Worker, WorkerError
from benchmarks.result import Result, Row, number, table, write
from benchmarks.settings import Settings, tokens_per_step
from dist_gpt.config.errors import ConfigError
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]

# --- statistics -----------------------------------------------------------------------------------------------------


# One-sided 95 %, from the t table of the NIST/SEMATECH e-Handbook, section 1.3.6.7.2.
@pytest.mark.parametrize(
    ("freedom", "wanted"),
    [(1, 6.314), (2, 2.920), (3, 2.353), (4, 2.132), (5, 2.015), (9, 1.833), (10, 1.812), (19, 1.729), (100, 1.660)],
)
def test_t_quantile_against_the_published_table(freedom: int, wanted: float) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(wanted, abs=5e-4)


@pytest.mark.parametrize(("probability", "freedom", "wanted"), [(0.975, 4, 2.776), (0.99, 7, 2.998), (0.5, 6, 0.0)])
def test_t_quantile_at_other_probabilities(probability: float, freedom: int, wanted: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(wanted, abs=5e-4)


def test_t_distribution_with_many_degrees_of_freedom_is_nearly_normal() -> None:
    assert t_two_sided(1.96, 2001) == pytest.approx(math.erf(1.96 / math.sqrt(2)), abs=2e-4)
    assert t_two_sided(1.0, 1) == pytest.approx(0.5)  # Cauchy
    assert t_two_sided(1.0, 2) == pytest.approx(1 / math.sqrt(3))  # t / sqrt(2 + t^2)


@pytest.mark.parametrize(("probability", "freedom"), [(0.4, 3), (1.0, 3), (0.95, 0)])
def test_t_quantile_refuses_what_it_cannot_answer(probability: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="freedom >= 1"):
        t_quantile(probability, freedom)


def test_bound_worked_out_by_hand() -> None:
    # logs -0.02, 0.00, 0.02, 0.04: mean 0.01, standard deviation 0.0258199, its error 0.0129099, t(0.95, 3) = 2.35336
    found = summarise([math.exp(x) for x in (-0.02, 0.00, 0.02, 0.04)])
    assert found.pairs == 4
    assert found.mean == pytest.approx(math.exp(0.01))
    assert found.lower == pytest.approx(math.exp(0.01 - 2.35336 * 0.0129099), rel=1e-6)
    assert found.median == pytest.approx((1 + math.exp(0.02)) / 2)


def test_equal_ratios_leave_no_doubt_and_one_pair_allows_no_bound() -> None:
    assert summarise([0.9] * 5).lower == pytest.approx(0.9)
    alone = summarise([0.9])
    assert (alone.median, alone.lower) == (0.9, 0.0)
    assert alone.mean == pytest.approx(0.9)


# --- alternation ----------------------------------------------------------------------------------------------------


class Counting:
    """A side that takes `step_s` a step, slower by `drift` with everything that was run before it."""

    def __init__(self, name: str, log: list[tuple[str, int]], step_s: float, drift: float = 0.0) -> None:
        self.name, self.log, self.step_s, self.drift = name, log, step_s, drift

    def run(self, steps: int) -> Sample:
        self.log.append((self.name, steps))
        return Sample(steps * self.step_s * (1 + self.drift * len(self.log)), loss=4.0)


def test_order_turns_round() -> None:
    assert list(order(4)) == [(True, False), (False, True), (True, False), (False, True)]


def test_measure_warms_up_then_alternates_with_enough_steps() -> None:
    log: list[tuple[str, int]] = []
    heard: list[tuple[int, float, float]] = []
    ours, plain = Counting("ours", log, 0.2), Counting("plain", log, 0.1)
    found = measure(ours, plain, 3, 2, lambda *given: heard.append(given))
    assert [name for name, _ in log] == ["ours", "plain"] * 2 + ["ours", "plain", "plain", "ours", "ours", "plain"]
    assert [steps for _, steps in log] == [1] * 4 + [3] * 6  # 0.1 s a step: 3 steps make 0.3 s
    assert found.ratios == pytest.approx((0.5, 0.5, 0.5))
    assert [pair for pair, _, _ in heard] == [1, 2, 3]


def test_a_machine_that_slows_down_favours_neither() -> None:
    log: list[tuple[str, int]] = []
    found = measure(Counting("ours", log, 1.0, 0.01), Counting("plain", log, 1.0, 0.01), 20, 1)
    assert summarise(found.ratios).mean == pytest.approx(1.0, abs=1e-3)
    slower = Counting("plain", log, 1.02, 0.01)
    assert summarise(measure(Counting("ours", log, 1.0, 0.01), slower, 20, 1).ratios).mean == pytest.approx(1.02, 1e-3)


def test_losses_that_differ_are_seen() -> None:
    class Wrong(Counting):
        def run(self, steps: int) -> Sample:
            return Sample(super().run(steps).seconds, 4.4)

    assert measure(Counting("ours", [], 1.0), Wrong("plain", [], 1.0), 1, 1).loss_error == pytest.approx(0.4 / 4.4)
    assert relative_error(math.nan, 1.0) == math.inf


@pytest.mark.parametrize(("pairs", "warm_up"), [(0, 1), (1, 0)])
def test_measure_refuses_no_pairs_and_no_warm_up(pairs: int, warm_up: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        measure(Counting("ours", [], 1.0), Counting("plain", [], 1.0), pairs, warm_up)


def test_steps_per_sample() -> None:
    assert [steps_per_sample(s) for s in (0.1, 0.29, 0.3, 5.0)] == [3, 2, 1, 1]
    assert Pairs((2.0,), (1.0,), 1, 0.0).ratios == (0.5,)


def test_rounds_take_turns_and_are_compared_inside_a_round() -> None:
    log: list[tuple[str, int]] = []
    sides = {"a": Counting("a", log, 0.2), "b": Counting("b", log, 0.1), "c": Counting("c", log, 0.4)}
    heard: list[int] = []
    found = measure_rounds(sides, 2, 1, ("b",), lambda pair, times: heard.append(pair))
    assert [name for name, _ in log] == ["a", "b", "c", "a", "b", "c", "c", "b", "a"]
    assert [steps for _, steps in log] == [1] * 3 + [3] * 6
    assert found.ratios("a", "c") == pytest.approx((2.0, 2.0)) and found.ratios("a", "b") == pytest.approx((0.5, 0.5))
    assert (found.loss_error, heard) == (0.0, [1, 2])
    with pytest.raises(ValueError, match="at least 1"):
        measure_rounds(sides, 0, 1, ())


def test_rounds_compare_the_losses_they_are_told_to() -> None:
    class Wrong(Counting):
        def run(self, steps: int) -> Sample:
            return Sample(super().run(steps).seconds, 4.4)

    sides = {"a": Counting("a", [], 1.0), "b": Wrong("b", [], 1.0)}
    assert measure_rounds(sides, 1, 1, ("b",)).loss_error == pytest.approx(0.1)
    assert measure_rounds(sides, 1, 1, ()).loss_error == 0.0


# --- results --------------------------------------------------------------------------------------------------------


def test_rows_know_whether_they_are_met() -> None:
    assert Row("speed", 0.98, target=0.98).met is True
    assert Row("speed", 0.9799, target=0.98).met is False
    assert Row("memory", 1.01, target=1.0, at_least=False).met is False
    assert Row("speed", math.nan, target=0.98).met is False
    assert Row("memory", math.nan, target=1.0, at_least=False).met is False
    assert Row("told", 3.0).met is None


def test_table_and_file(tmp_path: Path) -> None:
    result = Result("name", "a against b", {}, [Row("told", 12345.6, "tokens/s"), Row("ratio", 0.5, target=0.98)])
    lines = table(result).splitlines()
    assert lines[0] == "name: a against b"
    ends = [line.index(cell) + len(cell) for line, cell in zip(lines[1:], ("value", "12,346", " 0.5"), strict=True)]
    assert len(set(ends)) == 1  # numbers stand under each other
    assert "NOT MET" in lines[3] and ">= 0.98" in lines[3]
    (path,) = write([result], "2026-01-01", tmp_path)
    document = json.loads(path.read_text())
    assert (document["stamp"], document["met"], document["rows"][1]["met"]) == ("2026-01-01", False, False)
    assert document["machine"]["torch"] and document["machine"]["cores"] >= 1
    assert list(tmp_path.iterdir()) == [path]


NUMBERS = [(0, "0"), (3.0, "3"), (1234.5, "1,234"), (0.123456, "0.1235"), (math.inf, "inf"), (math.nan, "nan")]


@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


# --- settings and command line --------------------------------------------------------------------------------------


def test_every_layout_trains_the_same_global_batch() -> None:
    configs = [Settings().config(8, **parallel) for parallel in ({}, {"tp": 2}, {"pp": 2}, {"dp": 2})]
    assert {tokens_per_step(config) for config in configs} == {8 * 1024}
    assert [config.world_size for config in configs] == [1, 2, 2, 2]
    assert [config.micro_batches for config in configs] == [8, 8, 8, 4]
    llama = Settings(family="llama").config(2).model
    assert (llama.norm, llama.activation, llama.position, llama.tie_embeddings) == ("rmsnorm", "swiglu", "rope", False)


def test_overrides_and_their_errors() -> None:
    assert Settings(overrides=("optim.sharding=none",)).config(2).optim.sharding == "none"
    with pytest.raises(ConfigError):
        Settings(overrides=("optim.sharding=zero9",)).config(2)
    with pytest.raises(ConfigError):
        Settings(hidden=65).config(2)


def test_options_reach_the_settings() -> None:
    given = ["--pairs", "3", "--hidden", "64", "--micro-batches", "4", "--only", "tp", "--only", "pp"]
    given += ["--set", "train.seed=1"]
    found = settings_of(parser().parse_args(given))
    assert found == Settings(pairs=3, hidden=64, micro_batches=4, only=("tp", "pp"), overrides=("train.seed=1",))
    assert settings_of(parser().parse_args([])) == Settings()


def test_unknown_benchmark_or_layout_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nope"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in NAMES)
    assert main(["layouts", "--only", "cp"]) == 2
    assert "tp, pp, dp" in capsys.readouterr().err


def test_the_command_line_leaves_torch_alone() -> None:
    modules = ", ".join(f"benchmarks.{name}" for name in NAMES.values())
    code = f"import sys, benchmarks.__main__, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- bubble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [("gpipe", 4, 1, 7), ("1f1b", 16, 1, 3), ("interleaved", 4, 3, 8)])
def test_bubble_of_a_few_cases(case: bubble.Case) -> None:
    assert bubble.simulated(case) == pytest.approx(bubble.formula(case), abs=1e-14)


def test_all_legal_cases_are_there() -> None:
    found = list(bubble.cases())
    assert len(found) == len(set(found))
    assert sum(case[0] == "1f1b" for case in found) == 16 * 64
    assert sum(case[0] == "interleaved" for case in found) == 3 * sum(64 // p for p in range(1, 17))


# --- processes ------------------------------------------------------------------------------------------------------

ECHO = "import sys, json\nfor line in sys.stdin: print(json.dumps({'got': json.loads(line)}), flush=True)"


def test_worker_answers_and_ends_with_its_input() -> None:
    worker = Worker("echo", ("-c", ECHO))
    assert worker.ask({"a": 1}) == {"got": {"a": 1}}
    worker.close()
    assert worker.process.returncode == 0


def test_worker_that_does_not_leave_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.processes.CLOSE_S", 0.05)
    worker = Worker("deaf", ("-c", "import time; print('{}', flush=True); time.sleep(600)"))
    worker.hear()
    worker.close()
    assert worker.process.returncode == -9


def test_worker_that_fails_says_so() -> None:
    for code, message in (("import sys; sys.exit(3)", "exit code 3"), ('print(\'{"error": "bad sum"}\')', "bad sum")):
        worker = Worker("broken", ("-c", code))
        with pytest.raises(WorkerError, match=message):
            worker.ask({})
        worker.close()


def test_a_team_whose_start_fails_leaves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    class Broken(Worker):
        def __init__(self, name: str, *rest: object, **more: object) -> None:
            super().__init__(name, ("-c", "raise SystemExit(5)" if name.endswith("1") else ECHO))
            started.append(self.process.pid)

    monkeypatch.setattr("benchmarks.processes.Worker", Broken)
    with pytest.raises(WorkerError):
        Team("ours", Settings().config(2, tp=2), 1)
    assert len(started) == 2
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's promise exists on Linux only")
def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    target = tmp_path / "target.py"
    target.write_text("import time; print('{}', flush=True); time.sleep(600)")
    code = (
        "import os, signal\n"
        "from benchmarks.processes import Worker\n"
        f"worker = Worker('orphan', ('-m', 'launch.rank.worker', {str(target)!r}))\n"
        "worker.hear()\n"
        "print(worker.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + PATIENCE_S
    while _runs(pid):
        assert time.monotonic() < deadline, f"process {pid} outlived its parent"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Not gone, and not a zombie that nobody has fetched."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
