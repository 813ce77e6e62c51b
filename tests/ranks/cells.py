"""The parity cells as data: option lists, the rule that makes a configuration of them, and two selections.

    ALL        every layout, tensor, pipeline and schedule form of up to 8 ranks, the other options mixed in
    SHARDED    every stage of ZeRO with every pipeline, recomputation and number of micro-batches
    COVERING   the part of ALL that `make test` runs: every pair of option values that occurs in ALL occurs here too

Nothing is drawn at random: option values come from a hash of the cell's place, so the table is the same everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import pytest

RANKS = 8
CANDIDATES_PER_FORM = 12
"""Cells offered to the choice of COVERING for each form; the more, the fewer are needed."""
FILLED_PER_FORM = 2
"""Cells of each form that ALL has besides COVERING's."""

AXES: dict[str, tuple[int, ...]] = {"dp": (1, 2, 3, 4), "tp": (1, 2, 3, 4), "pp": (1, 2, 3, 4)}
SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3))

MIXED: dict[str, tuple[Any, ...]] = {
    "family": ("gpt2", "llama"),
    "heads": ("full", "grouped"),
    "tied": (True, False),
    "sharding": ("none", "zero1", "zero2", "zero3", "zero3_kept"),
    "recompute": ("none", "full", "selective"),
    "layers": ("uneven", "equal", "listed", "bare_ends"),
    "vocab": (37, 40),
    "micro_batches": (1, 2, 3, 4),
    "micro_batch": (1, 2),
    "optimizer": ("adamw", "sgd", "sgd_plain"),
    "clip": (0.0, 0.01, 100.0),
    "dropout": (0.0, 0.1),
    "rate": ("constant", "cosine", "linear"),
    "buckets": ("one", "several"),
    "weight_decay": (0.0, 0.1),
    "single_copy": ("auto", "off"),
}
"""Options that any layout can have. `clip` 0.01 bites on these models and 100 does not."""

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False, "ffn_size": 48},
}
HEADS: dict[tuple[str, int], tuple[int, int, int]] = {
    **{("full", tp): (6, 6, 24) for tp in (1, 2, 3)},
    ("full", 4): (4, 4, 24),
    **{("grouped", tp): (6, 2, 24) for tp in (1, 2)},
    ("grouped", 3): (6, 3, 24),
    ("grouped", 4): (8, 4, 32),
    ("full", 8): (8, 8, 32),
}
"""(form, tp) -> query heads, key/value heads, hidden size: the smallest that tp divides."""
BUCKET_WORDS = {"one": "", "several": "buckets", "between": "between"}
SHARDINGS: dict[str, dict[str, Any]] = {
    **{stage: {"sharding": stage} for stage in ("none", "zero1", "zero2", "zero3")},
    "zero3_kept": {"sharding": "zero3", "reshard": "step"},
}
RATES: dict[str, dict[str, Any]] = {
    "constant": {"decay": "none", "warmup": 0},
    "cosine": {"decay": "cosine", "warmup": 1},
    "linear": {"decay": "linear", "warmup": 0, "min_lr_ratio": 0.0},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 0.01},
    "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "sgd_plain": {"name": "sgd", "lr": 0.1, "momentum": 0.0},
}


