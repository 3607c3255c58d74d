"""Stateless seeded sampling: 64-bit hashes of (key, class, seed), the same on every machine and in every process."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from paml.labels.keys import as_strings, hex_to_uint64

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 16


def mix64(values: np.ndarray | int) -> np.ndarray:
    """uint64[n]: the SplitMix64 finalizer (Steele, Lea and Flood, OOPSLA 2014), a bijection that mixes all bits."""
    mixed = np.atleast_1d(np.asarray(values, np.uint64)) + _GOLDEN_GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def hash_keys(keys: Sequence[str] | pa.Array) -> np.ndarray:
    """uint64[n]: a hash of each key's text. Keys of 16 hex digits are hashed by value, however a table stores them."""
    strings = as_strings(keys)
    values, valid = hex_to_uint64(strings)
    hashes = mix64(values)
    text_rows = np.flatnonzero(~valid)
    for start in range(0, len(text_rows), _BLOCK):
        block = text_rows[start : start + _BLOCK]
        hashes[block] = _hash_texts(strings.take(pa.array(block)))
    return hashes


def _hash_texts(strings: pa.Array) -> np.ndarray:
    """Hash eight bytes at a time. The length is part of the hash, so zero padding causes no collisions."""
    texts = np.array([text.encode() for text in strings.to_pylist()], dtype=object)
    lengths = np.array([len(text) for text in texts], np.uint64)
    width = max(8, -(-int(lengths.max()) // 8) * 8)
    words = np.frombuffer(b"".join(text.ljust(width, b"\0") for text in texts), "<u8").reshape(len(texts), -1)
    hashes = mix64(lengths ^ np.uint64(0x7465787400000000))
    for column in words.T:
        hashes = mix64(hashes ^ column)
    return hashes


def hash_pairs(key_hashes: np.ndarray, cls: np.ndarray, seed: int) -> np.ndarray:
    """uint64[m]: a hash of (key, class, seed), from the key hashes uint64[m] and classes integer[m]."""
    class_hashes = mix64(np.asarray(cls).astype(np.uint64) ^ mix64(seed % (1 << 64)))
    return mix64(np.asarray(key_hashes, np.uint64) ^ class_hashes)


def below_fraction(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """bool[m]: which hashes are in the lowest `fraction` of all 64-bit numbers."""
    threshold = round(fraction * (1 << 64))
    if threshold >= 1 << 64:
        return np.ones(len(hashes), bool)
    return hashes < np.uint64(threshold)
