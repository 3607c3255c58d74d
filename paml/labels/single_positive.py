"""The single-positive protocol: of each image's full labels just one positive is observed.

Cole et al., Multi-Label Learning from Single Positive Labels (CVPR 2021), and the papers that followed it.
"""

import numpy as np

from paml.labels.hashing import hash_keys, hash_pairs
from paml.labels.states import POSITIVE
from paml.labels.table import LabelTable, table_from_triples

_BLOCK_ROWS = 1 << 17


def single_positive(full: np.ndarray, seed: int = 1200) -> np.ndarray:
    """bool[N, K]: the one observed positive of each image, bit for bit as the released scripts draw it.

    full: bool or 0/1 [N, K], the truth. `seed` starts NumPy's legacy generator anew for every split; negatives are
    shuffled too, only because the scripts draw so. An image without a positive observes nothing.
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


def observe_single_positive(table_full: LabelTable, out: str, seed: int = 1200, protocol: str = "hash") -> LabelTable:
    """Write the table in which each image of `table_full` shows one of its positives and nothing else; open it.

    protocol `hash`: the positive is a pure function of (seed, key, MID), whatever other images the table holds, in
    memory O(annotations). `released`: as `single_positive` draws over the images in the order of their keys, for
    tables small enough for a matrix of images x classes bytes. Images without a positive stay, without labels.
    """
    if protocol == "hash":
        rows, classes = _by_hash(table_full, seed)
    elif protocol == "released":
        triples = table_full.lookup(np.arange(table_full.num_images))
        full = np.zeros((table_full.num_images, table_full.num_classes), bool)
        full[triples.image, triples.cls] = triples.state == POSITIVE
        rows, classes = np.nonzero(single_positive(full, seed))
    else:
        raise ValueError(f"protocol is {protocol!r}, allowed are 'hash' and 'released'")
    return table_from_triples(
        table_full.keys(),
        table_full.classes,
        table_full.names,
        rows,
        classes,
        np.full(len(rows), POSITIVE, np.int8),
        out,
        metadata={"single_positive": {"seed": seed, "protocol": protocol, "full": table_full.digest}},
    )


def _by_hash(table: LabelTable, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64[n], classes int64[n]): of each image's positives the one whose hash is least."""
    class_hashes = hash_keys(list(table.classes))
    rows, classes = [], []
    for start in range(0, table.num_images, _BLOCK_ROWS):
        block = np.arange(start, min(start + _BLOCK_ROWS, table.num_images))
        triples = table.lookup(block)
        positive = triples.state == POSITIVE
        image, cls = triples.image[positive], triples.cls[positive]
        draws = hash_pairs(table.key_hashes(block)[image], class_hashes[cls], seed)
        order = np.lexsort((cls, draws, image))
        first = np.ones(len(order), bool)
        first[1:] = image[order][1:] != image[order][:-1]
        rows.append(block[image[order][first]])
        classes.append(cls[order][first].astype(np.int64))
    return np.concatenate(rows), np.concatenate(classes)