@dataclass(frozen=True)
class Cell:
    """One configuration to certify on `world` ranks. `tags` are its option values, all of them."""

    name: str
    world: int
    config: dict[str, Any]
    tags: tuple[tuple[str, Any], ...]

    @property
    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Every two of its option values."""
        return combinations(self.tags, 2)


SIX = {
    **{"dp": 2, "tp": 1, "pp": 3, "sequence_parallel": False, "schedule": "interleaved", "virtual_stages": 2},
    **{
        "family": "gpt2",
        "heads": "full",
        "tied": True,
        "sharding": "zero1",
        "recompute": "none",
        "layers": "uneven",
        "vocab": 37,
    },
    **{"micro_batches": 6, "micro_batch": 1, "optimizer": "adamw", "clip": 0.01, "dropout": 0.1, "rate": "cosine"},
    **{"buckets": "several", "weight_decay": 0.1},
    "single_copy": "auto",
}
"""Two rounds of micro-batches through three interleaved stages: as long as it gets, so it is there once."""

WIDE = {
    **{"dp": 1, "tp": 8, "pp": 1, "sequence_parallel": True, "schedule": "gpipe", "virtual_stages": 1},
    **{
        "family": "gpt2",
        "heads": "full",
        "tied": False,
        "sharding": "none",
        "recompute": "none",
        "layers": "uneven",
        "vocab": 37,
    },
    **{"micro_batches": 3, "micro_batch": 2, "optimizer": "adamw", "clip": 0.01, "dropout": 0.1, "rate": "linear"},
    **{"buckets": "between", "weight_decay": 0.1},
    "single_copy": "off",
}
"""One head per tensor rank. 12 tokens a sequence over 8 ranks: only the micro-batch of two can be split."""

ODD = {
    **{"dp": 2, "tp": 2, "pp": 2, "sequence_parallel": True, "schedule": "interleaved", "virtual_stages": 2},
    **{
        "family": "llama",
        "heads": "grouped",
        "tied": False,
        "sharding": "zero1",
        "recompute": "none",
        "layers": "bare_first",
    },
    **{"vocab": 37, "micro_batches": 2, "micro_batch": 2, "optimizer": "sgd", "clip": 0.01, "dropout": 0.1},
    **{"rate": "cosine", "buckets": "between", "weight_decay": 0.0, "seq_len": 11},
    "single_copy": "off",
}
"""A token shard ends within a sequence, the embedding is alone on its chunk, and tensor ranks that cut buckets by
their own sizes would cut them differently, and hang."""

SHORT = {
    **{"dp": 1, "tp": 4, "pp": 2, "sequence_parallel": True, "schedule": "1f1b", "virtual_stages": 1},
    **{
        "family": "gpt2",
        "heads": "full",
        "tied": True,
        "sharding": "none",
        "recompute": "none",
        "layers": "bare_first",
        "vocab": 37,
    },
    **{"micro_batches": 3, "micro_batch": 2, "optimizer": "sgd_plain", "clip": 100.0, "dropout": 0.0},
    **{"rate": "constant", "buckets": "several", "weight_decay": 0.1, "seq_len": 10},
    "single_copy": "auto",
}
"""As ODD, with learned positions and a tied embedding that is alone on its chunk."""

NODES = {
    **{"dp": 4, "tp": 2, "pp": 1, "sequence_parallel": True, "schedule": "1f1b", "virtual_stages": 1, "nodes": 2},
    **{"family": "gpt2", "heads": "full", "tied": True, "sharding": "zero3", "recompute": "full", "layers": "uneven"},
    **{"vocab": 37, "micro_batches": 3, "micro_batch": 2, "optimizer": "adamw", "clip": 0.01, "dropout": 0.1},
    **{"rate": "cosine", "buckets": "several", "weight_decay": 0.1},
    "single_copy": "off",
}
"""State sharded inside a node and replicated over two."""

SINGLE = (
    SIX, WIDE, ODD, SHORT, NODES,
    {**NODES, "sharding": "zero1", "tp": 1, "sequence_parallel": False, "single_copy": "auto"},
    {**NODES, "sharding": "zero2", "tp": 1, "pp": 2, "sequence_parallel": False, "nodes": 4, "recompute": "selective"},
    {**NODES, "sharding": "zero3_kept", "tp": 1, "sequence_parallel": False, "family": "llama", "tied": False},
    {**NODES, "sharding": "zero1", "optimizer": "sgd"},
)  # fmt: skip
"""Cells outside the table of forms and MIXED. `seq_len` is 12 where an option does not say otherwise."""


# W apart from B, in the manner of the zero-bubble schedules: rank 0 fills with W the time in which it would wait.
SPLIT_2 = """
    0F0 0F1 0B0 0F2 0W0 0B1 0F3 0B2 0W1 0W2 0B3 0W3
    1F0 1B0 1F1 1B1 1W0 1F2 1B2 1W1 1F3 1W2 1B3 1W3
"""
SPLIT_3 = """
    0F0 0F1 0F2 0B0 0W0 0F3 0B1 0B2 0W1 0W2 0B3 0W3
    1F0 1F1 1B0 1F2 1B1 1W0 1F3 1B2 1W1 1B3 1W2 1W3
    2F0 2B0 2F1 2B1 2W0 2F2 2B2 2W1 2F3 2B3 2W2 2W3
