"""Every planted bug turns its cell red, in the measure and at the place where the bug is; without it the cell is green.

What a bug must not touch is asserted as well: a certificate that turned everything red would prove nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

import tests.ranks.plants_sharding  # noqa: F401  its plants are listed
from dist_gpt.verify import MEASURES, TOLERANCE
from tests.ranks.cells import SPLIT_2, Cell, make_cell
from tests.ranks.plants import PLANTS
from tests.ranks.pool import Pool

BASE: dict[str, Any] = {
    **{"dp": 1, "tp": 1, "pp": 1, "sequence_parallel": False, "schedule": "1f1b", "virtual_stages": 1},
    **{
        "family": "gpt2",
        "heads": "full",
        "tied": True,
        "sharding": "zero1",
        "recompute": "none",
        "layers": "uneven",
        "vocab": 37,
    },
    **{"micro_batches": 2, "micro_batch": 1, "optimizer": "sgd", "clip": 0.01, "dropout": 0.0, "rate": "constant"},
    **{"buckets": "several", "weight_decay": 0.1},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2, "micro_batch": 2},
    "dp2_whole": {"dp": 2, "micro_batch": 2, "sharding": "none"},
    "dp2_adamw": {"dp": 2, "micro_batch": 2, "optimizer": "adamw"},
    "dp2_dropout": {"dp": 2, "micro_batch": 2, "dropout": 0.1},
    "tp2": {"tp": 2},
    "tp2_split": {"tp": 2, "sequence_parallel": True},
    "tp2_split_dropout": {"tp": 2, "sequence_parallel": True, "family": "llama", "dropout": 0.1},
    "pp2": {"pp": 2, "micro_batch": 2},
    "pp2_interleaved": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2},
    "pp2_split_backward": {"pp": 2, "micro_batches": 4},
    "dp2_zero2": {"dp": 2, "sharding": "zero2", "micro_batches": 3},
    "dp2_zero3": {"dp": 2, "sharding": "zero3"},
    "full_dropout": {"recompute": "full", "dropout": 0.1},
    "selective": {"recompute": "selective"},
    "dp4_nodes": {"dp": 4, "nodes": 2},
}
GRIDS = {"pp2_split_backward": SPLIT_2}
"""Orders that replace the schedule's."""


def cell_of(layout: str) -> Cell:
    """Two layers, or one per chunk, so that a certificate takes a second."""
    cell = make_cell(BASE | LAYOUTS[layout])
    assert cell is not None
    parallel = cell.config["parallel"]
    model = {**cell.config["model"], "num_layers": max(2, parallel["pp"] * parallel["virtual_stages"])}
    return Cell(layout, cell.world, {**cell.config, "model": model}, cell.tags)


@dataclass(frozen=True)
class Case:
    """`red`: measures above the tolerance, with a part of the place named; `green`: measures that stay below it.
    `differs`: parts of one accounting difference; empty means that the accounting is exact."""

    plant: str
    layout: str
    red: dict[str, str] = field(default_factory=dict)
    green: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()


