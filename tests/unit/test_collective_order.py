"""Every member of a group declares the same collectives, of the same size, in the same order: else a group hangs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_gpt import params
from dist_gpt.config.load import load
from dist_gpt.config.schema import DTYPE_BYTES, Config
from dist_gpt.params import parameter_table
from dist_gpt.plan import steps
from dist_gpt.plan.steps import RankPlan, layout_of
from tests.ranks.cells import ALL, TABLES, Cell, make_cell

AXES = ("tp", "data", "shard", "replica", "embed", "world")

WIDE_MODEL = {
    **{"num_layers": 2, "seq_len": 12, "vocab_size": 257, "tie_embeddings": False, "dropout": 0.0},
    **{"attention_dropout": 0.0, "norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True},
}
FORMS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2, dp2": {"tp": 2, "dp": 2},
    "tp2, pp2": {"tp": 2, "pp": 2},
    "tp2, pp2, zero layers first": {"tp": 2, "pp": 2, "layers": [0, 2]},
    "tp3": {"tp": 3},
    "tp3, pp2": {"tp": 3, "pp": 2},
}


def awkward(form: dict[str, Any]) -> dict[str, Any]:
    """A configuration of `form` with pieces of 129 and 128 (or 86 and 85) vocabulary rows, in fp32."""
    heads, hidden = (4, 128) if form["tp"] == 2 else (6, 132)
    return {
        "model": {**WIDE_MODEL, "num_heads": heads, "hidden_size": hidden},
        "parallel": {"sequence_parallel": True, "dp": 1, **form},
        "train": {"steps": 1, "global_batch": 2 * form.get("dp", 1), "micro_batch": 1, "dtype": "fp32"},
        "data": {"source": "synthetic"},
    }


@dataclass(frozen=True)
class Difference:
    """The first place where two members of a group disagree."""

    axis: str
    ranks: tuple[int, int]
    index: int


def sequences(plan: RankPlan) -> dict[str, list[tuple[str, str, int]]]:
    """By axis: (phase, op, payload) of every call that this rank issues, in order."""
    issued: dict[str, list[tuple[str, str, int]]] = {axis: [] for axis in AXES}
    declare = cache(plan.declare)
    calls = [("train", call) for step in plan.steps for call in declare(step).comm]
    calls += [("eval", call) for step in plan.eval_steps for call in declare(step).comm]
    calls += [("eval", call) for call in plan.eval_calls()]
    for phase, call in calls:
        if call.axis != "pp":  # messages of two: schedule.check proves their order
            issued[call.axis] += [(phase, call.op, call.payload)] * call.calls
    return issued


def differences(config: Config) -> Iterator[Difference]:
    """Members of a group against its first one."""
    layout = layout_of(config)
    issued = [sequences(RankPlan(config, rank)) for rank in range(layout.world)]
    for rank in range(layout.world):
        for axis in AXES:
            first = layout.group(axis, rank)[0]
            one, other = issued[first][axis], issued[rank][axis]
            if one != other:
                pairs = list(zip(one, other, strict=False))
                yield Difference(axis, (first, rank), next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)))


def loaded(folder: Path, document: dict[str, Any], world: int) -> Config:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(document))))
    return load(str(path), world=world)


def sizes_between(config: Config) -> list[float]:
    """Values of bucket_mb, each between what the widest and what the narrowest tensor rank hold of a run of blocks."""
    tp = config.parallel.tp
    table = parameter_table(config)
    blocks = range(config.model.num_layers + 2)
    found = set()
    for first in blocks:
        for last in blocks[first:]:
            rows = [p for p in table if first <= p.block <= last]
            wide, narrow = (
                sum(params.prod(p.local_shape(tp, index)) for p in rows) * DTYPE_BYTES[config.train.dtype] / 1e6
                for index in (0, tp - 1)
            )
            if wide > narrow:
                found.add((wide + narrow) / 2)
    return sorted(found)


def cut_by_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug: every tensor rank ends a bucket when its own piece has reached the limit."""
    make, shape = steps.make_buckets, params.Param.local_shape

    def wrong(config: Config, chunks: Any, tp_index: int) -> Any:
        with monkeypatch.context() as inside:
            inside.setattr(params.Param, "local_shape", lambda self, tp, _: shape(self, tp, tp_index))
            return make(config, chunks, tp_index)

    monkeypatch.setattr(steps, "make_buckets", wrong)


@pytest.mark.parametrize("cells", TABLES)
def test_members_of_a_group_agree_in_every_cell(cells: list[Cell], tmp_path: Path) -> None:
    found = {cell.name: list(differences(loaded(tmp_path, cell.config, cell.world))) for cell in cells}
    assert {name: some for name, some in found.items() if some} == {}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_members_of_a_group_agree_on_awkward_buckets(tmp_path: Path, form: dict[str, Any]) -> None:
    world = form["tp"] * form.get("dp", 1) * form.get("pp", 1)
    config = loaded(tmp_path, awkward(form), world)
    sizes = sizes_between(config)
    assert len(sizes) >= 5
    for size in [*sizes, 0.0668, 0.001, 25.0]:
        optim = config.optim.model_copy(update={"bucket_mb": size})
        assert list(differences(config.model_copy(update={"optim": optim}))) == [], f"bucket_mb {size}"


def test_0_0668_is_between_the_head_of_one_tensor_rank_and_of_the_other(tmp_path: Path) -> None:
    """(129 or 128 rows of the head + the norm's 2) x 128 x 4 bytes: the value with which a run once hung."""
    assert (128 + 2) * 128 * 4 < 0.0668e6 < (129 + 2) * 128 * 4
    config = loaded(tmp_path, awkward({"tp": 2}), 2)
    assert any(abs(size - 0.0668) < 3e-4 for size in sizes_between(config))


@pytest.mark.parametrize("form", ["tp2", "tp3, pp2"])
def test_buckets_cut_by_a_ranks_own_size_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    world = FORMS[form]["tp"] * FORMS[form].get("pp", 1)
    config = loaded(tmp_path, awkward(FORMS[form]), world)
    optim = config.optim.model_copy(update={"bucket_mb": sizes_between(config)[0]})
    config = config.model_copy(update={"optim": optim})
    assert list(differences(config)) == []
    cut_by_own_size(monkeypatch)
    assert {difference.axis for difference in differences(config)} == {"tp"}


def between_cells() -> list[Cell]:
    return [cell for cell in ALL if ("buckets", "between") in cell.tags]


def test_parity_cells_would_hang_if_buckets_were_cut_by_a_ranks_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert between_cells()
    cut_by_own_size(monkeypatch)
    for cell in between_cells():
        assert any(d.axis == "tp" for d in differences(loaded(tmp_path, cell.config, cell.world))), cell.name


def test_between_needs_pieces_of_different_sizes() -> None:
    options = dict(between_cells()[0].tags)
    assert make_cell(options) is not None
    assert make_cell({**options, "vocab": 40}) is None
    assert make_cell({**options, "tied": True}) is None