"""


def forms() -> Iterator[dict[str, Any]]:
    """Every legal way to split over at most RANKS ranks: axes, sequence parallel, schedule."""
    for values in product(*AXES.values()):
        axes = dict(zip(AXES, values, strict=True))
        if axes["dp"] * axes["tp"] * axes["pp"] > RANKS:
            continue
        for split, (schedule, virtual) in product((False, True), SCHEDULES):
            if split and axes["tp"] == 1:
                continue
            if virtual > 1 and (axes["pp"] == 1 or axes["pp"] * virtual > 8):
                continue
            yield {**axes, "sequence_parallel": split, "schedule": schedule, "virtual_stages": virtual}


def layer_split(kind: str, chunks: int) -> tuple[int, str | list[int]] | None:
    """num_layers and parallel.layers; None where there is no such split."""
    if kind == "uneven":  # 5 layers over 2, 3 or 4 chunks, or one more layer than chunks
        return (2 if chunks == 1 else max(5, chunks + 1)), "balanced"
    if chunks == 1:
        return None
    if kind == "equal":
        return (4 if chunks == 2 else chunks), "equal"
    counts = [2] + [1] * (chunks - 1)
    if kind == "bare_first":  # the embedding alone, the head with layers
        counts = [0, 2 + (chunks == 2), *[1] * (chunks - 2)]
    if kind == "bare_ends":  # the embedding or the head alone on its chunk
        counts = [3, 0] if chunks == 2 else [0, 2, *[1] * (chunks - 3), 0]
    return sum(counts), counts


def make_cell(options: dict[str, Any]) -> Cell | None:
    """The cell of one value per option; None where they exclude one another."""
    o = options
    layers = layer_split(o["layers"], o["pp"] * o["virtual_stages"])
    if layers is None or (o["schedule"] == "interleaved" and o["micro_batches"] % o["pp"]):
        return None
    if o["buckets"] == "between" and (o["tied"] or o["vocab"] % o["tp"] == 0):
        return None
    heads, kv_heads, hidden = HEADS[o["heads"], o["tp"]]
    model = {
        **FAMILIES[o["family"]],
        **{"num_heads": heads, "num_kv_heads": kv_heads, "hidden_size": hidden, "num_layers": layers[0]},
        **{"seq_len": o.get("seq_len", 12), "vocab_size": o["vocab"], "tie_embeddings": o["tied"]},
        **{"dropout": o["dropout"], "attention_dropout": 0.0},  # the kernel's own mask depends on the layout
    }
    split = ("dp", "tp", "pp", "sequence_parallel", "schedule", "virtual_stages")
    config = {
        "model": model,
        "parallel": {**{key: o[key] for key in split}, "layers": layers[1]},
        "optim": {
            **OPTIMIZERS[o["optimizer"]],
            **RATES[o["rate"]],
            **{"clip": o["clip"], "weight_decay": o["weight_decay"]},
            **SHARDINGS[o["sharding"]],
            "bucket_mb": bucket_mb(o),
        },
        "train": {
            **{"steps": 4, "dtype": "fp64", "micro_batch": o["micro_batch"], "recompute": o["recompute"]},
            "global_batch": o["dp"] * o["micro_batch"] * o["micro_batches"],
        },
        "data": {"source": "synthetic"},
    }
    config["launch"] = {"single_copy": o.get("single_copy", "auto")}
    if "nodes" in o:
        config["launch"]["nodes"] = o["nodes"]
        config["optim"]["shard_group"] = "node"
    return Cell(_name(o), o["dp"] * o["tp"] * o["pp"], config, tuple(o.items()))


def bucket_mb(o: dict[str, Any]) -> float:
    """`between`: the head's block reaches the limit on tensor ranks with one vocabulary row more, and on the others
    does not."""
    if o["buckets"] == "between":
        hidden = HEADS[o["heads"], o["tp"]][2]
        norm = hidden * (2 if FAMILIES[o["family"]]["bias"] else 1)
        return (norm + (o["vocab"] // o["tp"] + 0.5) * hidden) * 8 / 1e6
    return 25.0 if o["buckets"] == "one" else 0.005  # less than a layer: one bucket per block


def _name(o: dict[str, Any]) -> str:
    """Short, and different for different options: it is the test's id."""
    schedule = o["schedule"] + (f"{o['virtual_stages']}" if o["virtual_stages"] > 1 else "")
    words = [f"dp{o['dp']}.tp{o['tp']}.pp{o['pp']}", "sp" if o["sequence_parallel"] else "", schedule, o["family"]]
    words += ["gqa" if o["heads"] == "grouped" else "", "tied" if o["tied"] else "untied", o["sharding"], o["layers"]]
    words += [f"v{o['vocab']}", f"{o['micro_batches']}x{o['micro_batch']}", o["optimizer"], f"clip{o['clip']:g}"]
    words += [o["recompute"] if o["recompute"] != "none" else ""]
    words += ["dropout" if o["dropout"] else "", o["rate"], BUCKET_WORDS[o["buckets"]]]
    words += [f"t{o['seq_len']}"] if "seq_len" in o else []
    words += [f"nodes{o['nodes']}"] if "nodes" in o else []
    words += ["sent"] if o.get("single_copy") == "off" else []
    return "-".join(word for word in [*words, "decay" if o["weight_decay"] else ""] if word)


