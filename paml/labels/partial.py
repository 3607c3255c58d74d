"""Partial regimes: which of the full labels an experiment may see. `single_positive` has one more of them.

Each is a pure function of (seed, key, MID) and the labels: neither the order of the images nor the numbering of the
classes changes what is drawn. What was drawn, and from which table, is in the new table's metadata.
"""

from collections.abc import Callable

import numpy as np

from paml.labels.edit import keep, labels_of
from paml.labels.hashing import below_share, hash_keys, hash_pairs
from paml.labels.states import POSITIVE, LabelError
from paml.labels.table import LabelTable, Triples

# These keep the draws of the regimes apart at one seed.
_RANDOM_SHARE, _CLASS_WISE, _POSITIVES = 0x7368617265, 0x636C617373, 0x706F736974


def observe_random_share(table_full: LabelTable, out: str, share: float, seed: int) -> LabelTable:
    """Each label, positive or negative, is observed with probability `share`, by itself.

    The "random per sample" (RPS) scheme of Ben-Baruch et al., Multi-label Classification with Partial Annotations
    using Class-aware Selective Loss (CVPR 2022), whose parameter is the share that is omitted. Of one seed, a larger
    share observes all that a smaller one does.
    """
    _check_share(share)
    draws = _draws(table_full, seed ^ _RANDOM_SHARE)
    about = {"regime": "random_share", "share": share, "seed": seed, "full": table_full.digest}
    return keep(table_full, out, lambda labels: below_share(draws(labels), share), metadata=about)


def observe_class_wise(
    table_full: LabelTable, out: str, seed: int, *, count: int | None = None, share: float | None = None
) -> LabelTable:
    """Of each class a fixed number of positives and of negatives is observed, drawn without regard to other classes.

    count: so many of each state, all where there are fewer: the "fixed per class" (FPC) scheme of Ben-Baruch et al.
    (CVPR 2022). share: this share of each, rounded to the nearest number (halves to even), so that rare and frequent
    classes are annotated alike, which `observe_random_share` does on average alone. Give one of the two. Which labels
    are drawn depends on all the images of the table; of one seed, more observes all that less does.
    """
    if (count is None) == (share is None):
        raise LabelError(f"count is {count} and share is {share}: give one of the two")
    if count is not None and count < 0:
        raise LabelError(f"count is {count}, allowed is 0 or more: the labels of each class and state")
    if share is not None:
        _check_share(share)
    _, codes = table_full.label_columns()
    draw = _draws(table_full, seed ^ _CLASS_WISE)
    draws = np.concatenate([np.empty(0, np.uint64), *(draw(labels) for labels in labels_of(table_full))])
    order = np.lexsort((draws, codes))
    sizes = np.bincount(codes, minlength=2 * table_full.num_classes)
    wanted = np.minimum(sizes, count) if count is not None else np.rint((share or 0) * sizes).astype(np.int64)
    place = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.zeros(len(codes), bool)
    chosen[order] = place < np.repeat(wanted, sizes)
    about = {"regime": "class_wise", "count": count, "share": share, "seed": seed, "full": table_full.digest}
    return keep(table_full, out, chosen, metadata=about)


def observe_positives(table_full: LabelTable, out: str, *, share: float = 1.0, seed: int = 0) -> LabelTable:
    """Positives alone, each observed with probability `share`; of one seed, a larger share observes all of a smaller.

    Positive and unlabelled learning (the setting of Cole et al., CVPR 2021, with more than one positive an image).
    """
    _check_share(share)
    draws = _draws(table_full, seed ^ _POSITIVES)
    about = {"regime": "positives", "share": share, "seed": seed, "full": table_full.digest}

    def chosen(labels: Triples) -> np.ndarray:
        return (labels.state == POSITIVE) & below_share(draws(labels), share)

    return keep(table_full, out, chosen, metadata=about)


def _draws(table: LabelTable, seed: int) -> Callable[[Triples], np.ndarray]:
    """uint64[m] of labels whose `image` is the row in the table: one draw of each (key, MID)."""
    class_hashes = hash_keys(list(table.classes))

    def draw(labels: Triples) -> np.ndarray:
        if not len(labels.image):
            return np.empty(0, np.uint64)
        first, last = int(labels.image.min()), int(labels.image.max())
        keys = table.key_hashes(np.arange(first, last + 1))
        return hash_pairs(keys[labels.image - first], class_hashes[labels.cls], seed)

    return draw


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise LabelError(f"the share of labels is {share}, allowed is 0 to 1: set 0.5 for every second label")
