"""Test runs that skip steps: what they save, how they end, and that all ranks decide alike. Faults are planted in
gradients, or the first update makes the weights useless."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_gpt.config.load import load
from dist_gpt.replica import Rank
from dist_gpt.rundir import committed, ended, step_of
from dist_gpt.skips import GRADIENTS, LOSS, SCALE, DivergedError
from dist_gpt.train.trainer import how_it_ended, main
from launch.run_files import go_on
from tests.ranks.resuming import config_of, same, train
from tests.ranks.runs import Place, rows

USELESS = ("optim.lr=1e30", "optim.warmup=0", "optim.decay=none", "train.dtype=fp32", "train.global_batch=2",
           "train.eval_every=0", "train.eval_batches=0", "checkpoint.every=1", "checkpoint.keep=1")  # fmt: skip
LAYOUTS: list[dict[str, Any]] = [{"dp": 1}, {"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("skipping"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "DIST_GPT_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)


def saved(run_dir: Path) -> list[int]:
    return sorted(step_of(path) for path in committed(run_dir / "checkpoints"))


def at(steps: set[int], value: float = math.nan, on: int | None = None) -> Callable[[Rank, int], None]:
    """Spoil one gradient in these steps, on all ranks or on one."""

    def spoil(rank: Rank, step: int) -> None:
        if step in steps and on in (None, rank.mesh.rank):
            rank.buffers.buckets[0].gradient_shard[0] = value

    return spoil


def config(cache: Path, every: int = 1, keep: int = 9, **sections: dict[str, Any]) -> Any:
    return config_of(cache, checkpoint={"every": every, "keep": keep}, **sections)


def test_the_last_good_checkpoint_is_kept_and_resumed_from(place: Place, tmp_path: Path) -> None:
    """The first update makes the weights useless: nothing is saved any more, though one is due after every step."""
    settings = load(str(place.config), [*USELESS, f"run_dir={tmp_path}", "train.steps=6"])
    assert main(settings) == 1
    end = ended(tmp_path)
    assert (end["code"], end["step"]) == (1, 6)
    assert end["why"].startswith("5 of 6 steps skipped (loss not finite). Lower optim.lr")
    assert saved(tmp_path) == [1] and [row.get("skipped", False) for row in rows(tmp_path / "metrics.jsonl")] == [
        False, *[True] * 5]  # fmt: skip
    before = (tmp_path / "checkpoints" / "step_00000001" / "manifest.json").read_bytes()
    assert main(settings, "auto") == 1  # it skips from its first step
    assert ended(tmp_path)["why"].startswith("5 of 6 steps skipped (loss not finite)") and saved(tmp_path) == [1]
    assert (tmp_path / "checkpoints" / "step_00000001" / "manifest.json").read_bytes() == before


def test_a_run_that_gave_up_says_what_to_change(place: Place, tmp_path: Path) -> None:
    settings = load(str(place.config), [*USELESS, f"run_dir={tmp_path}", "train.steps=50", "train.max_skipped=3"])
    with pytest.raises(DivergedError, match="3 steps in a row, up to step 4.*3 of 4 steps skipped"):
        main(settings)
    said = go_on(tmp_path, "local")
    assert "the last good checkpoint is step_00000001; continuing unchanged would end the same way" in said
    assert "Lower optim.lr" in said and "--resume" not in said and f"run_dir={tmp_path}-2" in said
    (tmp_path / "exit.json").write_text(json.dumps({"code": 1, "why": "killed"}))
    assert "--resume auto" in go_on(tmp_path, "local")


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_save_that_falls_due_on_a_skipped_step_is_made_up(dtype: str, value: float, tmp_path: Path) -> None:
    settings = config(tmp_path, 3, train={"dtype": dtype})
    [part] = train(settings, tmp_path / "run", spoil=at({3, 4}, value))
    assert saved(tmp_path / "run") == [5, 6] and part.skips.so_far.causes == {GRADIENTS: 2}
    assert how_it_ended(part.finished, part.skips, None) is None


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_all_ranks_decide_alike(parallel: dict[str, Any], tmp_path: Path) -> None:
    """Spoil the gradients of one rank only: all ranks see it in the norm, a sum over all of them."""
    settings = config(tmp_path, 2, parallel={"dp": 1, **parallel}, train={"dtype": "fp64"})
    found = train(settings, tmp_path / "run", spoil=at({2, 5, 6}, on=0))
    assert saved(tmp_path / "run") == [3, 4]
    assert {(p.finished, p.skips.so_far.text(), str(how_it_ended(True, p.skips, None))[:21]) for p in found} == {
        (True, "3 of 6 steps skipped (gradients not finite)", "3 of 6 steps skipped ")}  # fmt: skip
    assert all(part.accounting == [] for part in found)
    good = train(settings, tmp_path / "run", resume="auto", spoil=at(set()))
    assert saved(tmp_path / "run")[-1] == 6 and all(how_it_ended(True, p.skips, None) is None for p in good)


def test_a_resumed_run_is_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    settings = config(tmp_path, 2)
    whole = train(settings, tmp_path / "whole", spoil=at({2}))
    train(settings, tmp_path / "run", stop=(0, 4), spoil=at({2}))
    resumed = train(settings, tmp_path / "run", resume="auto")
    assert same(whole, resumed) and resumed[0].skips.so_far == whole[0].skips.so_far


@pytest.mark.parametrize(("bad", "kept", "step", "failed"), [
    ({3}, [4], 4, False),  # the next step is good again: saved there
    ({3, 4}, [], 4, True),
    ({2, 3, 4}, [], 3, True),
])  # fmt: skip
def test_asked_to_stop_while_it_skips(bad: set[int], kept: list[int], step: int, failed: bool, tmp_path: Path) -> None:
    settings = config(tmp_path, 0, train={"eval_every": 0})
    [part] = train(settings, tmp_path / "run", stop=(0, 3), spoil=at(bad))
    assert (part.finished, part.step, saved(tmp_path / "run")) == (False, step, kept)
    error = how_it_ended(part.finished, part.skips, "SIGTERM received")
    assert (error is not None) == failed
    assert error is None or f"asked to stop after step {step}, but not saved (SIGTERM received)" in str(error)


@pytest.mark.parametrize(("bad", "kept", "failed"), [
    ({2}, [1, 2, 3, 4, 5, 6], None),  # ordinary: the scale comes down
    ({5, 6}, [1, 2, 3, 4, 5, 6], None),
    ({1, 2, 3, 4, 5, 6}, [1, 2, 3, 4, 5, 6], "6 of 6 steps skipped (fp16 overflow"),
])  # fmt: skip
def test_overflow_in_fp16(bad: set[int], kept: list[int], failed: str | None, tmp_path: Path) -> None:
    settings = config(tmp_path, train={"dtype": "fp16", "loss_scale": 1024.0})
    [part] = train(settings, tmp_path / "run", spoil=at(bad, math.inf))
    assert saved(tmp_path / "run") == kept and part.skips.so_far.causes == {SCALE: len(bad)}
    error = how_it_ended(part.finished, part.skips, None)
    assert (error is None) if failed is None else str(error).startswith(failed)


def test_overflow_at_the_smallest_scale_is_of_the_gradients(tmp_path: Path) -> None:
    settings = config(tmp_path, train={"dtype": "fp16", "loss_scale": 2.0})
    [part] = train(settings, tmp_path / "run", spoil=at({5, 6}, math.inf))
    assert saved(tmp_path / "run") == [1, 2, 3, 4]
    assert "2 of 6 steps skipped (gradients not finite)" in str(how_it_ended(True, part.skips, None))


def test_a_validation_loss_that_is_not_finite(place: Place, tmp_path: Path) -> None:
    """The only update makes the weights useless, and no later step could show it."""
    sets = [*USELESS, f"run_dir={tmp_path}", "train.steps=1", "train.eval_batches=1"]
    assert main(load(str(place.config), sets)) == 1
    assert "the validation loss after step 1 is not finite" in ended(tmp_path)["why"] and saved(tmp_path) == []


def test_a_loss_that_is_not_finite_is_named(place: Place, tmp_path: Path) -> None:
    settings = load(str(place.config), [*USELESS, f"run_dir={tmp_path}", "train.steps=3", "checkpoint.every=0"])
    assert main(settings) == 1
    assert LOSS in ended(tmp_path)["why"] and not (tmp_path / "checkpoints").exists()
