"""The names of splits: train, validation and test, and what sources, folders and files call them."""

import posixpath
import re
from collections.abc import Sequence

SPLITS = ("train", "validation", "test")
ALIASES = {
    "train": ("train", "training", "trn", "trainset"),
    "validation": ("validation", "val", "valid", "dev", "minival"),
    "test": ("test", "testing", "tst", "testset"),
}
"""Usual names of each split, the most usual first."""
_WORD = re.compile(r"(?:^|[-_.])((?:train|trn|val|dev|test|tst|minival)[a-z]*(?:_[a-z](?![a-z]))?)", re.IGNORECASE)


def standard_split(name: str) -> str | None:
    """train, validation or test, from a split's name in a source such as `val2017` or `Training`; None for others."""
    word = re.sub(r"[\W_]*\d*$", "", name.strip().lower())
    return next((split for split, aliases in ALIASES.items() if word in aliases), None)


def split_folder(path: str) -> str:
    """The first folder of a path that is named as a split (`train`, `valid`, `val2017`); "" if there is none."""
    return next((folder for folder in path.split("/")[:-1] if standard_split(folder)), "")


def file_splits(paths: Sequence[str]) -> list[str]:
    """The split of each file: a folder that is named as one, or the word in its name (`cub-train-000001.tar`).

    paths: below the folder that the user named. "" for all files if none names a split; if some do, the others get the
    first word of their path, so that they are not taken for one of these.
    """
    splits = [split_folder(path) or _word(path) for path in paths]
    if not any(splits):
        return splits
    return [
        split or re.split(r"[-.\d]", path.split("/")[0])[0] or path for split, path in zip(splits, paths, strict=True)
    ]


def _word(path: str) -> str:
    match = _WORD.search(posixpath.basename(path))
    return match[1] if match else ""
