"""PASCAL VOC's XML: the official trees, and those that LabelImg, CVAT and Roboflow write, with any classes.

The official tree is `VOC2012/{Annotations,ImageSets/Main,JPEGImages}`
(http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html).
"""

import posixpath
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from paml import storage
from paml.errors import DataError, check_setting
from paml.labels import POSITIVE
from paml.labels.class_list import ClassList
from paml.sources.fetch import read_concurrently
from paml.sources.folder import is_image
from paml.sources.full import check_below, distinct_names, list_inputs, list_some, read_lines, sniff
from paml.sources.matching import normalize_name
from paml.sources.records import RecordBuilder, Records
from paml.sources.splits import split_folder

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_ANNOTATIONS = ("annotations", "xml", "xmls")
_IMAGES = ("JPEGImages", "images", "Images", "")
_LISTS = "ImageSets/Main/"
_ANNOTATION = re.compile(rb"<annotation[\s>]")


@dataclass(frozen=True, kw_only=True)
class VocSettings:
    """The source `voc`."""

    difficult: str = "leave_out"
    """Objects marked as difficult: `leave_out`, as in the papers, so that they do not make their class present, or
    `positive`."""

    def __post_init__(self) -> None:
        kinds = ("leave_out", "positive")
        check_setting(self.difficult in kinds, "voc.difficult", self.difficult, " or ".join(kinds))


class _File(NamedTuple):
    """One XML file."""

    image: str
    """The content of <filename>, "" without one."""
    classes: list[str]
    """Of its objects, without difficult ones if they are left out."""
    unnamed: int
    """Objects without a name."""
    difficult: int
    """Difficult objects that are left out."""


def detect_voc(labels: str) -> str | None:
    """Whether a folder or its subfolders have XML files of VOC."""
    names = [name for name in list_some(labels) if name.endswith(".xml")]
    names = names or [f"{folder}Annotations/{name}" for folder, name in _deeper(labels) if name.endswith(".xml")]
    if any(_ANNOTATION.search(sniff(storage.join(labels, name))) for name in names[:5]):
        return f"XML annotations, such as {names[0]}"
    return None


def _deeper(labels: str) -> list[tuple[str, str]]:
    """(folder, name) of files in `*/Annotations`, as in VOCdevkit/VOC2012/Annotations."""
    folders = {f"{name.split('/')[0]}/" for name in list_some(labels) if "/" in name}
    return [(folder, name) for folder in sorted(folders)[:5] for name in list_some(f"{labels}/{folder}Annotations")]


def read_voc(labels: str, images: str | None, settings: VocSettings) -> Records:
    """The labels of all XML files of a folder; of an official tree, of those that a list of ImageSets/Main names.

    An image is labeled with the classes of its objects. The classes are VOC's 20 in their order if a tree with
    ImageSets has no others, else the names of the objects, sorted. Splits are the lists, or folders such as train and
    valid. Raises DataError for missing or broken files, and for an image in two lists.
    """
    names = list_inputs(labels)
    split_of, notes = _find_annotations(labels, names)
    builder, bad_rows = RecordBuilder(), []
    finder = _ImageFinder(names)
    difficult = 0
    folders: list[str] = []
    xml_of: dict[str, str] = {}

    def read(name: str) -> _File | None:
        return _read_file(storage.join(labels, name), leave_out=settings.difficult == "leave_out")

    for number, (name, content) in enumerate(read_concurrently(list(split_of), read), 1):
        if content is None:
            bad_rows.append((number, f"{name} is XML of another format, without <annotation>"))
            continue
        if content.unnamed:
            bad_rows.append((number, f"{name} has {content.unnamed} objects without a name"))
        file = finder.find(name, content.image)
        if file and xml_of.setdefault(file, name) != name:
            raise DataError(f"{labels}: {xml_of[file]} and {name} both label {file}: correct <filename> in one of them")
        image = posixpath.basename(file or normalize_name(content.image))
        image = image if is_image(image) else f"{_stem(name)}.jpg"
        builder.add_image(image, dict.fromkeys(content.classes, POSITIVE), row=number, split=split_of[name], file=file)
        folders.append(posixpath.dirname(file or name))
        difficult += content.difficult
    if not builder.images:
        raise DataError(
            f"{labels}: {bad_rows[0][1]}, and no other file has: set labels to the folder of VOC's XML files"
        )
    builder.images = distinct_names(builder.images, folders, builder.splits, labels)
    distinct = sorted(set(builder.cls))
    is_official = any(_LISTS in name for name in names) and set(distinct) <= set(CLASSES)
    classes = list(CLASSES) if distinct and is_official else distinct
    if difficult:
        notes.append(f"{difficult:,} difficult objects are left out (voc.difficult)")
    at = images is None and any(builder.files)
    if images is not None:
        builder.files = []
    elif not at:
        notes.append(f"no image was found in {labels}, such as {builder.images[0]!r}: set images")
    columns: dict[str, Any] = builder.columns()
    labeled = len(set(builder.image))
    return Records(
        path=labels,
        understood=f"VOC XML, {len(builder.images):,} images ({len(builder.images) - labeled:,} without objects), "
        f"{len(classes):,} classes, {len(builder.cls):,} positive, other classes absent",
        **columns,
        classes=ClassList(labels, classes, classes),
        complete=True,
        folder=labels if at else None,
        bad_rows=bad_rows,
        notes=notes,
    )


