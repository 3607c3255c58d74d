"""COCO's JSON of instances and LVIS's, from the official trees and as annotation tools export them.

Formats: https://cocodataset.org/#format-data, https://www.lvisdataset.org/dataset. LVIS has partial labels: an image
lists the classes that were checked and are absent (`neg_category_ids`) and those that are not annotated everywhere
(`not_exhaustive_category_ids`).
"""

import json
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from paml import storage
from paml.errors import DataError, check_setting
from paml.labels.class_list import ClassList
from paml.parsing import parse_errors_as
from paml.sources.folder import is_image
from paml.sources.full import distinct_names, list_inputs, list_some, path_below, sniff
from paml.sources.matching import file_key, label_key
from paml.sources.records import Records

_KEYS = re.compile(rb'"(?:images|annotations|categories)"\s*:\s*\[')
_FIELDS = re.compile(rb'"(?:file_name|coco_url|image_id|category_id|supercategory|neg_category_ids)"\s*:')
_SHAPES = ("segmentation", "bbox")
_NO_SPLIT = re.compile(
    r"(?i)(?:^|(?<=[_.-]))(?:instances|annotations?|coco|lvis|labels|result|v\d+(?:\.\d+)?)(?=[_.-]|$)"
)
_OTHER_KINDS = re.compile(r"captions|panoptic|keypoints|image_info")
_HINT = "export it again as COCO instances"
_TRIED = 5


@dataclass(frozen=True, kw_only=True)
class CocoSettings:
    """The source `coco`."""

    complete: bool | None = None
    """Whether a class that has no annotation in an image is absent there. null: true for COCO, false for LVIS, which
    lists the absent classes of each image. Set it to false for images that were annotated in part."""

    def __post_init__(self) -> None:
        check_setting(self.complete in (None, True, False), "coco.complete", self.complete, "true, false or null")


@dataclass
class _Labels:
    """What the files have in common, one image after the other."""

    names: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    """The folder of each image below the root; the split's name if the images were not found."""
    files: list[str] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    cls: list[str] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    classes: dict[str, None] = field(default_factory=dict)
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lvis_files: int = 0
    annotations: int = 0
    unknown: int = 0
    """Annotations of unknown images or classes."""
    near: bool = False
    """Whether images were found below the root."""

    def add(self, image: int, cls: str, state: str) -> None:
        self.image.append(image)
        self.cls.append(cls)
        self.state.append(state)


def detect_coco(labels: str) -> str | None:
    """Whether a JSON file, or one in a folder or its subfolders, has the lists of COCO."""
    if _looks_like_coco(labels):
        return "a COCO JSON file"
    names = [name for name in list_some(labels) if name.endswith(".json")]
    found = [name for name in names[:20] if _looks_like_coco(storage.join(labels, name))]
    if not found:
        return None
    folder = posixpath.dirname(found[0])
    return (
        f"{len(found)} COCO JSON files, such as {found[0]}"
        if len(found) > 1
        else f"a COCO JSON file in {folder or '.'}"
    )


def read_coco(labels: str, images: str | None, settings: CocoSettings) -> Records:
    """The labels of a JSON file, or of all instance files of a folder, each of which is a split.

    An image is labeled with the classes of its annotations, crowds included; classes are the categories' names, in
    their order. Images without annotations are included. Raises DataError for missing, broken or other files.
    """
    root, files, notes = _find_files(labels)
    found = _Labels(notes=notes)
    for file in files:
        split = split_name(file) if len(files) > 1 else ""
        path = storage.join(root, file)
        with parse_errors_as(path, _HINT):
            _add_file(found, _read(path), path, root, file, split)
    if found.annotations and found.annotations == found.unknown:
        raise DataError(f"{found.bad_rows[0][1]}; the same is true of all {found.annotations:,} annotations: {_HINT}")
    names = distinct_names(found.names, found.folders, found.splits, labels)
    is_lvis = found.lvis_files == len(files)
    if 0 < found.lvis_files < len(files):
        raise DataError(
            f"{labels!r} has LVIS files and others: set labels to one of {', '.join(files)}, or to a folder"
        )
    complete = not is_lvis if settings.complete is None else settings.complete
    at = images is None and found.near
    if images is None and not at:
        found.notes.append(f"no image was found near {files[0]} in {root}, such as {found.names[0]!r}: set images")
    with parse_errors_as(labels, _HINT):  # JSON can have text that is not valid Unicode
        cls = pa.array(found.cls, pa.string()).dictionary_encode()
        pa.array([*names, *found.classes], pa.string())
    return Records(
        path=labels,
        understood=_describe(found, files, complete=complete, is_lvis=is_lvis),
        images=names,
        keys=_paper_keys(names),
        image=np.array(found.image, np.int64),
        cls=cls,
        state=pa.array(found.state, pa.string()).dictionary_encode(),
        splits=found.splits if any(found.splits) else None,
        classes=ClassList(labels, list(found.classes), list(found.classes)),
        complete=complete,
        folder=root if at else None,
        files=found.files if at and any(found.files) else None,
        bad_rows=found.bad_rows,
        notes=found.notes,
    )


