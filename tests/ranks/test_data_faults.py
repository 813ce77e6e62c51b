"""Test, on ranks, data that change during a run and ids outside the vocabulary."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_gpt.comm.mesh import Backends
from dist_gpt.replica import Rank
from tests.ranks.resuming import config_of
from tests.ranks.runs import Place, finish, rows, wait_until
from tests.ranks.threads import on_gloo

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {}, "tp 2": {"tp": 2}, "tp 2 sequence parallel": {"tp": 2, "sequence_parallel": True},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("place", "said"), [(3, "the embedding's input"), (8, "the loss's targets")])
@pytest.mark.parametrize("value", [32, -1, 2**40])
def test_ids_outside_the_vocabulary_stop_every_layout(
    layout: str, place: int, said: str, value: int, tmp_path: Path
) -> None:
    """The last token of a window is a target only."""
    config = config_of(tmp_path, parallel=LAYOUTS[layout])
    ids = np.arange(4 * 9, dtype=np.int64).reshape(4, 9) % 32
    ids[:, place] = value

    def body(number: int, backends: Backends) -> str:
        rank = Rank(config, number, backends, torch.device("cpu"))
        rank.initialise()
        try:
            rank.train_step(0, lambda first, count: ids[first : first + count])
        except RuntimeError as error:
            return str(error)
        return "trained"

    for line in on_gloo(config.world_size, body):
        assert "token id outside the vocabulary (model.vocab_size 32)" in line and said in line


FAULTS = [
    pytest.param(change, layout, marks=[] if (change == "cut") == (layout in ("tp", "pp")) else pytest.mark.all_cells)
    for change in ("cut", "rewritten")
    for layout in ("alone", "tp", "dp", "pp")
]
"""Every layout and every change once; the other pairs in `make test-all`."""


@pytest.mark.parametrize(("change", "layout"), FAULTS)
def test_a_file_that_changes_under_a_run_ends_it_with_code_2(tmp_path: Path, change: str, layout: str) -> None:
    place = Place(tmp_path)
    sets: dict[str, Any] = {} if layout == "alone" else {f"parallel.{layout}": 2}
    ids = np.random.default_rng(0).integers(0, 256, 20_000).astype("<u2")
    source = tmp_path / "ids.bin"
    ids.tofile(source)
    endless = {"train.steps": 100_000, "train.eval_batches": 0, "train.eval_every": 0}
    options = {"data.source": source, "model.vocab_size": 256, **endless, **sets}
    process = place.start(place.argv("launch", "run", sets=options))
    try:
        wait_until(lambda: len(rows(tmp_path / "run" / "metrics.jsonl")) >= 2, process)
        if change == "cut":
            os.truncate(source, 64)
        else:
            with source.open("r+b") as file:
                file.write(ids[::-1].tobytes())
        out, err = finish(process)
    finally:
        process.kill()
    assert process.returncode == 2, err
    assert f"data.source: {source} changed while it was being read" in out + err
