"""Shuffling written out in integers: the same with every version of every library, on every machine.

`permutation` orders a block of documents in memory; `shuffled` finds one place of a shuffle of any size at once, and
`unshuffled` the way back, so that neither the rows of a trillion tokens nor a position in them are ever stored.
"""

import numpy as np

ROUNDS = 6


def scramble(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014): a fixed bijection on 64 bits that looks random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _state(key: tuple[int, ...]) -> np.ndarray:
    state = np.zeros(1, np.uint64)
    for part in key:
        state = scramble(state + np.uint64(part))
    return state


def permutation(size: int, *key: int) -> np.ndarray:
    """int64 [size]: a permutation that `key` (integers of at most 64 bits) decides."""
    return np.argsort(scramble(np.arange(size, dtype=np.uint64) + _state(key)), kind="stable")


def shuffled(places: np.ndarray, size: int, *key: int) -> np.ndarray:
    """int64: where a shuffle of 0 … size - 1 sends each of `places`."""
    return _walk(places, size, key, _forward)


def unshuffled(places: np.ndarray, size: int, *key: int) -> np.ndarray:
    """int64: what `shuffled` with the same size and key sends to each of `places`."""
    return _walk(places, size, key, _backward)


def _walk(places: np.ndarray, size: int, key: tuple[int, ...], network) -> np.ndarray:
    """Return a Feistel network over the next power of four, walked until it is back inside (Black and Rogaway 2002)."""
    half = np.uint64(max(((size - 1).bit_length() + 1) // 2, 1))
    state = _state(key)
    rounds = [scramble(state + np.uint64(number)) for number in range(ROUNDS)]
    x = network(np.asarray(places, np.uint64), half, rounds)
    while (outside := x >= np.uint64(size)).any():
        x = np.where(outside, network(x, half, rounds), x)
    return x.astype(np.int64)


def _forward(x: np.ndarray, half: np.uint64, rounds: list[np.ndarray]) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in rounds:
        left, right = right, left ^ (scramble(right + key) & mask)
    return (left << half) | right


def _backward(x: np.ndarray, half: np.uint64, rounds: list[np.ndarray]) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in reversed(rounds):
        left, right = right ^ (scramble(left + key) & mask), left
    return (left << half) | right
