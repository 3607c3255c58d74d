"""The probe: a seeded fraction of observed labels, hidden from training.

The fraction of hidden positives that a method rejects estimates its recall, that of hidden negatives its false
rejection rate, without full labels. Membership is a pure function of (seed, key, class index): the same in every
process, epoch and number of workers.
"""

import numpy as np

from paml.errors import LabelError
from paml.labels.hashing import below_fraction, hash_pairs
from paml.labels.table import LabelTable, Triples

_SALT = 0x70726F6265  # makes the probe independent of the single-positive protocol at the same seed


def is_probe(key_hashes: np.ndarray, cls: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool[m]: which pairs are hidden. key_hashes uint64[m] (`LabelTable.key_hashes`), cls int[m], 0 ≤ fraction ≤ 1."""
    if not 0 <= fraction <= 1:
        raise LabelError(f"the probe fraction is {fraction}, allowed is 0 to 1: set 0.01 to hide one label in 100")
    return below_fraction(hash_pairs(key_hashes, cls, seed ^ _SALT), fraction)


def split_probe(
    triples: Triples, rows: np.ndarray, table: LabelTable, fraction: float, seed: int
) -> tuple[Triples, Triples]:
    """(visible, hidden) of `triples` = `table.lookup(rows)`; `image` stays the position in `rows` in both."""
    if fraction == 0:
        return triples, Triples(*(values[:0] for values in triples))
    hidden = is_probe(table.key_hashes(rows)[triples.image], triples.cls, fraction, seed)
    return Triples(*(values[~hidden] for values in triples)), Triples(*(values[hidden] for values in triples))