def paper_order_key(name: str) -> str:
    """The image's id in decimal digits without leading zeros, from an official file name; other names unchanged.

    In the order of these strings the papers sample single positives: `COCO_train2014_000000000100.jpg`, then 25, 9.
    """
    digits = re.search(r"(?:^|_)(\d{12})(?:\.\w+)?$", name.rsplit("/", 1)[-1])
    return str(int(digits[1])) if digits else name


def _paper_keys(names: Sequence[str]) -> list[str] | None:
    """The images' ids as keys, if all have official file names; else None."""
    keys = [paper_order_key(name) for name in names]
    return keys if all(key.isdigit() for key in keys) and len(set(keys)) == len(keys) else None


def split_name(file: str) -> str:
    """The split of a file as its name or its folder says: instances_train2014.json, valid/_annotations.coco.json."""
    folder, stem = posixpath.split(file.removesuffix(".json"))
    words = [word for word in re.split(r"[_\-]+|\.", _NO_SPLIT.sub("", stem)) if word]
    folders = [name for name in folder.split("/") if name and name != "annotations"]
    return "_".join(words) or (folders[-1] if folders else "")


def _find_files(labels: str) -> tuple[str, list[str], list[str]]:
    """(root, instance files below it, notes). The root is the folder of the images and `annotations`."""
    if storage.exists(labels):
        folder, _, name = labels.rpartition("/")
        files, notes = [name], []
        root = folder or ("/" if labels.startswith("/") else ".")
    else:
        root = labels.rstrip("/")
        files, notes = _choose_files(root)
    if posixpath.basename(root) == "annotations" and not root.endswith("//annotations"):  # the name of a bucket
        root, files = posixpath.dirname(root) or ".", [f"annotations/{file}" for file in files]
    return root, files, notes


def _choose_files(root: str) -> tuple[list[str], list[str]]:
    """(instance files below the folder, notes on the others)."""
    names = [f"annotations/{name}" for name in storage.list_files(storage.join(root, "annotations"))]
    names = [name for name in names or list_inputs(root) if name.endswith(".json")]
    if not names:
        if not list_some(root):
            raise DataError(f"there is no {root!r}, or it is empty: set labels to an existing file or folder")
        raise DataError(f"{root!r} has no COCO JSON file: set labels to the file, or to its folder")
    files = [name for name in names if posixpath.basename(name).startswith("instances_")]
    if not files:
        likely = [name for name in names if not _OTHER_KINDS.search(name)] or names
        files = [name for name in likely if _looks_like_coco(storage.join(root, name))] or likely[:1]
    others = [name for name in names if name not in set(files)]
    if not others:
        return files, []
    return files, [f"{len(others):,} other JSON files were not read, such as {others[0]}"]


def _looks_like_coco(path: str) -> bool:
    if not path.endswith(".json"):
        return False
    start = sniff(path).lstrip(b"\xef\xbb\xbf \t\r\n")
    return start.startswith(b"{") and bool(_KEYS.search(start)) and bool(_FIELDS.search(start))


def _read(path: str) -> dict[str, Any]:
    """The content without shapes, which are most of it. Raises DataError for a file of another kind."""
    content = json.loads(storage.read_bytes(path), object_hook=_without_shapes)
    if not isinstance(content, dict):
        raise TypeError(f"expected a JSON object, got {type(content).__name__}")
    first = next(iter(content.get("annotations") or ()), {})
    categories = content.get("categories") or ()
    for kind, applies in (
        ("captions", "caption" in first),
        ("panoptic segments", "segments_info" in first),
        ("keypoints of one class", len(categories) == 1 and bool(categories[0].get("keypoints"))),
    ):
        if applies:
            raise DataError(f"{path} has {kind}, not instances: use the file of the instances (instances_*.json)")
    if missing := [name for name in ("images", "annotations", "categories") if name not in content]:
        raise DataError(f"{path} has no {missing[0]!r}: use the file of the instances (instances_*.json)")
    if not content["images"]:
        raise DataError(f"{path} lists no image: {_HINT}")
    return content


def _without_shapes(value: dict[str, Any]) -> dict[str, Any]:
    for name in _SHAPES:
        value.pop(name, None)
    return value


