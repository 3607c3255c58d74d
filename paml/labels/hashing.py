"""Seeded draws without state: 64-bit hashes of (key, class, seed), the same on every machine and in every process."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from paml.labels.table import as_strings, hex_to_uint64

_ODD = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 16


def mix(values: np.ndarray) -> np.ndarray:
    """uint64[n]: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014), a bijection that scatters all bits."""
    mixed = np.asarray(values, np.uint64) + _ODD
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def hash_keys(keys: Sequence[str] | pa.Array) -> np.ndarray:
    """uint64[n]: a hash of each key's text. Keys of 16 hex digits hash by value, however their table stores them."""
    strings = as_strings(keys)
    values, valid = hex_to_uint64(strings)
    hashes = mix(values)
    odd = np.flatnonzero(~valid)
    for start in range(0, len(odd), _BLOCK):
        block = odd[start : start + _BLOCK]
        hashes[block] = _hash_texts(strings.take(pa.array(block)))
    return hashes


def _hash_texts(strings: pa.Array) -> np.ndarray:
    """Fold texts, eight bytes at a time; the length is part of the hash, so that zero padding is harmless."""
    texts = np.array([text.encode() for text in strings.to_pylist()], dtype=object)
    lengths = np.array([len(text) for text in texts], np.uint64)
    width = max(8, -(-int(lengths.max()) // 8) * 8)
    words = np.frombuffer(b"".join(text.ljust(width, b"\0") for text in texts), "<u8").reshape(len(texts), -1)
    hashes = mix(lengths ^ np.uint64(0x7465787400000000))
    for column in words.T:
        hashes = mix(hashes ^ column)
    return hashes


def hash_pairs(key_hashes: np.ndarray, cls: np.ndarray, seed: int) -> np.ndarray:
    """uint64[m]: a hash of (key, class, seed); key_hashes uint64[m] as of `hash_keys`, cls integer[m]."""
    start = mix(np.array([seed % (1 << 64)], np.uint64))
    return mix(np.asarray(key_hashes, np.uint64) ^ mix(np.asarray(cls).astype(np.uint64) ^ start))


def below_share(hashes: np.ndarray, share: float) -> np.ndarray:
    """bool[m]: the hashes in the lowest `share` of all 64-bit numbers."""
    threshold = round(share * (1 << 64))
    if threshold >= 1 << 64:
        return np.ones(len(hashes), bool)
    return hashes < np.uint64(threshold)
