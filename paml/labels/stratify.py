"""Divide the images of a table so that every part has its share of each class's positives and negatives.

A variant of iterative stratification (Sechidis, Tsoumakas and Vlahavas, ECML PKDD 2011): each image goes to the part
that lacks its labels most. Here a label is a code of the table, a class with a state: positives and negatives are
balanced separately, and unobserved pairs do not count. There only the rarest label of an image counts; here all do,
which balances frequent classes too. Here the sizes are exact.
"""

# No package fits. They take dense labels, and their time grows faster than that (iterative-stratification 0.1.9: 1.5 s
# for 10,000 images x 400 labels, 7 s for twice both; scikit-multilearn-ng 0.0.8 removes each image from a list). Their
# sizes are not exact, and a rare class may be missing in a part.

from collections.abc import Sequence

import numpy as np

from paml.labels.edit import check_fractions
from paml.labels.hashing import mix64
from paml.labels.table import LabelTable

_SALT = 0x7374726174  # makes these samples independent of others with the same seed


def stratified_split(table: LabelTable, fractions: Sequence[float], seed: int) -> np.ndarray:
    """int64[num_images]: the part of each image, from 0 to len(fractions) - 1. Raises LabelError for bad fractions.

    The sizes differ from the fractions by less than 1, except that each part gets an image if there are enough. Each
    part also gets a positive and a negative of each class that has enough of them, unless that takes more than half of
    the part, rounded up. A part of fraction 0 stays empty. The result depends on the table's keys and labels and on the
    seed only, and changes as the table grows. Takes O(labels) memory and about 20 s per million images.
    """
    check_fractions(fractions)
    parts = np.flatnonzero(fractions)
    hashes = mix64(table.key_hashes(np.arange(table.num_images)) ^ mix64((seed ^ _SALT) % (1 << 64)))
    return parts[_divide(*table.label_columns(), np.argsort(hashes, kind="stable"), np.array(fractions)[parts])]


def _divide(offsets: np.ndarray, codes: np.ndarray, order: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """int64[n]: the part of each image. order: int64[n], the images in random order; fractions: float64[P], above 0."""
    num_images, num_parts = len(order), len(fractions)
    part_of = np.full(num_images, -1)
    sizes = _sizes(num_images, fractions)
    # The last label is one that every image has: it balances the sizes.
    total = np.append(np.bincount(codes), num_images)
    given = np.zeros((len(total), num_parts))

    def labels_of(image: int) -> np.ndarray:
        return np.append(codes[offsets[image] : offsets[image + 1]], len(total) - 1)

    def assign(image: int, labels: np.ndarray, part: int) -> None:
        part_of[image] = part
        given[labels, part] += 1

    # One image of each label for each part, the rarest label and the smallest part first. At most half of a part: else
    # many rare classes would fill a small part, and frequent ones would be missing there.
    for label, images in _rarest_first(offsets, codes, order):
        candidates = iter(images.tolist())
        for part in np.argsort(fractions, kind="stable") if len(images) >= num_parts else ():
            if not given[label, part] and given[-1, part] < np.ceil(sizes[part] / 2):
                image = next((image for image in candidates if part_of[image] < 0), None)
                if image is not None:
                    assign(image, labels_of(image), part)

    # Of each other image, every part is due its share in what remains of the image's labels. The image goes to the part
    # to which most is due, compared to the square root of a label's images, which chance would give.
    needs = total[:, None] * fractions
    needs[-1] = sizes
    share = (needs - given) / np.maximum(total - given.sum(1), 1)[:, None]
    weight = 1 / np.sqrt(np.maximum(total, 1))
    due = np.zeros_like(share)
    for image in order[part_of[order] < 0].tolist():
        labels = labels_of(image)
        due[labels] += share[labels]
        part = np.where(given[-1] < sizes, weight[labels] @ due[labels], -np.inf).argmax().item()
        due[labels, part] -= 1
        assign(image, labels, part)
    return part_of


def _rarest_first(offsets: np.ndarray, codes: np.ndarray, order: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(label, its images int64[m] in the order of `order`) of each label, the one with the fewest images first."""
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    ranks = np.repeat(rank, np.diff(offsets))
    images = order[ranks[np.lexsort((ranks, codes))]]
    labels, starts = np.unique(np.sort(codes), return_index=True)
    return sorted(zip(labels.tolist(), np.split(images, starts[1:]), strict=False), key=lambda item: len(item[1]))


def _sizes(count: int, fractions: np.ndarray) -> np.ndarray:
    """float64[P]: how many of `count` images each part gets: whole numbers, each 1 or more if there are enough."""
    exact = count * fractions
    sizes = np.maximum(np.floor(exact), count >= len(fractions))
    while sizes.sum() < count:
        sizes[np.argmax(exact - sizes)] += 1
    while sizes.sum() > count:
        sizes[np.argmax(np.where(sizes > 1, sizes - exact, -np.inf))] -= 1
    return sizes