def _mixed(form: dict[str, Any], number: int) -> dict[str, Any]:
    """One value of every other option, spread evenly and the same on every machine."""

    place = repr(sorted(form.items()))

    def pick(option: str) -> int:
        key = f"({place}, {number}, {option!r})".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")

    return {option: values[pick(option) % len(values)] for option, values in MIXED.items()}


def _candidates() -> list[list[Cell]]:
    """Legal cells, form by form. Illegal mixtures are passed over."""
    table = []
    for form in forms():
        cells: dict[str, Cell] = {}
        for number in range(1000):
            cell = make_cell({**form, **_mixed(form, number)})
            if cell is not None:
                cells[cell.name] = cell
            if len(cells) == CANDIDATES_PER_FORM:
                break
        table.append(list(cells.values()))
    single = [make_cell(options) for options in SINGLE]
    return [*table, *([cell] for cell in single if cell)]


def choose_covering(cells: list[Cell]) -> list[Cell]:
    """Return a small part of `cells` with every pair of option values that occurs in them: each time the cell with the
    most pairs not yet seen, a little less where a cell takes longer, the first of equals."""
    numbers: dict[tuple[Any, Any], int] = {}
    masks = [sum(1 << numbers.setdefault(pair, len(numbers)) for pair in cell.pairs) for cell in cells]
    missing = (1 << len(numbers)) - 1
    dear = [_work(cell) ** 0.1 for cell in cells]  # a higher power would choose more cells, and save no time
    chosen = []
    while missing:
        best = max(range(len(cells)), key=lambda i: (masks[i] & missing).bit_count() / dear[i])
        chosen.append(cells[best])
        missing &= ~masks[best]
    return chosen


def _work(cell: Cell) -> float:
    """Return about how much a cell computes: layers, and one for the ends, times micro-batches, on all ranks."""
    options = dict(cell.tags)
    again = 1.0 if options["recompute"] == "none" else 1.3
    return cell.world * (cell.config["model"]["num_layers"] + 1) * options["micro_batches"] * again


def _tables() -> tuple[list[Cell], list[Cell]]:
    table = _candidates()
    covering = choose_covering([cell for cells in table for cell in cells])
    everything = {cell.name: cell for cell in covering}
    everything |= {cell.name: cell for cells in table for cell in cells[:FILLED_PER_FORM]}
    return covering, list(everything.values())


def _sharded() -> list[Cell]:
    """The whole product of ZeRO's stages, tensor and pipeline ranks, schedules, recomputation and micro-batches, over
    two data ranks; the other options mixed in."""
    found = {}
    pipelines = ((1, "1f1b", 1), (2, "gpipe", 1), (2, "1f1b", 1), (2, "interleaved", 2))
    for tp, (pp, schedule, virtual) in product((1, 2), pipelines):
        form = {"dp": 2, "tp": tp, "pp": pp, "schedule": schedule, "virtual_stages": virtual}
        for stage, again, count in product(MIXED["sharding"], MIXED["recompute"], (1, 2, 3, 4)):
            split = tp > 1 and count % 2 == 0
            fixed = {**form, "sequence_parallel": split, "sharding": stage, "recompute": again, "micro_batches": count}
            mixtures = ({**_mixed(fixed, number), **fixed} for number in range(100))
            cell = next(filter(None, map(make_cell, mixtures)), None)
            if cell is not None:
                found[cell.name] = cell
    return list(found.values())


COVERING, ALL = _tables()
SHARDED = [cell for cell in _sharded() if cell.name not in {cell.name for cell in ALL}]
REST = [cell for cell in [*ALL, *SHARDED] if cell not in COVERING]
TABLES = [
    pytest.param(COVERING, id="covering"), pytest.param(REST, id="rest", marks=pytest.mark.all_cells)
]  # fmt: skip
"""What `make test` runs, and what `make test-all` adds."""
