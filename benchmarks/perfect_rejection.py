"""Write the label table of a perfect rejection, an upper bound for methods that only reject.

    python benchmarks/perfect_rejection.py --observed data/coco18/labels/train-single.arrow \
        --full data/coco18/labels/train-full.arrow --out data/coco18/labels/train-single-perfect.arrow

Observed labels are unchanged. Unobserved negatives become observed negatives, and false negatives stay unobserved.
Training on this table with `--loss.name iu`, which ignores unobserved labels, is AN with a rejection of full precision
and recall from the first step on.
"""

import argparse

import numpy as np

from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.labels.table import LabelTable, table_from_triples
from paml.training.data import check_same_classes


def reject_perfectly(observed: LabelTable, full: LabelTable, out: str) -> LabelTable:
    """Write the table for the images of `observed`, all of which must be in `full`. Memory: one byte per pair."""
    keys = observed.keys()
    rows = np.asarray(full.rows_of(keys))
    if (rows < 0).any():
        raise SystemExit(f"{full.path} lacks {int((rows < 0).sum())} of the images of {observed.path}")
    state_NK = np.full((len(keys), observed.num_classes), NEGATIVE, np.int8)
    truth, labels = full.lookup(rows), observed.lookup(np.arange(len(keys)))
    positive = truth.state == POSITIVE
    state_NK[truth.image[positive], truth.cls[positive]] = UNOBSERVED
    state_NK[labels.image, labels.cls] = labels.state
    image, cls = np.nonzero(state_NK != UNOBSERVED)
    return table_from_triples(keys, observed.classes, observed.names, image, cls, state_NK[image, cls], out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observed", required=True, help="label table of the training images")
    parser.add_argument("--full", required=True, help="their full labels")
    parser.add_argument("--out", required=True, help="label table to write")
    options = parser.parse_args()
    observed, full = LabelTable.open(options.observed), LabelTable.open(options.full)
    check_same_classes(observed, full)
    table = reject_perfectly(observed, full, options.out)
    positives, negatives = table.class_counts()
    unobserved = table.num_images * table.num_classes - int(positives.sum() + negatives.sum())
    print(
        f"{options.out}: {table.num_images:,} images, {positives.sum():,} positives, {negatives.sum():,} negatives, "
        f"{unobserved:,} false negatives left unobserved"
    )


if __name__ == "__main__":
    main()
