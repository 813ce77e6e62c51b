"""The trainers that `python -m benchmarks sharding` compares do the same work, and their traffic is what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.contenders import MICRO_BATCHES, OURS, Case, Contender, Size, contenders
from benchmarks.processes import Team
from benchmarks.settings import Settings
from dist_gpt.plan.steps import RankPlan

TINY = Size("tiny", "tiny", 128, 2, 4, 16, 256, 1)
STEPS, RANKS, M = 3, 2, MICRO_BATCHES
EACH = (RANKS - 1) / RANKS

# Times Psi (n-1)/n. DeepSpeed keeps what has at most 1e5 elements whole in stage 3, here most of it: not compared.
CASES = {
    "ours": {"none": 2, "zero1": 2, "zero2": M + 1, "zero3": 3 * M, "zero3-step": M + 1},
    "DeepSpeed": {"none": 2, "zero1": 2 + 1, "zero2": 2 * M + 1, "zero3": None},
    "DeepSpeed + rs": {"zero1": 2, "zero2": M + 1, "zero3": None},
    "fully_shard": {"zero3-step": 2 * M + 1},
    "fully_shard + rs": {"zero3-step": M + 1},
}


def named(case: Case, name: str) -> Contender:
    return next(contender for contender in contenders(case) if contender.name == name)


class Tried:
    """One set of processes for each name, which builds one model after the other; and what came of it."""

    def __init__(self) -> None:
        self.teams: dict[str, Team] = {}
        self.losses: dict[tuple[str, str], list[float]] = {}

    def team(self, name: str, stage: str) -> Team:
        case = Case(TINY, RANKS, stage)
        contender = named(case, name)
        choice = contender.choices[0]
        config = case.config(Settings(), choice.bucket_mb)
        if name in self.teams:
            self.teams[name].build(config, choice.options)
        else:
            self.teams[name] = Team(contender.side, config, 1, options=choice.options)
        return self.teams[name]


@pytest.fixture(scope="module")
def tried() -> Iterator[Tried]:
    found = Tried()
    yield found
    for team in found.teams.values():
        team.close()


@pytest.fixture(scope="module")
def first_losses(tried: Tried) -> list[float]:
    team = tried.team("ours", "none")
    return [team.run(1).loss for _ in range(STEPS)]


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, stages in CASES.items() for stage in stages])
def test_all_train_alike_and_send_what_their_stage_costs(
    name: str, stage: str, tried: Tried, first_losses: list[float]
) -> None:
    team = tried.team(name, stage)
    assert [team.run(1).loss for _ in range(STEPS)] == pytest.approx(first_losses, abs=1e-5)
    assert len(set(first_losses)) == STEPS
    sent = max(sum(found.values()) for found in team.sent_bytes())
    psi = 4 * sum(bucket.numel for bucket in RankPlan(Case(TINY, RANKS, stage).config(Settings()), 0).buckets)
    if (times := CASES[name][stage]) is not None:
        assert sent == pytest.approx(times * EACH * psi, rel=3e-3)  # beside it norms; a position has no second gather


def test_deepspeed_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first use would take minutes, and one that is killed meanwhile leaves a lock for which the next ones wait."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    case = Case(TINY, 1, "zero1")
    contender = named(case, "DeepSpeed")
    team = Team(contender.side, case.config(Settings()), 1, options=contender.choices[0].options)
    try:
        assert team.run(1).loss > 0
    finally:
        team.close()
    assert list(tmp_path.iterdir()) == []


def test_peak_memory_is_that_of_the_steps_alone(tried: Tried) -> None:
    """The weights of a larger model, once more in gradients and twice in averages, stand in it."""
    wide = Case(Size("wide", "wide", 256, 2, 4, 16, 8192, 1), RANKS, "none").config(Settings())
    psi = 4 * sum(bucket.numel for bucket in RankPlan(wide, 0).buckets)
    small = max(tried.team("ours", "none").step_memory(1))
    team = tried.teams["ours"]
    team.build(wide, {})
    team.run(1)
    assert max(team.step_memory(1)) - small > 3 * psi


def test_weights_that_are_sharded_and_products_that_are_large() -> None:
    """DeepSpeed shares out what has more than 1e5 elements, and only large products are not torch's own."""
    case = Case(Size("wider", "wider", 256, 1, 4, 64, 512, 1), RANKS, "zero3")
    losses = {}
    for contender in contenders(case):
        if contender.name in (OURS, "DeepSpeed", "fully_shard"):
            choice = contender.choices[0]
            team = Team(contender.side, case.config(Settings(), choice.bucket_mb), 1, options=choice.options)
            try:
                losses[contender.name] = [team.run(1).loss for _ in range(STEPS)]
            finally:
                team.close()
    assert len(losses) == 3 and len(set(losses[OURS])) == STEPS
    assert all(found == pytest.approx(losses[OURS], abs=1e-5) for found in losses.values())


def test_one_process_of_ours_trains_as_the_plain_gpt_does() -> None:
    """What `one-process` compares."""
    config = Case(TINY, 1, "none").config(Settings())
    losses = []
    for side in ("ours", "plain"):
        team = Team(side, config, 1)
        try:
            losses.append([team.run(1).loss for _ in range(STEPS)])
        finally:
            team.close()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(set(losses[0])) == STEPS
