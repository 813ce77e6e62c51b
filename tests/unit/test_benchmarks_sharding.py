"""What `sharding` compares and how it judges. No torch, nothing is timed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.contenders import OURS, SHARE, SIZES, STAGES, Case, cases, contenders
from benchmarks.pairs import Rounds
from benchmarks.result import Result, Row, table
from benchmarks.settings import Settings
from benchmarks.sharding import (
    FASTER,
    HALF,
    HEAD,
    NEVER_SLOWER,
    Measured,
    above_ideal,
    grid,
    judge,
    keep,
    loopback_bytes,
    share_of,
)  # fmt: skip

CASE = Case(SIZES["communication"], 2, "zero3")


def test_every_stage_size_and_number_of_ranks_is_there_once() -> None:
    found = cases(())
    assert len(found) == len(set(found)) == len(SIZES) * len(STAGES) * 2
    assert {case.stage for case in found} == set(STAGES) and {case.ranks for case in found} == {2, 4}


def test_only_chooses_of_each_sort_what_it_names() -> None:
    assert cases(("4", "zero2", "compute")) == [Case(SIZES["compute"], 4, "zero2")]
    assert {case.label for case in cases(("zero3", "2"))} == {
        "compute, 2 ranks, zero3",
        "communication, 2 ranks, zero3",
    }
    with pytest.raises(ValueError, match="zero9: expected some of compute, communication, 2, 4, none"):
        cases(("zero9",))
    assert main(["sharding", "--only", "zero9"]) == 2


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_contenders_do_the_same_work_at_the_same_stage(stage: str, ranks: int) -> None:
    case = Case(SIZES["compute"], ranks, stage)
    config = case.config(Settings(), 16.0)
    assert (config.parallel.dp, config.world_size, config.micro_batches) == (ranks, ranks, 2)
    assert config.optim.bucket_mb == 16.0 and config.optim.clip > 0 and config.train.dtype == "fp32"
    sharding = {"zero3-step": ("zero3", "step"), "zero3": ("zero3", "pass")}.get(stage, (stage, "pass"))
    assert (config.optim.sharding, config.optim.reshard) == sharding
    field = {contender.name: contender for contender in contenders(case)}
    assert next(iter(field)) == OURS
    number = int(sharding[0][-1]) if stage != "none" else 0
    for choice in field["DeepSpeed"].choices:
        assert choice.options["stage"] == number and not choice.options["true_reduce_scatter"]
    assert ("DeepSpeed + rs" in field) == (number > 0)
    assert ("fully_shard" in field) == ("fully_shard + rs" in field) == (number == 3)
    for name in set(field) - {OURS, SHARE}:
        assert {choice.options["true_reduce_scatter"] for choice in field[name].choices} == {name.endswith("+ rs")}
        assert all(choice.options.get("kept", stage == "zero3-step") == (stage == "zero3-step")
                   for choice in field[name].choices)  # fmt: skip
    assert field[SHARE].choices[0].options["part"] == (1 / ranks if number else 1.0)
    tuned = {name for name, contender in field.items() if len({choice.name for choice in contender.choices}) == 3}
    untuned = {SHARE} | ({OURS} if number == 3 else set()) | ({"DeepSpeed"} if number == 0 else set())
    assert tuned == set(field) - untuned


def rounds(ours: float, peer: float, ideal: float) -> Rounds:
    return Rounds({OURS: (ours,) * 4, SHARE: (ideal,) * 4, "DeepSpeed": (peer,) * 4, "slow": (9.0,) * 4}, 1, 1e-6)


def measured(found: Rounds, ours_bytes: int = 90) -> dict[str, Measured]:
    sizes = {OURS: ours_bytes, SHARE: 50, "DeepSpeed": 120, "slow": 100}
    return {name: Measured("4 MB", seconds[0], 0.8, sizes[name], 5e6, 6e6) for name, seconds in found.seconds.items()}


def verdict(found: Rounds, ours_bytes: int = 90) -> dict[str, Row]:
    return {row.what.partition(": ")[2]: row for row in judge(CASE, found, measured(found, ours_bytes))}


def test_bound_by_compute_ours_must_not_be_slower() -> None:
    rows = verdict(rounds(1.1, 1.3, 1.0))  # the best peer's share above the ideal is 0.23
    speed = rows["speed over DeepSpeed"]
    assert (speed.target, speed.met) == (NEVER_SLOWER, True) and speed.value == pytest.approx(1.3 / 1.1)
    overhead = rows["time above the ideal over DeepSpeed's"]
    assert overhead.value == pytest.approx(0.1 / 0.3) and (overhead.target, overhead.met) == (HALF, True)
    assert verdict(rounds(1.31, 1.3, 1.0))["speed over DeepSpeed"].met is False
    assert verdict(rounds(1.2, 1.3, 1.0))["time above the ideal over DeepSpeed's"].met is False


def test_bound_by_communication_ours_must_take_three_quarters_of_the_time() -> None:
    rows = verdict(rounds(1.5, 1.9, 1.0))  # 0.47 above the ideal
    assert rows["speed over DeepSpeed"].target == FASTER == pytest.approx(4 / 3)
    assert rows["speed over DeepSpeed"].met is False
    assert verdict(rounds(1.4, 1.9, 1.0))["speed over DeepSpeed"].met is True


def test_memory_is_held_against_the_leanest_and_losses_must_agree() -> None:
    row = verdict(rounds(1.1, 1.3, 1.0))["peak memory over slow's"]
    assert row.value == pytest.approx(0.9) and row.met is True
    assert verdict(rounds(1.1, 1.3, 1.0), 101)["peak memory over slow's"].met is False
    assert verdict(rounds(1.1, 1.3, 1.0))["difference of the losses"].met is True
    apart = Rounds(rounds(1.1, 1.3, 1.0).seconds, 1, 1e-3)
    assert verdict(apart)["difference of the losses"].met is False


def test_time_above_the_ideal() -> None:
    assert above_ideal(rounds(1.2, 1.5, 1.0), "DeepSpeed") == pytest.approx(0.5)
    assert share_of(0.1, 0.4) == pytest.approx(0.25)
    assert share_of(-0.1, 0.4) == share_of(-0.1, -0.1) == 0.0
    assert share_of(0.1, -0.1) == math.inf


def test_grid_has_a_line_for_each_and_stands_in_the_table() -> None:
    found = rounds(1.2, 1.5, 1.0)
    lines = grid(CASE, found, measured(found))
    assert [line[1] for line in lines] == [OURS, SHARE, "DeepSpeed", "slow"]
    assert {len(line) for line in lines} == {len(HEAD)}
    assert lines[0][0] == CASE.label and lines[2][0] == ""
    assert lines[2][3:] == ("1500.0", "1.250", "1.250", "500.0 ms", "800", "0", "5.0")
    result = Result("sharding", "a against b", {}, grid=[("name", "value"), ("x", "12.5")], notes=["crowded"])
    assert table(result).splitlines()[1:4] == ["  name  value", "  x      12.5", "  crowded"]


def test_full_runs_are_kept_by_date(tmp_path: Path) -> None:
    path = keep(Result("sharding", "a against b", {}, grid=[("a",)], notes=["crowded"]), tmp_path)
    document = json.loads(path.read_text())
    assert path.name.startswith("sharding-20") and document["grid"] == [["a"]] and document["notes"] == ["crowded"]
    assert document["machine"]["torch"] and document["machine"]["cores"] >= 1


def test_loopback_counter(tmp_path: Path) -> None:
    path = tmp_path / "dev"
    path.write_text(
        "Inter-|   Receive                |  Transmit\n"
        " face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls\n"
        "  eth0: 1 1 1 1 1 1 1 1 2 2 2 2 2 2 2 2\n"
        "    lo: 700 7 0 0 0 0 0 0 900 9 0 0 0 0 0 0\n"
    )
    assert loopback_bytes(path) == 900
