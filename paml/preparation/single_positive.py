"""The single-positive protocol of the papers, from a fully labeled set to prepared data."""

from collections.abc import Mapping

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.labels import filter_table, observe_single_positive
from paml.shards import ShardSettings, write_parts
from paml.sources.full import LabeledSplit

SEED, VALIDATION_FRACTION = 1200, 0.2
"""The papers' values."""


def prepare_single_positive(
    sets: Mapping[str, LabeledSplit],
    out: str,
    shards: ShardSettings,
    *,
    seed: int = SEED,
    validation_fraction: float = VALIDATION_FRACTION,
) -> None:
    """Write shards and tables of `sets` (train and test, as from `voc`, `coco`, `nus_wide` and `cub`) to `out`.

    Training images have one observed positive each (labels/train-single.arrow), validation and test all labels; the
    full labels of training are labels/train-full.arrow. Sampled as in the released scripts: first the positives, over
    all of train; then validation, the last fraction of a permutation of the images in the order of their keys, both
    with `seed`. Raises DataError if a split is missing.
    """
    if set(sets) != {"train", "test"}:
        raise DataError(f"the sets are {', '.join(sets)}, needed are train and test; validation is taken from train")
    full, test = sets["train"].table, sets["test"].table
    keys = full.keys()
    order = np.random.RandomState(seed).permutation(len(keys))
    first_held_out = len(keys) - round(validation_fraction * len(keys))
    train, validation = ([keys[index] for index in np.sort(part)] for part in np.split(order, [first_held_out]))

    def path_of(name: str) -> str:
        return storage.join(out, "labels", f"{name}.arrow")

    single = observe_single_positive(full, path_of("all-single"), seed, protocol="released")
    filter_table(single, path_of("train-single"), images=train)
    filter_table(full, path_of("train-full"), images=train)
    filter_table(full, path_of("validation"), images=validation)
    test.write(path_of("test"))
    storage.delete(path_of("all-single"))
    wanted = {
        "train": (sets["train"].parts, train),
        "validation": (sets["train"].parts, validation),
        "test": (sets["test"].parts, test.keys()),
    }
    for split, (parts, split_keys) in wanted.items():
        write_parts(parts, storage.join(out, "shards", split), shards, wanted_keys=split_keys)
