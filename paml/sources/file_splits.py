"""The split of each of several data files, from their folders and names."""

import posixpath
import re
from collections.abc import Sequence

from paml.sources.full import split_folder

_WORD = re.compile(r"(?:^|[-_.])((?:train|trn|val|dev|test|tst|minival)[a-z]*(?:_[a-z](?![a-z]))?)", re.IGNORECASE)


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