def _find_annotations(labels: str, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(split of each XML file to read, notes)."""
    files = {name for name in names if name.endswith(".xml")}
    if not files:
        raise DataError(f"{labels!r} has no XML file: set labels to the folder that has Annotations")
    lists = [name for name in names if _LISTS in f"/{name}" and name.endswith(".txt")]
    if not lists:
        split_of = {name: split_folder(name) for name in sorted(files)}
        has_splits = len(set(split_of.values()) - {""}) > 1 or "" not in split_of.values()  # `train` is also a class
        return (split_of if has_splits else dict.fromkeys(split_of, "")), []
    split_of, notes = {}, []
    for base in sorted({name[: name.index(_LISTS)] for name in lists}):
        of_base = {_stem(name): storage.join(labels, name) for name in lists if name.startswith(base + _LISTS)}
        listed = _read_lists(of_base, base, files)
        for split, members in _without_unions(listed, notes).items():
            for name in members:
                if split_of.setdefault(name, split) != split:
                    raise DataError(
                        f"{labels}: {_stem(name)!r} is in two lists of {base}{_LISTS[:-1]}, {split_of[name]}.txt and "
                        f"{split}.txt: remove it from one"
                    )
    if not split_of:
        raise DataError(f"the lists {', '.join(lists)} of {labels} name no image: unpack them again")
    if left := len(files - set(split_of)):
        notes.append(f"{left:,} of {len(files):,} XML files are in no list of ImageSets/Main and are left out")
    return split_of, notes


def _read_lists(paths: Mapping[str, str], base: str, files: set[str]) -> dict[str, list[str]]:
    """The XML files of each list that is a split. Lists of a class (`cat_train.txt`: image and 1, 0 or -1) are not."""
    listed: dict[str, list[str]] = {}
    for split, path in paths.items():
        lines = read_lines(path, "the image set")
        of_a_class = any(split.endswith(f"_{other}") for other in paths)
        if of_a_class and all(line.split()[-1] in ("1", "0", "-1") for line in lines):
            continue
        stems = [line if f"{base}Annotations/{line}.xml" in files else line.split()[0] for line in lines]
        check_below(base or ".", [f"{stem}.xml" for stem in stems], path)
        listed[split] = []
        for stem in stems:
            name = f"{base}Annotations/{stem}.xml"
            if name not in files:
                raise DataError(
                    f"there is no {name}, which {path} lists: unpack the annotations too, or remove the line"
                )
            listed[split].append(name)
    return listed


def _without_unions(listed: Mapping[str, Sequence[str]], notes: list[str]) -> dict[str, Sequence[str]]:
    """The lists that are not several others joined, as trainval is."""
    members = {split: set(names) for split, names in listed.items() if names}
    kept: dict[str, Sequence[str]] = {}
    for split, own in members.items():
        parts = [other for other, names in members.items() if names < own]
        if len(parts) > 1 and set().union(*(members[part] for part in parts)) == own:
            notes.append(f"the list {split} is {' and '.join(parts)} together and is left out")
        else:
            kept[split] = listed[split]
    return kept


class _ImageFinder:
    """Finds the image of an XML file among the files of the tree."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_stem: dict[str, list[str]] = {}
        for name in names:
            if is_image(name):
                self._by_stem.setdefault(posixpath.splitext(name)[0], []).append(name)
        self._files = {name for files in self._by_stem.values() for name in files}

    def find(self, xml: str, filename: str) -> str:
        """The file that <filename> names, next to the XML or in the folder of the images; else the one with the name
        of the XML; "" if there is none, or several."""
        folders = _image_folders(xml)
        base = posixpath.basename(normalize_name(filename))
        for folder in folders:
            if (path := posixpath.join(folder, base)) in self._files:
                return path
        for folder in folders:
            files = self._by_stem.get(posixpath.join(folder, _stem(xml)), [])
            if len(files) == 1:
                return files[0]
        return ""


def _image_folders(xml: str) -> list[str]:
    """The folders, below the root, that may have the image of an XML file."""
    here = posixpath.dirname(xml)
    parts = here.split("/")
    for index, part in enumerate(parts):
        if part.lower() in _ANNOTATIONS:
            siblings = [[*parts[:index], *([name] if name else []), *parts[index + 1 :]] for name in _IMAGES]
            return ["/".join(sibling) for sibling in siblings] + [here]
    return [here, posixpath.join(here, "images")]


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _read_file(path: str, *, leave_out: bool) -> _File | None:
    """The content of an XML file; None for another format. leave_out: without difficult objects."""
    try:
        tree = ElementTree.fromstring(storage.read_bytes(path))
    except FileNotFoundError:
        raise DataError(f"there is no {path}: unpack the annotations too") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # includes unknown encodings
        raise DataError(f"{path} is not a complete XML file ({error}): unpack it again") from error
    if tree.tag != "annotation":
        return None
    counts: Counter[str] = Counter()
    classes: dict[str, None] = {}
    for element in tree.findall("object"):
        name = (element.findtext("name") or "").strip()
        is_difficult = (element.findtext("difficult") or "0").strip() == "1"
        if not name:
            counts["unnamed"] += 1
        elif is_difficult and leave_out:
            counts["difficult"] += 1
        else:
            classes[name] = None
    filename = (tree.findtext("filename") or "").strip()
    return _File(filename, list(classes), counts["unnamed"], counts["difficult"])
