"""Partial-label regimes: which of the full labels an experiment observes.

Each is a pure function of (seed, key, class) and the labels: neither the order of the images nor the numbering of the
classes changes the sample. The new table's metadata names the regime, its parameters and the full table.
"""

import numpy as np

from paml.errors import LabelError
from paml.labels.edit import filter_labels
from paml.labels.hashing import below_fraction, hash_keys, hash_pairs
from paml.labels.states import POSITIVE
from paml.labels.table import LabelTable, Triples

_SALT = 0x7368617265  # makes this sample independent of others with the same seed


def observe_random_fraction(full: LabelTable, out: str, fraction: float, seed: int) -> LabelTable:
    """Each label, positive or negative, is observed independently with probability `fraction`.

    The "random per sample" (RPS) scheme of Ben-Baruch et al., Multi-label Classification with Partial Annotations
    using Class-aware Selective Loss (CVPR 2022), whose parameter is the omitted fraction. With the same seed, a larger
    fraction observes all that a smaller one does.
    """
    if not 0 <= fraction <= 1:
        raise LabelError(f"the fraction of labels is {fraction}, allowed is 0 to 1: set 0.5 for every second label")
    key_hashes, class_hashes = full.key_hashes(np.arange(full.num_images)), hash_keys(full.classes)

    def is_observed(labels: Triples) -> np.ndarray:
        hashes = hash_pairs(key_hashes[labels.image], class_hashes[labels.cls], seed ^ _SALT)
        return below_fraction(hashes, fraction)

    metadata = {"regime": "random_fraction", "fraction": fraction, "seed": seed, "full": full.digest}
    return filter_labels(full, out, is_observed, metadata=metadata)


def single_positive(full: np.ndarray, seed: int = 1200) -> np.ndarray:
    """bool[N, K]: the one observed positive of each image, bit for bit as the released scripts sample it.

    Cole et al., Multi-Label Learning from Single Positive Labels (CVPR 2021), and the papers that followed it.
    full: bool or 0/1 [N, K], the truth. `seed` seeds NumPy's legacy generator for each split; negatives are shuffled
    too, because the scripts do so. An image without a positive has no observed label.
    """
    truth = np.asarray(full) == 1
    generator = np.random.RandomState(seed)
    observed = np.zeros(truth.shape, bool)
    for image, labels in enumerate(truth):
        positives = np.flatnonzero(labels)
        negatives = np.flatnonzero(~labels)
        generator.shuffle(positives)
        generator.shuffle(negatives)
        observed[image, positives[:1]] = True
    return observed


def observe_single_positive(full: LabelTable, out: str, seed: int = 1200, protocol: str = "hash") -> LabelTable:
    """Exactly one positive of each image of `full` is observed, and no negative.

    protocol `hash`: the positive is a pure function of (seed, key, class), independent of other images, in
    O(annotations) memory. `released`: as `single_positive` samples over the images in the order of their keys, for
    tables small enough for a matrix of images x classes bytes. Images without a positive stay, without labels.
    """
    metadata = {"single_positive": {"seed": seed, "protocol": protocol, "full": full.digest}}
    if protocol == "released":
        labels = full.lookup(np.arange(full.num_images))
        truth = np.zeros((full.num_images, full.num_classes), bool)
        truth[labels.image, labels.cls] = labels.state == POSITIVE
        observed = single_positive(truth, seed)
        return filter_labels(full, out, lambda labels: observed[labels.image, labels.cls], metadata=metadata)
    if protocol != "hash":
        raise ValueError(f"protocol is {protocol!r}, allowed are 'hash' and 'released'")
    class_hashes = hash_keys(full.classes)

    def has_lowest_hash(labels: Triples) -> np.ndarray:
        positives = np.flatnonzero(labels.state == POSITIVE)
        rows, classes = labels.image[positives], labels.cls[positives]
        hashes = hash_pairs(full.key_hashes(rows), class_hashes[classes], seed)
        order = np.lexsort((classes, hashes, rows))
        first = order[np.unique(rows, return_index=True)[1]]  # rows ascend before and after the sort
        return np.isin(np.arange(len(labels.cls)), positives[first])

    return filter_labels(full, out, has_lowest_hash, metadata=metadata)