CASES = (
    Case("partial_gradients_called_replicated", "tp2_split", {"gradient": "", "gradient_norm": ""}),
    Case("norm_counts_replicated_on_every_tensor_rank", "tp2", {"gradient_norm": "", "weight": ""}),
    Case("norm_counts_tied_embedding_twice", "pp2", {"gradient_norm": "", "weight": ""}),
    Case("norm_counts_every_data_rank", "dp2_whole", {"gradient_norm": "", "weight": ""}),
    Case("clipped_by_the_local_norm", "dp2", {"weight": ""}),
    Case(
        "tied_gradients_not_summed", "pp2", {"gradient": "embed.weight"}, (), ("update STEP", "fewer embed all_reduce")
    ),
    Case("gradients_averaged_over_data", "dp2", {"gradient": "", "gradient_norm": ""}),
    Case("reduce_scatter_without_the_sum", "dp2", {"gradient": "", "gradient_norm": ""}),
    Case("bucket_not_reduced", "dp2", {"gradient": ""}, (), ("reduce 0REDUCE bucket 0", "fewer data reduce_scatter")),
    Case("micro_batches_swapped", "pp2", {"loss": "", "gradient": ""}),
    Case("loss_scaled_per_data_rank", "dp2", {"loss": "", "gradient": "", "gradient_norm": ""}),
    Case("loss_counted_on_every_tensor_rank", "tp2", {"loss": ""}, ("gradient", "gradient_norm", "weight")),
    Case(
        "validation_loss_not_summed",
        "dp2",
        {"loss": "validation"},
        ("gradient", "gradient_norm", "weight"),
        ("1 fewer world all_reduce of 8 bytes",),
    ),
    Case(
        "validation_samples_of_the_first_data_rank",
        "dp2",
        {"loss": "validation"},
        ("gradient", "gradient_norm", "weight"),
    ),
    Case("vocabulary_range_off_by_one", "tp2", {"loss": "", "gradient": ""}),
    Case("forward_all_reduce_left_out", "tp2", {"loss": ""}, (), ("forward 0F0 block 1", "1 fewer tp all_reduce")),
    Case("collective_too_many", "dp2", {}, MEASURES, ("reduce 0REDUCE bucket 0", "1 more data all_reduce of 8 bytes")),
    Case("gradient_of_another_chunk", "pp2_interleaved", {"gradient": "", "gradient_norm": ""}),
    Case(
        "weight_job_dropped",
        "pp2_split_backward",
        {"gradient": "", "gradient_norm": ""},
        (),
        ("model_flops: dry run",),
    ),
    Case("weight_job_of_another_micro_batch", "pp2_split_backward", {"gradient": "", "gradient_norm": ""}),
    Case("bias_gradient_forgotten", "tp2", {"gradient": ".bias"}, (), ("no gradient was written",)),
    Case("gradient_overwritten", "dp2", {"gradient": "", "gradient_norm": ""}),
    Case("row_bias_on_every_tensor_rank", "tp2", {"loss": "step 1"}),
    Case("bucket_left_stale", "dp2", {"loss": ""}),
    Case("norms_decay", "dp2_adamw", {"weight": "norm"}),
    Case("weights_drawn_per_rank", "tp2", {"loss": "", "weight": ""}),
    Case("dropout_keyed_per_rank", "dp2_dropout", {"loss": "", "gradient": ""}),
    Case("dropout_repeats_on_token_shards", "tp2_split_dropout", {"loss": "", "gradient": ""}),
    Case("positions_repeat_on_token_shards", "tp2_split", {"loss": "", "gradient": ""}),
    Case("qkv_cut_as_one", "tp2", {"loss": "", "gradient": ""}),
    Case("plan_forgets_the_head", "tp2", {}, MEASURES, ("model_flops: dry run",)),
    Case("plan_forgets_an_activation", "tp2", {}, MEASURES, ("memory_bytes: dry run",)),
    Case("shard_overwritten_by_the_next_micro_batch", "dp2_zero2", {"gradient": "", "gradient_norm": ""}),
    Case("gradients_written_while_they_are_reduced", "dp2_zero2", {"gradient": "embed.weight"}),
    Case("another_rank_s_shard_gathered", "dp2_zero3", {"loss": ""}),
    Case("gather_not_waited_for", "dp2_zero3", {"loss": "", "gradient": ""}),
    Case("recomputed_with_another_mask", "full_dropout", {"gradient": ""}),
    Case("recompute_stops_too_early", "full_dropout", {"gradient": ""}),
    Case("core_again_without_the_mask", "selective", {"gradient": "attn.out"}),
    Case(
        "nodes_not_summed",
        "dp4_nodes",
        {"gradient": "", "gradient_norm": ""},
        (),
        ("update STEP", "fewer replica all_reduce"),
    ),
    Case("norm_counts_every_node", "dp4_nodes", {"gradient_norm": "", "weight": ""}),
    Case("plan_forgets_the_gathers", "dp2_zero3", {}, MEASURES, ("gather 0F0 bucket", "1 more data all_gather")),
    Case("plan_forgets_what_is_computed_again", "selective", {}, MEASURES, ("recompute_flops: dry run",)),
)


def test_every_plant_has_a_case() -> None:
    assert sorted(PLANTS) == sorted(case.plant for case in CASES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cell_is_green_without_a_plant(pool: Pool, layout: str) -> None:
    cell = cell_of(layout)
    result = pool.certify(cell.config, cell.world, grid=GRIDS.get(layout))
    assert (result["verdict"], result["accounting"]) == ("pass", "exact"), result["differences"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.plant)
def test_plant_turns_its_cell_red(pool: Pool, case: Case) -> None:
    cell = cell_of(case.layout)
    result = pool.certify(cell.config, cell.world, plant=case.plant, grid=GRIDS.get(case.layout))
    assert result["plant_hits"] > 0, "the product never called what the plant replaced"
    assert result["verdict"] == "fail"
    seen = {measure: (result["worst"][measure], result["where"][measure]) for measure in MEASURES}
    for measure, where in case.red.items():
        assert seen[measure][0] > 1e3 * TOLERANCE, seen  # a bug, not rounding
        assert where in seen[measure][1], seen
    for measure in case.green:
        assert seen[measure][0] <= TOLERANCE, seen
    assert result["accounting"] == ("differs" if case.differs else "exact"), result["differences"]
    if case.differs:
        assert any(all(part in line for part in case.differs) for line in result["differences"]), result["differences"]
