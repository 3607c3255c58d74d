"""Partial labels of train, simulated from complete ones, as the papers do."""

import numpy as np

from paml import storage
from paml.labels import LabelTable, observe_random_fraction, observe_single_positive
from paml.preparation.settings import PrepareSettings

PAPER_SETS = ("voc", "coco", "nus_wide", "cub")
"""Complete sets on which the papers simulate partial labels, with a fixed split of their own."""
PAPER_VALIDATION = 0.2
"""Fraction of train that the papers use for validation (Cole et al., CVPR 2021)."""


def simulate(settings: PrepareSettings, full: str, folder: str) -> LabelTable | None:
    """Write the table of the protocol from the complete labels `full`; None without a protocol."""
    if settings.protocol is None:
        return None
    table, seed = LabelTable.open(full), settings.protocol_seed
    if settings.protocol == "single-positive":
        return observe_single_positive(table, storage.join(folder, "train-single.arrow"), seed)
    return observe_random_fraction(table, storage.join(folder, "train-share.arrow"), settings.protocol_share, seed)


def paper_validation(count: int, seed: int) -> np.ndarray:
    """bool[count], by ascending key: the images that the released scripts hold out for validation."""
    order = np.random.RandomState(seed).permutation(count)
    held_out = np.zeros(count, bool)
    held_out[order[count - round(PAPER_VALIDATION * count) :]] = True
    return held_out
