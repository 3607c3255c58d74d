"""MS-COCO, from the official tree: `annotations/instances_{set}.json` and the folders of images."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.reading import inside, read_facts, reading
from paml.sources.full import FullSplit, first_that_exists, full_split

SPLITS = {"train": "train2014", "test": "val2014"}
"""The papers' protocol: of train2014 and val2014 the images with objects, 82,081 and 40,137."""


def coco(root: str, out: str, *, splits: Mapping[str, str] = SPLITS, drop_empty: bool = True) -> dict[str, FullSplit]:
    """The splits of the tree `root`, with tables `{out}/{split}-full.arrow`.

    splits: the image set of each split. drop_empty leaves out images without any object, as the papers do. A key
    is the image's id in decimal digits without leading zeros, so that the order of the table's keys, as of
    strings, is the one in which the papers draw their single positives. The 80 classes, named by their names,
    stand in the file's order; crowds count. Raises DataError for absent or broken files.
    """
    found = {}
    for split, image_set in splits.items():
        path = first_that_exists(
            root, [f"annotations/instances_{image_set}.json", f"instances_{image_set}.json"], "the objects"
        )
        with reading(path, "fetch it again"):
            said = _read(path)
            classes = [category["name"] for category in said["categories"]]
            if not all(isinstance(name, str) for name in classes):
                raise TypeError("a category's name is no text")
            class_of = {category["id"]: index for index, category in enumerate(said["categories"])}
            row_of = {image["id"]: row for row, image in enumerate(said["images"])}
            positives = np.zeros((len(row_of), len(classes)), bool)
            for thing in said["annotations"]:
                try:
                    positives[row_of[thing["image_id"]], class_of[thing["category_id"]]] = True
                except KeyError as error:
                    raise DataError(
                        f"{path}: annotation {thing.get('id')} names {error}, which the file itself does not describe: "
                        "fetch it again"
                    ) from error
            kept = np.flatnonzero(positives.any(axis=1)) if drop_empty else np.arange(len(row_of))
            folder, prefix = _image_folder(root, image_set, said["images"])
            files = [(str(image["id"]), prefix + image["file_name"]) for image in (said["images"][row] for row in kept)]
            for _, name in files:
                inside(folder, name)
        found[split] = full_split(
            folder,
            files,
            classes,
            positives[kept],
            storage.join(out, f"{split}-full.arrow"),
            about=f"MS-COCO {image_set}",
        )
    return found


def _read(path: str) -> dict[str, Any]:
    said = read_facts(path, "fetch it again")
    absent = [name for name in ("images", "annotations", "categories") if name not in said]
    if absent:
        raise DataError(f"{path} has no {absent[0]!r}: name the file of the instances, not of the captions")
    if not said["images"]:
        raise DataError(f"{path} describes no image: fetch it again")
    return said


def _image_folder(root: str, image_set: str, images: list[dict[str, Any]]) -> tuple[str, str]:
    """The folder of the images and what stands before their names: `{set}/` or `images/{set}/`."""
    first = images[0]["file_name"]
    place = first_that_exists(root, [f"{image_set}/{first}", f"images/{image_set}/{first}"], "the first image")
    return place.removesuffix(f"{image_set}/{first}").rstrip("/"), f"{image_set}/"
