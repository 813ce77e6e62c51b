"""Permute 0 .. size - 1 by a key, element by element and in constant memory.

A Feistel network on pairs (l, r) of Z_a x Z_b permutes 0 .. a*b - 1 for the smallest convenient a*b >= size, and cycle
walking restricts it to 0 .. size - 1: values outside are permuted again until they fall inside (J. Black and
P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). The round function is the finaliser of splitmix64
(Steele, Lea and Flood, OOPSLA 2014). All arithmetic is on unsigned 64-bit integers, so every machine and every version
of numpy computes the same order.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

ROUNDS = 10
"""Luby and Rackoff need 4 rounds for a pseudorandom permutation; more make up for small halves."""
SMALLEST_SIDE = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
EPOCH_STEP = np.uint64(0xD1342543DE82EF95)
ROUND_CONSTANTS = np.arange(1, ROUNDS + 1, dtype=np.uint64) * GOLDEN
LARGEST = 1 << 62
"""Upper limit of the size: each side stays below 2^32."""


def mix(words: Words) -> Words:
    """Return the splitmix64 finaliser of each word, (n,)."""
    mixed = words >> np.uint64(30)
    mixed ^= words
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def permute(positions: NDArray[np.int64], epochs: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Return the images of `positions`, (n,), under the permutations of 0 .. size - 1 keyed by (seed, epoch).

    `epochs` has one entry per position, or a single one for all positions.
    """
    if not 1 <= size <= LARGEST:
        raise ValueError(f"a permutation of {size} elements; 1 to 2^62 are supported")
    if size == 1:
        return np.zeros_like(positions)
    rows, columns = sides(size)
    keys = mix(_word(seed) + GOLDEN)  # (1,)
    keys = mix(keys ^ mix(epochs.astype(np.uint64) * EPOCH_STEP + GOLDEN))  # (n,) or (1,)
    images = _feistel(positions.astype(np.uint64), keys, rows, columns)
    outside = np.flatnonzero(images >= size)
    while len(outside):
        some = keys if len(keys) == 1 else keys[outside]
        images[outside] = _feistel(images[outside], some, rows, columns)
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def sides(size: int) -> tuple[int, int]:
    """Return a and b of the network's domain: both near the square root, a*b at or a little above `size`.

    `a` is even because cyclic shifts of an odd length are even permutations: with two odd sides, half of all
    permutations could never occur. Neither side is below SMALLEST_SIDE, where 10 rounds would mix too little.
    """
    rows = math.isqrt(size - 1) + 1
    rows = max(rows + rows % 2, SMALLEST_SIDE)
    return rows, max(-(-size // rows), SMALLEST_SIDE)


def _word(value: int) -> Words:
    return np.array([value % 2**64], dtype=np.uint64)


def _feistel(words: Words, keys: Words, rows: int, columns: int) -> Words:
    """Return the network's permutation of 0 .. rows*columns - 1 at `words`, (n,)."""
    right, left = np.divmod(words, np.uint64(rows))
    for number, constant in enumerate(ROUND_CONSTANTS):
        key = mix(keys + constant)
        if number % 2 == 0:
            _shift(left, right, key, rows)
        else:
            _shift(right, left, key, columns)
    right *= np.uint64(rows)
    right += left
    return right


def _shift(half: Words, other: Words, key: Words, side: int) -> None:
    """Add a keyed function of `other` to `half` modulo `side`, in place."""
    hashed = mix(other * GOLDEN + key)
    hashed >>= np.uint64(32)
    hashed *= np.uint64(side)
    hashed >>= np.uint64(32)  # a number below `side`, which is below 2^32
    half += hashed
    half -= np.uint64(side) * (half >= side)
