"""Batches: the windows of tokens that a step trains on, a function of (data.seed, step) alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_gpt.config.schema import Config
from dist_gpt.data.cache import Prepared
from dist_gpt.data.corpus import DataError
from dist_gpt.data.reader import Tokens
from dist_gpt.data.shuffle import permute
from dist_gpt.data.tokens import check_fits


class Batches:
    """Source of samples, windows `x` of seq_len + 1 tokens; inputs are `x[:, :-1]`, targets `x[:, 1:]`.

    Each rank requests its own samples [first, first + count) of the global batch. The contents of a sample do not
    depend on the rank, on the layout, or on restarts of the run.

    An epoch is one pass over all windows. Windows begin every seq_len tokens, so every token but the first is a target
    once; the last tokens, too few for a window, are left out. With data.order replacement, windows begin anywhere and
    are drawn independently, and an epoch has the same number of samples.
    """

    def __init__(self, prepared: Prepared, config: Config) -> None:
        check_fits(prepared, config)
        self._seq_len = config.model.seq_len
        self._window = config.model.seq_len + 1
        self._vocab_size = config.model.vocab_size
        self._seed = config.data.seed
        self._order = config.data.order
        self._batch = config.train.global_batch
        self._steps = config.train.steps
        self._eval_batches = config.train.eval_batches
        self._train = prepared.train
        self._val = prepared.val
        self.windows = (len(prepared.train) - 1) // self._seq_len
        """Number of windows in an epoch."""

    def offsets(self, step: int, first: int, count: int) -> NDArray[np.int64]:
        """Return the positions in the train part at which samples [first, first + count) of `step` begin, (count,)."""
        self._check(first, count)
        if self._order == "replacement":
            return self._drawn(step, first, count)
        number = step * self._batch + first + np.arange(count, dtype=np.int64)
        epochs = number // self.windows
        if epochs[0] == epochs[-1]:
            epochs = epochs[:1]  # the usual case: the keys are computed once
        return permute(number % self.windows, epochs, self.windows, self._seed) * self._seq_len

    def _drawn(self, step: int, first: int, count: int) -> NDArray[np.int64]:
        """Return starts drawn independently: Philox (Salmon et al. 2011) keyed by (seed, step).

        Its raw words are used because numpy keeps them equal in all versions; the bias of the remainder is below
        windows / 2^64.
        """
        key = np.array([self._seed % 2**64, step], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(first + count)[first:]
        return (words % np.uint64(len(self._train) - self._seq_len)).astype(np.int64)

    def epoch(self, steps: int) -> float:
        """Return the number of passes over the data in `steps` steps."""
        return steps * self._batch / self.windows

    def describe(self) -> str:
        """Return one line for the console: the windows in an epoch and the epochs in the run."""
        left_out = len(self._train) - 1 - self.windows * self._seq_len
        replaced = ", drawn with replacement (data.order)" if self._order == "replacement" else ""
        return (
            f"epoch: {self.windows:,} windows of {self._seq_len:,} tokens ({left_out:,} tokens left over); "
            f"{self._steps:,} steps of {self._batch:,} windows are {self.epoch(self._steps):.4g} epochs{replaced}"
        )

    def sample(self, step: int, first: int, count: int) -> NDArray[np.int64]:
        """Return samples [first, first + count) of the global batch of `step`, (count, seq_len + 1)."""
        return self._gather(self._train, self.offsets(step, first, count))

    def validation(self, batch_index: int, first: int, count: int) -> NDArray[np.int64]:
        """Return samples [first, first + count) of validation batch `batch_index`, (count, seq_len + 1).

        The windows are always the same, spread evenly over the validation part; they overlap if it is short.
        """
        self._check(first, count)
        if not 0 <= batch_index < self._eval_batches:
            raise ValueError(f"validation batch {batch_index} of {self._eval_batches} (train.eval_batches)")
        number = batch_index * self._batch + np.arange(first, first + count, dtype=np.int64)
        windows = len(self._val) - self._window + 1
        return self._gather(self._val, number * windows // (self._eval_batches * self._batch))

    def _check(self, first: int, count: int) -> None:
        if first < 0 or count < 1 or first + count > self._batch:
            raise ValueError(f"samples [{first}, {first + count}) of a global batch of {self._batch}")

    def _gather(self, tokens: Tokens, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the windows at `offsets`. Raise DataError for ids outside the vocabulary (of a changed file)."""
        found = tokens.windows(offsets, self._window)
        limit = self._vocab_size
        if limit is not None and (found.min() < 0 or found.max() >= limit):
            row, column = np.argwhere((found < 0) | (found >= limit))[0].tolist()
            raise DataError(
                f"data.source: token id {found[row, column]} at position {offsets[row] + column} of the tokens from "
                f"{tokens.path} is outside the vocabulary of {limit} (model.vocab_size), and was not there when the "
                "data were prepared; do not change the file while a run uses it, and restart the run"
            )
        return found
