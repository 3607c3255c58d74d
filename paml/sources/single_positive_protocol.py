"""From a fully labelled set to the data folder of the papers' single-positive protocol."""

from collections.abc import Mapping

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.labels import LabelTable, observe_single_positive, split_by_keys
from paml.shards import ShardSettings, write_parts
from paml.sources.full import FullSplit
from paml.sources.parts import Part

PAPERS_SEED, PAPERS_SHARE = 1200, 0.2


def prepare_single_positive(
    sets: Mapping[str, FullSplit],
    out: str,
    shards: ShardSettings,
    *,
    seed: int = PAPERS_SEED,
    validation_share: float = PAPERS_SHARE,
) -> None:
    """Write shards and tables of `sets` (train and test, as `voc`, `coco`, `nus_wide` and `cub` make them) to `out`.

    Training images show one positive each (labels/train-single.arrow), validation and test all labels; the truth of
    training is labels/train-full.arrow. As the released scripts draw it: the positives first, over all of train; then
    validation, the last share of a permutation of the images in the order of their keys, both from `seed`.
    Raises DataError where a split is absent.
    """
    if set(sets) != {"train", "test"}:
        raise DataError(f"the sets are {', '.join(sets)}; needed are train and test, from which validation is taken")
    full = sets["train"].table
    keys = full.keys()
    order = np.random.RandomState(seed).permutation(len(keys))
    held = order[len(keys) - round(validation_share * len(keys)) :]
    validation = [keys[place] for place in np.sort(held)]

    def label(name: str) -> str:
        return storage.join(out, "labels", name)

    single = observe_single_positive(full, label("all-single.arrow"), seed, protocol="released")
    split_by_keys(single, {label("validation-single.arrow"): validation}, label("train-single.arrow"))
    split_by_keys(full, {label("validation.arrow"): validation}, label("train-full.arrow"))
    test = sets["test"].table
    split_by_keys(test, {label("test.arrow"): test.keys()}, None)
    for name in ("all-single.arrow", "validation-single.arrow"):
        storage.delete(label(name))
    _write(sets["train"].parts, out, "train", LabelTable.open(label("train-full.arrow")).keys(), shards)
    _write(sets["train"].parts, out, "validation", validation, shards)
    _write(sets["test"].parts, out, "test", test.keys(), shards)


def _write(parts: list[Part], out: str, split: str, keys: list[str], shards: ShardSettings) -> None:
    write_parts(parts, storage.join(out, "shards", split), shards, wanted_keys=keys)
