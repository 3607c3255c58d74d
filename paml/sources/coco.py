"""MS-COCO, from the official tree: `annotations/instances_{set}.json` and the folders of images."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.parsing import parse_errors_as, read_json, safe_join
from paml.sources.full import LabeledSplit, first_existing, write_labeled_split

SPLITS = {"train": "train2014", "test": "val2014"}
"""The papers' protocol: the images with objects of train2014 and val2014, 82,081 and 40,137."""


def coco(root: str, out: str, *, splits: Mapping[str, str] = SPLITS) -> dict[str, LabeledSplit]:
    """The splits of the tree `root`, with tables `{out}/{split}-full.arrow`.

    splits: the image set of each split. Images without any object are left out, as in the papers. A key is the image's
    id in decimal digits without leading zeros: the order of the table's keys, as strings, is then the one in which the
    papers sample their single positives. The 80 classes, identified by their names, are in the file's order; crowds
    count. Raises DataError for missing or broken files.
    """
    labeled = {}
    for split, image_set in splits.items():
        path = first_existing(
            root, [f"annotations/instances_{image_set}.json", f"instances_{image_set}.json"], "the objects"
        )
        with parse_errors_as(path, "download it again"):
            content = _read(path)
            classes = [category["name"] for category in content["categories"]]
            if not all(isinstance(name, str) for name in classes):
                raise TypeError("the name of a category is not text")
            class_of = {category["id"]: index for index, category in enumerate(content["categories"])}
            row_of = {image["id"]: row for row, image in enumerate(content["images"])}
            positives = np.zeros((len(row_of), len(classes)), bool)
            for annotation in content["annotations"]:
                try:
                    positives[row_of[annotation["image_id"]], class_of[annotation["category_id"]]] = True
                except KeyError as error:
                    raise DataError(
                        f"{path}: annotation {annotation.get('id')} refers to {error}, which the file does not have: "
                        "download it again"
                    ) from error
            rows = np.flatnonzero(positives.any(axis=1))
            first = f"{image_set}/{content['images'][0]['file_name']}"
            folder = first_existing(root, [first, f"images/{first}"], "the first image").removesuffix(f"/{first}")
            images = [content["images"][row] for row in rows]
            files = [(str(image["id"]), f"{image_set}/{image['file_name']}") for image in images]
            for _, name in files:
                safe_join(folder, name)
        labeled[split] = write_labeled_split(
            folder,
            files,
            classes,
            positives[rows],
            storage.join(out, f"{split}-full.arrow"),
            set_name=f"MS-COCO {image_set}",
        )
    return labeled


def _read(path: str) -> dict[str, Any]:
    content = read_json(path, "download it again")
    missing = [name for name in ("images", "annotations", "categories") if name not in content]
    if missing:
        raise DataError(f"{path} has no {missing[0]!r}: use the file of the instances, not of the captions")
    if not content["images"]:
        raise DataError(f"{path} lists no image: download it again")
    return content
