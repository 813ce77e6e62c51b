"""Batches: which windows of the tokens a step trains on, as a function of (data.seed, step) and nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_gpt.config.schema import Config
from dist_gpt.data.cache import Prepared, Tokens
from dist_gpt.data.tokens import check_fits


class Batches:
    """Windows of seq_len + 1 tokens; inputs are `x[:, :-1]`, targets `x[:, 1:]`.

    A rank asks for the samples [first, first + count) of the global batch that are its own. What a sample holds does
    not depend on who asks, on the layout, or on how often the run was restarted.
    """

    def __init__(self, prepared: Prepared, config: Config) -> None:
        check_fits(prepared, config)
        self._window = config.model.seq_len + 1
        self._seed = config.data.seed
        self._batch = config.train.global_batch
        self._eval_batches = config.train.eval_batches
        self._train = prepared.train
        self._val = prepared.val

    def offsets(self, step: int, first: int, count: int) -> NDArray[np.int64]:
        """Where samples [first, first + count) of `step` begin in the train part, (count,).

        Philox (Salmon et al. 2011) keyed by (seed, step): any step is drawn without drawing those before it. Its raw
        words are used since numpy keeps them equal in all versions; the bias of the remainder is below windows / 2^64.
        """
        self._check(first, count)
        key = np.array([self._seed % 2**64, step], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(first + count)[first:]
        windows = len(self._train) - self._window + 1
        return (words % np.uint64(windows)).astype(np.int64)

    def sample(self, step: int, first: int, count: int) -> NDArray[np.int64]:
        """Samples [first, first + count) of the global batch of `step`, (count, seq_len + 1)."""
        return self._gather(self._train, self.offsets(step, first, count))

    def validation(self, batch_index: int, first: int, count: int) -> NDArray[np.int64]:
        """The same of validation batch `batch_index` (of train.eval_batches), (count, seq_len + 1).

        Always the same windows, spread evenly over the validation part; they overlap where it is short.
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
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self._window)
        return windows[offsets].astype(np.int64)
