"""What rejection could give at best: a label table from which just the false negatives are missing.

    python benchmarks/perfect_rejection.py --observed data/coco18/labels/train-single.arrow \
        --full data/coco18/labels/train-full.arrow --out data/coco18/labels/train-single-perfect.arrow

Observed labels stay; every unobserved pair that is truly negative becomes an observed negative, every false negative
stays unobserved. Trained with `--loss.name iu` (unobserved labels count nothing) this is AN with a rejection that is
never wrong and misses nothing from the first step on: what a method that only rejects can come to.
"""

import argparse

import numpy as np

from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.labels.table import LabelTable, table_from_triples
from paml.training.data import same_classes


def perfect(observed: LabelTable, full: LabelTable, out: str) -> LabelTable:
    """Write the table; images are those of `observed`, which `full` must hold. O(images x classes) bytes of memory."""
    keys = observed.keys()
    rows = np.asarray(full.rows_of(keys))
    if (rows < 0).any():
        raise SystemExit(f"{full.path} lacks {int((rows < 0).sum())} of the images of {observed.path}")
    state = np.full((len(keys), observed.num_classes), NEGATIVE, np.int8)
    truth, seen = full.lookup(rows), observed.lookup(np.arange(len(keys)))
    positive = truth.state == POSITIVE
    state[truth.image[positive], truth.cls[positive]] = UNOBSERVED
    state[seen.image, seen.cls] = seen.state
    image, cls = np.nonzero(state != UNOBSERVED)
    return table_from_triples(keys, observed.classes, observed.names, image, cls, state[image, cls], out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observed", required=True, help="the table that a run would train on")
    parser.add_argument("--full", required=True, help="the truth; its positives decide")
    parser.add_argument("--out", required=True, help="where to write the table")
    given = parser.parse_args()
    observed, full = LabelTable.open(given.observed), LabelTable.open(given.full)
    same_classes(observed, full)
    table = perfect(observed, full, given.out)
    positives, negatives = table.class_counts()
    missing = table.num_images * table.num_classes - int(positives.sum() + negatives.sum())
    print(
        f"{given.out}: {table.num_images:,} images, {positives.sum():,} positives, {negatives.sum():,} negatives, "
        f"{missing:,} false negatives left out"
    )


if __name__ == "__main__":
    main()
