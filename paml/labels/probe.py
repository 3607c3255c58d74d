"""The probe: a seeded share of observed labels hidden from training.

How many hidden positives a method then rejects estimates its recall, and how many hidden negatives its false
rejection, where no full labels exist. Membership is a pure function of (seed, key, class index): equal in every
process, epoch and number of workers.
"""

import numpy as np

from paml.labels.hashing import below_share, hash_pairs
from paml.labels.states import LabelError
from paml.labels.table import LabelTable, Triples


def is_probe(key_hashes: np.ndarray, cls: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool[m]: which pairs are hidden. key_hashes uint64[m] (`LabelTable.key_hashes`), cls int[m], share in [0, 1]."""
    if not 0 <= share <= 1:
        raise LabelError(f"the probe's share is {share}, allowed is 0 to 1: set 0.01 for one label in a hundred")
    # The constant keeps these draws apart from those of the single-positive protocol at the same seed.
    return below_share(hash_pairs(key_hashes, cls, seed ^ 0x70726F6265), share)


def probe_mask(table: LabelTable, rows: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool[m]: which of the labels of `table.lookup(rows)` are hidden."""
    triples = table.lookup(rows)
    return is_probe(table.key_hashes(rows)[triples.image], triples.cls, share, seed)


def split_probe(
    triples: Triples, rows: np.ndarray, table: LabelTable, share: float, seed: int
) -> tuple[Triples, Triples]:
    """(kept, hidden) of `triples` = `table.lookup(rows)`; `image` stays the position in `rows` in both."""
    if share == 0:
        return triples, Triples(*(values[:0] for values in triples))
    hidden = is_probe(table.key_hashes(rows)[triples.image], triples.cls, share, seed)
    return Triples(*(values[~hidden] for values in triples)), Triples(*(values[hidden] for values in triples))
