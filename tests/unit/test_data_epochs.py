"""Test epochs: every window once, in an order that depends only on (data.seed, epoch)."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gpt.config.schema import Config
from dist_gpt.data.loader import Batches
from dist_gpt.data.shuffle import LARGEST, permute, sides
from dist_gpt.data.tokens import open_prepared, prepare

SEQ_LEN, WINDOWS = 4, 22


def order(size: int, epoch: int = 0, seed: int = 0) -> np.ndarray[Any, Any]:
    return permute(np.arange(size), np.array([epoch]), size, seed)


# The permutation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*range(1, 70), 81, 100, 255, 256, 257, 1000, 4095, 65_537, 200_003])
def test_is_a_permutation(size: int) -> None:
    for epoch in (0, 1, 10**6):
        assert np.array_equal(np.sort(order(size, epoch)), np.arange(size))


@pytest.mark.parametrize("size", [2**31 - 1, 2**32 + 1, 2**40 + 12_345, 2**53 + 1, LARGEST])
def test_large_sizes(size: int) -> None:
    """Images are distinct and all over the range, so nothing overflows."""
    positions = np.concatenate([np.arange(20_000), size - 1 - np.arange(20_000)])
    found = permute(positions, np.array([3]), size, 7)
    assert len(np.unique(found)) == len(found) and found.min() >= 0 and found.max() < size
    tenths = np.bincount((found / size * 10).astype(int), minlength=10)
    assert (abs(tenths - 4000) < 6 * np.sqrt(4000)).all()


@pytest.mark.parametrize("size", [0, -1, LARGEST + 1])
def test_sizes_that_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 2\\^62"):
        permute(np.arange(1), np.array([0]), size, 0)


@pytest.mark.parametrize("size", [2, 3, 4, 9, 16, 25, 49, 1000, 10**6, 10**12])
def test_domain_is_little_larger_than_the_size(size: int) -> None:
    a, b = sides(size)
    assert a * b >= size and a % 2 == 0
    assert a * b < max(64, size + 4 * (a + b)) + 1


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_of_few_windows_are_equally_frequent(size: int) -> None:
    """Chi-square over all size! permutations, at six standard deviations."""
    epochs = 24_000
    found = permute(np.tile(np.arange(size), epochs), np.repeat(np.arange(epochs), size), size, 11)
    counts = Counter(map(tuple, found.reshape(epochs, size).tolist()))
    every = list(itertools.permutations(range(size)))
    expected = epochs / len(every)
    chi = sum((counts[one] - expected) ** 2 / expected for one in every)
    assert chi < len(every) - 1 + 6 * np.sqrt(2 * (len(every) - 1)) + 6


@pytest.mark.parametrize("size", range(2, 21))
def test_small_sizes_have_no_structure(size: int) -> None:
    """First and last places are uniform, and neither fixed points nor successors are more frequent than by chance."""
    epochs = 8_000
    found = permute(np.tile(np.arange(size), epochs), np.repeat(np.arange(epochs), size), size, 5)
    found = found.reshape(epochs, size)
    for place in (0, size - 1):
        counts = np.bincount(found[:, place], minlength=size)
        chi = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
        assert chi < size - 1 + 6 * np.sqrt(2 * (size - 1)) + 6
    deviation = 6 * np.sqrt(1.5 / epochs)
    assert (found == np.arange(size)).sum(1).mean() == pytest.approx(1.0, abs=deviation)
    assert ((found[:, 1:] - found[:, :-1]) == 1).sum() / epochs == pytest.approx((size - 1) / size, abs=deviation)


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    size = 5_000
    orders = [order(size, epoch, seed) for seed in (0, 1, 2**63, 2**64 - 1) for epoch in (0, 1, 2)]
    for one, other in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 6 / np.sqrt(size)
        assert (one == other).sum() < 15


def test_the_order_is_pinned() -> None:
    """A checkpoint resumes in the order it was trained in, whatever version of numpy reads the data."""
    assert order(10).tolist() == PINNED[10] and order(1000, 3, 42)[:8].tolist() == PINNED[1000]


PINNED = {10: [3, 5, 4, 1, 7, 2, 0, 8, 9, 6], 1000: [916, 655, 961, 359, 688, 836, 162, 995]}


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Config]:
    """Return a configuration over 22 windows of 4 tokens that count upwards, with 2 tokens left over."""
    ids = np.arange(SEQ_LEN * WINDOWS + 1 + 2 + 30, dtype="<u2")
    ids.tofile(tmp_path / "ids.bin")

    def build(batch: int = 6, seed: int = 0, **data: Any) -> Config:
        sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "seq_len": SEQ_LEN, "vocab_size": 256}
        where = {"source": str(tmp_path / "ids.bin"), "cache": str(tmp_path / "cache"), "seed": seed, **data}
        where["val_fraction"] = 30.5 / len(ids)
        return Config.model_validate({"model": sizes, "train": {"steps": 11, "global_batch": batch}, "data": where})

    return build


@pytest.mark.parametrize("batch", [1, 5, 6, 22, 23, 50])
def test_every_window_once_an_epoch(make: Any, batch: int) -> None:
    """Batches may also span epochs or hold several. Every token but the first and those left over is a target once."""
    batches = Batches(prepare(make(batch)), make(batch))
    assert batches.windows == WINDOWS
    steps = -(-3 * WINDOWS // batch)
    samples = np.concatenate([batches.sample(step, 0, batch) for step in range(steps)])[: 3 * WINDOWS]
    for epoch in samples.reshape(3, WINDOWS, SEQ_LEN + 1):
        assert np.array_equal(np.sort(epoch[:, 1:].ravel()), np.arange(1, SEQ_LEN * WINDOWS + 1))
        assert np.array_equal(np.sort(epoch[:, 0]), SEQ_LEN * np.arange(WINDOWS))
    first, second = samples[:WINDOWS, 0], samples[WINDOWS : 2 * WINDOWS, 0]
    assert not np.array_equal(first, second), "the second epoch has a different order"


def test_the_order_does_not_depend_on_batch_or_layout(make: Any) -> None:
    """The n-th sample of a run is the same in batches of every size, read by 1, 3 or 8 ranks, and after a restart."""
    config = make(24)
    prepared = prepare(config)
    whole = np.concatenate([Batches(prepared, config).sample(step, 0, 24) for step in range(5)])
    for dp in (3, 8):
        ranks = [Batches(open_prepared(prepared.path), config) for _ in range(dp)]
        share = 24 // dp
        read = [ranks[rank].sample(step, rank * share, share) for step in range(5) for rank in range(dp)]
        assert np.array_equal(np.concatenate(read), whole)
    resumed = Batches(open_prepared(prepared.path), config)
    assert np.array_equal(np.concatenate([resumed.sample(step, 0, 24) for step in (3, 4)]), whole[72:])
    small = Batches(prepared, make(4))
    assert np.array_equal(np.concatenate([small.sample(step, 0, 4) for step in range(30)]), whole)


def test_one_window_is_an_epoch(make: Any, tmp_path: Path) -> None:
    np.arange(8, dtype="<u2").tofile(tmp_path / "ids.bin")
    config = make(3)
    config = config.model_copy(update={"data": config.data.model_copy(update={"val_fraction": 0.2})})
    batches = Batches(prepare(config), config)
    assert batches.windows == 1 and batches.sample(9, 0, 3).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_epochs_are_counted_and_described(make: Any) -> None:
    batches = Batches(prepare(make()), make())
    assert batches.epoch(11) == 11 * 6 / WINDOWS
    windows = "epoch: 22 windows of 4 tokens (2 tokens left over)"
    assert batches.describe() == f"{windows}; 11 steps of 6 windows are 3 epochs"
    replaced = Batches(prepare(make()), make(order="replacement"))
    assert replaced.describe().endswith("3 epochs, drawn with replacement (data.order)")
    assert len(np.unique(np.concatenate([replaced.offsets(step, 0, 6) for step in range(11)]))) < 66
