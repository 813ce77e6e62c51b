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
    """One set of processes for each side, which builds one model after the other."""

    def __init__(self) -> None:
        self.teams: dict[str, Team] = {}

    def team(self, name: str, case: Case) -> Team:
        """Return the side's team with the model of a contender that is called `name`."""
        contender = named(case, name)
        choice = contender.choices[0]
        config = case.config(Settings(), choice.bucket_mb)
        if contender.side in self.teams:
            self.teams[contender.side].build(config, choice.options)
        else:
            self.teams[contender.side] = Team(contender.side, config, 1, options=choice.options)
        return self.teams[contender.side]


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where torch would keep what DeepSpeed compiles."""
    folder = tmp_path_factory.mktemp("extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tried(extensions: Path) -> Iterator[Tried]:
    found = Tried()
    yield found
    for team in found.teams.values():
        team.close()


@pytest.fixture(scope="module")
def first_losses(tried: Tried) -> list[float]:
    return losses(tried.team("ours", Case(TINY, RANKS, "none")))


def losses(team: Team) -> list[float]:
    return [team.run(1).loss for _ in range(STEPS)]


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, stages in CASES.items() for stage in stages])
def test_all_train_alike_and_send_what_their_stage_costs(
    name: str, stage: str, tried: Tried, first_losses: list[float]
) -> None:
    team = tried.team(name, Case(TINY, RANKS, stage))
    assert losses(team) == pytest.approx(first_losses, abs=1e-5)
    assert len(set(first_losses)) == STEPS
    sent = max(sum(found.values()) for found in team.sent_bytes())
    psi = 4 * sum(bucket.numel for bucket in RankPlan(Case(TINY, RANKS, stage).config(Settings()), 0).buckets)
    if (times := CASES[name][stage]) is not None:
        assert sent == pytest.approx(times * EACH * psi, rel=3e-3)  # beside it norms; a position has no second gather


def test_deepspeed_compiles_nothing(tried: Tried, extensions: Path) -> None:
    """A first use would take minutes, and one that is killed meanwhile leaves a lock for which the next ones wait."""
    assert tried.team("DeepSpeed", Case(TINY, RANKS, "zero1")).run(1).loss > 0
    assert list(extensions.iterdir()) == []


def test_peak_memory_is_that_of_the_steps_alone(tried: Tried) -> None:
    """The weights of a larger model, once more in gradients and twice in averages, stand in it."""
    wide = Case(Size("wide", "wide", 256, 2, 4, 16, 8192, 1), RANKS, "none").config(Settings())
    psi = 4 * sum(bucket.numel for bucket in RankPlan(wide, 0).buckets)
    small = max(tried.team("ours", Case(TINY, RANKS, "none")).step_memory(1))
    team = tried.teams["ours"]
    team.build(wide, {})
    team.run(1)
    assert max(team.step_memory(1)) - small > 3 * psi


def test_weights_that_are_sharded_and_products_that_are_large(tried: Tried) -> None:
    """DeepSpeed shares out what has more than 1e5 elements, and only large products are not torch's own."""
    case = Case(Size("wider", "wider", 256, 1, 4, 64, 512, 1), RANKS, "zero3")
    ours = losses(tried.team(OURS, case))
    assert len(set(ours)) == STEPS
    for name in ("DeepSpeed", "fully_shard"):
        assert losses(tried.team(name, case)) == pytest.approx(ours, abs=1e-5), name


def test_one_process_of_ours_trains_as_the_plain_gpt_does() -> None:
    """What `one-process` compares."""
    config = Case(TINY, 1, "none").config(Settings())
    found = []
    for side in ("ours", "plain"):
        team = Team(side, config, 1)
        try:
            found.append(losses(team))
        finally:
            team.close()
    assert found[0] == pytest.approx(found[1], abs=1e-5) and len(set(found[0])) == STEPS
