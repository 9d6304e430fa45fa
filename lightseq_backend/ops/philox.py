"""Philox4x32-10, the counter-based generator: the same draw for the same (seed, stream, step, token), anywhere.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """counter: uint32 [n, 4]; key: two 32-bit words. Returns uint32 [n, 4]."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> _HALF) ^ c1 ^ np.uint64(k0)
        c2 = (product0 >> _HALF) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def gumbel(seed: int, stream: int, step: int, tokens: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise for each token id. tokens: int [n]. Returns float32 [n].

    Token i takes word i % 4 of counter (i // 4, step, stream, 0). The uniform draw is taken at the end near
    zero, where float32 is dense, so that rare large values keep their resolution.
    """
    tokens = np.asarray(tokens, np.uint32)
    counter = np.zeros((tokens.size, 4), np.uint32)
    counter[:, 0], counter[:, 1], counter[:, 2] = tokens // 4, step, stream
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[np.arange(tokens.size), tokens % 4]
    uniform = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    # A word near 2**32 rounds to exactly 1: the largest float32 below it keeps the logarithm finite.
    uniform = np.minimum(uniform, np.float32(1 - 2.0**-24))
    return -np.log(-np.log1p(-uniform))
