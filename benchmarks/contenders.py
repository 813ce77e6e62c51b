"""Contenders of `sharding`: trainers, models, and the bucket sizes that each may choose from. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.settings import Settings
from dist_gpt.config.schema import Config

OURS, SHARE = "ours", "ideal"
STAGES = ("none", "zero1", "zero2", "zero3", "zero3-step")
"""Values of `optim.sharding`. zero3 frees gathered parameters after each pass, zero3-step keeps them to the update."""
RANKS = (2, 4)
NUMBER = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3-step": 3}
MICRO_BATCHES = 2
"""Micro-batches per rank and step."""
TRUE_RS = " + rs"
"""Suffix of the name of a peer with a true reduce-scatter."""


@dataclass(frozen=True)
class Size:
    """Sizes of a model, and of the micro-batch it is trained with."""

    name: str
    what: str
    hidden: int
    layers: int
    heads: int
    seq: int
    vocab: int
    micro_batch: int


SIZES = {
    "compute": Size("compute", "bound by compute", 512, 4, 8, 128, 4096, 2),
    "communication": Size("communication", "bound by communication", 512, 4, 8, 32, 8192, 1),
}


@dataclass(frozen=True)
class Case:
    """One comparison: a model, a number of ranks, and a stage of STAGES."""

    size: Size
    ranks: int
    stage: str

    @property
    def label(self) -> str:
        """Name of the case in tables and messages."""
        return f"{self.size.name}, {self.ranks} ranks, {self.stage}"

    def config(self, settings: Settings, bucket_mb: float | None = None) -> Config:
        """Return our configuration of the case. Raise ConfigError if it cannot train."""
        sharding, _, reshard = self.stage.partition("-")
        more = [f"optim.sharding={sharding}"]
        more += [f"optim.reshard={reshard}"] if reshard else []
        more += [f"optim.bucket_mb={bucket_mb}"] if bucket_mb is not None else []
        s = self.size
        shaped = replace(
            settings, hidden=s.hidden, layers=s.layers, heads=s.heads, seq=s.seq, vocab=s.vocab,
            micro_batch=s.micro_batch, overrides=(*more, *settings.overrides),
        )  # fmt: skip
        return shaped.config(self.ranks * (settings.micro_batches or MICRO_BATCHES), dp=self.ranks)

    @property
    def block_numel(self) -> int:
        """Number of weights of a layer."""
        return 12 * self.size.hidden**2


@dataclass(frozen=True)
class Choice:
    """One bucket size: its name, our `optim.bucket_mb`, and the options of a peer."""

    name: str
    bucket_mb: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """A trainer, with the bucket sizes that it may choose from."""

    name: str
    side: str
    choices: tuple[Choice, ...]

    @property
    def is_peer(self) -> bool:
        """True for DeepSpeed and fully_shard."""
        return self.side in ("fsdp", "deepspeed")


ELEMENTS = (1_000_000, 4_000_000, 16_000_000)
BUCKETS_MB = (4.0, 16.0, 64.0)


def contenders(case: Case) -> list[Contender]:
    """Return the contenders of a case, ours first."""
    sharded = 1.0 if case.stage == "none" else 1.0 / case.ranks
    own = tuple(Choice(f"{mb:g} MB", mb) for mb in BUCKETS_MB)
    found = [
        Contender(OURS, "ours", own if NUMBER[case.stage] < 3 else (Choice("a block"),)),
        Contender(SHARE, "share", (Choice("", None, {"part": sharded}),)),
        _deepspeed(case, False),
    ]
    if case.stage != "none":
        found.append(_deepspeed(case, True))
    if NUMBER[case.stage] == 3:
        found += [_fully_sharded(case, False), _fully_sharded(case, True)]
    return found


def _deepspeed(case: Case, true: bool) -> Contender:
    stage, kept = NUMBER[case.stage], case.stage == "zero3-step"
    live = 1_000_000_000 if kept else 2 * case.block_numel
    choices = tuple(
        Choice(
            f"{elements * 4 / 1e6:g} MB", None,
            {"stage": stage, "bucket": elements, "live": live, "true_reduce_scatter": true},
        )
        for elements in ELEMENTS
    )  # fmt: skip
    return Contender("DeepSpeed" + (TRUE_RS if true else ""), "deepspeed", choices if stage else choices[:1])


def _fully_sharded(case: Case, true: bool) -> Contender:
    kept = case.stage == "zero3-step"
    choices = tuple(
        Choice(
            f"{layers} layer{'s' * (layers > 1)}", None, {"layers": layers, "kept": kept, "true_reduce_scatter": true}
        )
        for layers in (1, 2, 4)
    )
    return Contender("fully_shard" + (TRUE_RS if true else ""), "fsdp", choices)


def cases(only: tuple[str, ...]) -> list[Case]:
    """Return the cases that `only` selects by names of models and stages and by numbers of ranks, such as `2`.

    Models, ranks or stages of which none is named are all included. Raise ValueError for an unknown word.
    """
    known = {**dict.fromkeys(SIZES, 0), **{str(n): 1 for n in RANKS}, **dict.fromkeys(STAGES, 2)}
    if unknown := sorted(set(only) - set(known)):
        raise ValueError(f"--only {', '.join(unknown)}: expected some of {', '.join(known)}")

    def chosen(sort: int) -> list[str]:
        named = [word for word in known if known[word] == sort and word in only]
        return named or [word for word in known if known[word] == sort]

    return [Case(SIZES[size], int(ranks), stage) for ranks in chosen(1) for size in chosen(0) for stage in chosen(2)]