def _add_file(found: _Labels, content: dict[str, Any], path: str, root: str, file: str, split: str) -> None:
    row_of = _add_images(found, content["images"], path)
    name_of, group = _classes(content, path)
    if group:
        found.notes.append(
            f"{path}: the category {group!r} is left out: it only groups the others, without annotations"
        )
    found.classes |= dict.fromkeys(name_of.values())
    names = found.names[len(found.splits) :]
    folder, files = _find_images(root, file, names)
    found.near |= folder is not None
    found.splits += [split] * len(names)
    found.folders += [split if folder is None else folder] * len(names)
    found.files += files
    positives: set[tuple[int, str]] = set()
    for number, annotation in enumerate(content["annotations"], 1):
        found.annotations += 1
        row, name = row_of.get(annotation["image_id"]), name_of.get(annotation["category_id"])
        if row is None or name is None:
            unknown = f"image {annotation['image_id']!r}" if row is None else f"category {annotation['category_id']!r}"
            text = f"{path}: annotation {annotation.get('id')} refers to {unknown}, which the file does not have"
            found.bad_rows.append((number, text))
            found.unknown += 1
        elif (row, name) not in positives:
            positives.add((row, name))
            found.add(row, name, "1")
    is_lvis = False
    for number, image in enumerate(content["images"], 1):
        for key, state in (("neg_category_ids", "0"), ("not_exhaustive_category_ids", "")):
            is_lvis |= key in image
            row = row_of[image["id"]]
            for category in image.get(key) or ():
                if (name := name_of.get(category)) is None:
                    text = f"{path}: {key} of image {image['id']!r} has the unknown category {category!r}"
                    found.bad_rows.append((number, text))
                elif state == "0" or (row, name) not in positives:
                    found.add(row, name, state)
    found.lvis_files += is_lvis


def _add_images(found: _Labels, images: Sequence[dict[str, Any]], path: str) -> dict[Any, int]:
    """The row of each image id. An image that is listed again has the same row."""
    row_of: dict[Any, int] = {}
    row_of_name: dict[str, int] = {}
    for image in images:
        name = image.get("file_name")
        if name is None and isinstance(image.get("coco_url"), str):  # as in LVIS
            name = "/".join(image["coco_url"].split("/")[-2:])
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: image {image['id']!r} has no file_name: {_HINT}")
        row = row_of_name.setdefault(name, len(found.names))
        if row == len(found.names):
            found.names.append(name)
        if row_of.setdefault(image["id"], row) != row:
            first = found.names[row_of[image["id"]]]
            raise DataError(f"{path}: the id {image['id']!r} is that of {first!r} and of {name!r}: {_HINT}")
    if repeated := len(images) - len(row_of_name):
        found.notes.append(f"{path} lists {repeated:,} images again: their labels are joined")
    return row_of


def _classes(content: dict[str, Any], path: str) -> tuple[dict[Any, str], str | None]:
    """(name of each category id, name of a group that is left out). Raises DataError for a duplicate.

    Roboflow lists its project as a first category, the supercategory of the others, without annotations: no class.
    """
    used = {annotation["category_id"] for annotation in content["annotations"]}
    groups = {category.get("supercategory"): category["id"] for category in content["categories"]}
    name_of: dict[Any, str] = {}
    id_of: dict[str, Any] = {}
    group = None
    for category in content["categories"]:
        number, name = category["id"], category["name"]
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: category {number!r} has the name {name!r}: give it a text")
        is_group = category.get("supercategory") == "none" and groups.get(name, number) != number
        if is_group and number not in used:
            group = name
            continue
        if name in id_of or number in name_of:
            other = f"categories {id_of[name]!r} and {number!r}" if name in id_of else f"category {number!r} twice"
            raise DataError(f"{path} has {other}, named {name!r}: give each category its own id and name")
        name_of[number], id_of[name] = name, number
    if not name_of:
        raise DataError(f"{path} has no category: {_HINT}")
    return name_of, group


def _find_images(root: str, file: str, names: Sequence[str]) -> tuple[str | None, list[str]]:
    """(folder below `root` with images that `file` names, None if there is none; the file of each image, "" for none).

    Looks for the first images, next to the file and where tools put them, then for any file of the same name.
    """
    here, split = posixpath.dirname(file), split_name(file)
    places = ("", "images", "data", split, f"images/{split}", f"{split}/images")
    bases = (here, posixpath.dirname(here), "")
    folders = list(dict.fromkeys(f"{base}/{place}".strip("/") for base in bases for place in places))
    for name in names[:_TRIED]:
        for folder in folders:
            path = path_below(root, folder, name)
            if path is not None and storage.exists(storage.join(root, path)):
                paths = [path_below(root, folder, each) or "" for each in names]
                top = posixpath.commonpath([posixpath.dirname(each) for each in paths if each])
                existing = {posixpath.join(top, each) for each in storage.list_files(storage.join(root, top))}
                return folder, [each if each in existing else "" for each in paths]
    nothing = [""] * len(names)
    keys = {label_key(name, "name") for name in names}
    for folder in folders:
        if any(is_image(path) and file_key(path, "name") in keys for path in list_some(storage.join(root, folder))):
            return folder, nothing
    return None, nothing


def _describe(found: _Labels, files: Sequence[str], *, complete: bool, is_lvis: bool) -> str:
    labeled = len(set(found.image))
    states = {state: found.state.count(state) for state in ("1", "0", "")}
    parts = [
        f"{'LVIS' if is_lvis else 'COCO'} JSON",
        ", ".join(files) if len(files) < 4 else f"{len(files)} files",
        f"{len(found.names):,} images ({len(found.names) - labeled:,} without labels)",
        f"{len(found.classes):,} classes",
        f"{states['1']:,} positive",
        *([f"{states['0']:,} negative, {states['']:,} unobserved"] if is_lvis else []),
        f"unlisted classes {'negative' if complete else 'unobserved'}",
    ]
    return ", ".join(parts)
