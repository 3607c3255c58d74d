"""Tar files that hold images and their labels, as WebDataset's samples.

A sample is the members of a tar file whose names are equal up to the first dot after the folders: `a/7.jpg`, `a/7.cls`.
Format: https://github.com/webdataset/webdataset#the-webdataset-format
"""

import io
import itertools
import posixpath
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import numpy as np
import pyarrow as pa

from paml import storage
from paml.errors import DataError, PamlError, check_setting
from paml.labels.class_list import ClassList
from paml.parsing import PARSE_ERRORS
from paml.sources.folder import is_image
from paml.sources.full import list_some
from paml.sources.matching import normalize_name
from paml.sources.records import Records
from paml.sources.splits import file_splits
from paml.sources.table_settings import TableSettings
from paml.sources.tars import TAR_SUFFIXES, BadMember, Member, TarDamage, list_tars, open_tar, tar_part, walk_tar
from paml.sources.webdataset_labels import (
    LabelParser,
    LabelResolver,
    Labels,
    comparable,
    is_number,
    read_class_names,
)

_ENDINGS = ("cls", "json", "txt")
_MAX_LABEL_BYTES = 1 << 24
_DETECT_MEMBERS = 64
_SHOWN = 8
_Sample = tuple[int, str]
"""(number of the tar file, key)"""


@dataclass(frozen=True, kw_only=True)
class WebDatasetSettings:
    """The source `webdataset`."""

    labels: str | None = None
    """Ending of the members with labels, such as cls, json, txt or meta.json; null: cls or json, else txt. Members
    other than JSON hold class numbers or names, one per line or joined by `separator`."""
    field: str | None = None
    """Field of the JSON with the labels; null: the first of labels, classes, tags, categories, label and class. Its
    value is a list, a class, a map from class to 1, 0 or -1, or lists named positive and negative."""
    image: str | None = None
    """Ending of the images, such as jpg or rgb.png; null: image suffixes without another dot before them."""
    separator: str | None = None
    """What joins the classes of a text, such as `|`; or `blank`, or `none` (a text is one class); null: detected if it
    is unambiguous."""
    minus_one: str | None = None
    """What -1 means: `negative`, `unobserved` or `positive`; null: -1 is rejected."""

    def __post_init__(self) -> None:
        for name in ("labels", "field", "image", "separator"):
            check_setting(getattr(self, name) != "", f"webdataset.{name}", "", "a text or null")
        states = ("negative", "unobserved", "positive")
        allowed = self.minus_one is None or self.minus_one in states
        check_setting(allowed, "webdataset.minus_one", self.minus_one, f"null, {', '.join(states)}")

    @property
    def label_endings(self) -> tuple[str, ...]:
        """The endings of members with labels, in lower case."""
        if self.labels is None:
            return _ENDINGS if self.field is None else ("json",)
        return (self.labels.lower().lstrip("."),)

    @property
    def image_ending(self) -> str | None:
        """`image` in lower case."""
        return None if self.image is None else self.image.lower().lstrip(".")


def detect_webdataset(labels: str) -> str | None:
    """Whether the first tar file has an image and a member with labels of one name."""
    try:
        is_tar = labels.endswith(TAR_SUFFIXES) and storage.exists(labels)
        tars = [labels] if is_tar else [storage.join(labels, n) for n in list_some(labels) if n.endswith(TAR_SUFFIXES)]
        if not tars:
            return None
        with io.BufferedReader(cast(io.RawIOBase, storage.open_input(tars[0])), 1 << 14) as file:
            members = itertools.islice(walk_tar(file, tars[0]), _DETECT_MEMBERS)
            names = [normalize_name(member.name) for member in members if not _is_hidden(member.name)]
    except (PamlError, OSError, EOFError, zlib.error, *PARSE_ERRORS):
        return None
    for last_dot in (False, True):
        images = {_split_name(name, last_dot)[0] for name in names if is_image(name)}
        others = [_split_name(name, last_dot) for name in names if not is_image(name)]
        endings = sorted({ending for key, ending in others if key in images and ending in _ENDINGS})
        if endings:
            return f"tar files with images and .{' and .'.join(endings)}, such as {posixpath.basename(tars[0])}"
    return None


def read_webdataset(labels: str, images: str | None, settings: WebDatasetSettings) -> Records:
    """The labels inside the tar files of a folder, or of one tar file; their images are `parts`.

    Raises DataError for tar files without labels, samples with several images, members of a sample that differ, and
    texts whose separator is not certain.
    """
    paths = list_tars(labels)
    root = posixpath.dirname(labels) or "." if paths == [labels] else labels.rstrip("/")
    below = [path.removeprefix(root).lstrip("/") for path in paths]
    names, names_file = read_class_names(root)
    found = _Members(settings)
    for number, path in enumerate(paths):
        found.add_tar(number, path)
    samples = _choose_samples(found)
    values = samples.choose_labels(labels, settings, names)
    order = list(samples.images)
    labeled = [sample for sample in order if values.get(sample) is not None]
    if not labeled:
        raise DataError(_no_labels(labels, found, samples))
    resolver = LabelResolver(labels, [values[sample] for sample in labeled], found.parser, settings.separator, names)
    image, cls, state = [], [], []
    for number, sample in enumerate(order):
        for pair in dict.fromkeys(resolver.pairs(values.get(sample))):
            image.append(number)
            cls.append(pair[0])
            state.append(pair[1])
    classes = resolver.classes if names else _sorted_classes(labels, cls)
    repeated = next((key for key, count in Counter(key for _, key in order).items() if count > 1), None)
    prefixes = ["" if repeated is None else f"{_without_suffix(name)}/" for name in below]
    rules = [partial(_sample_key, samples.last_dot, tuple(sorted(samples.endings)), prefix) for prefix in prefixes]
    splits = file_splits(below)
    notes = _notes(found, samples, resolver, len(order) - len(labeled))
    if names_file is not None:
        notes.append(f"names of classes: {names_file}")
    elif any(map(is_number, classes.classes)):
        notes.append("classes are numbers: name them in a file classes.txt next to the tar files, one per line")
    if repeated is not None:
        notes.append(f"keys repeat in several tar files, such as {repeated!r}: the file's name is put before them")
    if "-1" in state:
        notes.append(f"{state.count('-1'):,} labels are -1 and are rejected: set webdataset.minus_one to what it means")
    if images is not None:
        notes.append(f"images {images!r} is not used, because the images are in the tar files")
    orphans = [sample for sample in values if values[sample] is not None and sample not in samples.images]
    lost = [f"labels without an image: {key!r} in {paths[tar]}" for tar, key in orphans]
    return Records(
        path=labels,
        understood=f"WebDataset, {len(paths):,} tar files, {len(order):,} images, {len(classes.classes):,} classes, "
        f"{len(cls):,} labels in {samples.described()} ({state.count('1'):,} positive, {state.count('0'):,} negative)",
        images=[prefixes[tar] + key for tar, key in order],
        image=np.array(image, np.int64),
        cls=pa.array(cls, pa.string()).dictionary_encode(),
        state=pa.array(state, pa.string()).dictionary_encode(),
        splits=[splits[tar] for tar, _ in order] if any(splits) else None,
        classes=classes,
        parts=[tar_part(path, rule, str(rule.args)) for path, rule in zip(paths, rules, strict=True)],
        part_splits=splits if any(splits) else None,
        bad_rows=list(enumerate([*found.bad, *samples.bad, *lost], 1)),
        notes=notes,
    )


def _without_suffix(name: str) -> str:
    return next(name.removesuffix(suffix) for suffix in TAR_SUFFIXES if name.endswith(suffix))


def _is_hidden(name: str) -> bool:
    """Whether it is a file of an operating system (`._a.jpg`), or WebDataset's own (`__index__`)."""
    base = posixpath.basename(normalize_name(name))
    return base.startswith(".") or (base.startswith("__") and base.endswith("__"))


def _split_name(name: str, last_dot: bool) -> tuple[str, str]:
    """(key, ending in lower case) of a member's normalized name."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.rpartition(".") if last_dot else base.partition(".")
    return folder + slash + stem, ending.lower()


def _sample_key(last_dot: bool, endings: Sequence[str], prefix: str, name: str) -> str | None:
    """The key of a sample, from the name of its image; None for other members."""
    key, ending = _split_name(normalize_name(name), last_dot)
    return prefix + key if ending in endings and not _is_hidden(name) else None


@dataclass
class _Members:
    """The images and labels in the tar files, in their order."""

    settings: WebDatasetSettings
    images: list[tuple[int, str]] = field(default_factory=list)
    """(number of the tar file, normalized name)"""
    labels: list[tuple[int, str, Labels]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    """Other members by the ending of their name."""
    bad: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        table = TableSettings(minus_one=self.settings.minus_one)
        self.parser = LabelParser(self.settings.field, table.state_of)

    def add_tar(self, number: int, path: str) -> None:
        """Read the labels of a tar file and skip its images. Damage is recorded, and ends it."""
        endings = tuple(f".{ending}" for ending in self.settings.label_endings)
        image = None if self.settings.image is None else f".{self.settings.image_ending}"
        try:
            with open_tar(path) as file:
                for member in walk_tar(file, path):
                    name = normalize_name(member.name)
                    if _is_hidden(name):
                        self.others["hidden files"] += 1
                    elif name.lower().endswith(endings):
                        self.labels.append((number, name, self._read(member, name, path)))
                    elif is_image(name) or (image is not None and name.lower().endswith(image)):
                        self.images.append((number, name))
                    else:
                        self.others[_split_name(name, last_dot=False)[1] or "no suffix"] += 1
        except TarDamage as damage:
            self.bad.append(str(damage))

    def _read(self, member: Member, name: str, path: str) -> Labels:
        try:
            if member.size > _MAX_LABEL_BYTES:
                raise ValueError(f"it has {member.size:,} bytes, which is too much for labels")
            return self.parser.parse(member.read(), is_json=name.lower().endswith(".json"))
        except BadMember as error:
            self.bad.append(str(error))
        except (ValueError, OverflowError) as error:
            self.bad.append(f"{name!r} in {path}: {str(error)[:200]}")
        return None


@dataclass(kw_only=True)
class _Samples:
    """Images and labels by sample."""

    last_dot: bool
    """Whether keys end at the last dot of the name instead of the first."""
    endings: set[str]
    """The endings of images."""
    images: dict[_Sample, list[str]]
    """The endings of each sample's images."""
    labels: dict[_Sample, dict[str, Labels]]
    """By the ending of the member."""
    unread: Counter[str]
    """Other members with images or labels, by ending."""
    unread_labels: int
    bad: list[str]

    def problems(self) -> int:
        """Samples that have labels and no image, or several images, and labels that are not read."""
        several = sum(len(endings) > 1 for endings in self.images.values())
        return several + sum(sample not in self.images for sample in self.labels) + self.unread_labels

    def choose_labels(self, path: str, settings: WebDatasetSettings, names: Sequence[str]) -> dict[_Sample, Labels]:
        """What the chosen member of each sample with labels holds: `cls` or `json`, else `txt`.

        Raises DataError if the first two differ, and if a sample has several images.
        """
        several = [(sample, endings) for sample, endings in self.images.items() if len(endings) > 1]
        if several:
            (_, key), endings = several[0]
            raise DataError(
                f"{path!r} has {len(several):,} samples with several images, such as {key!r} (to the first dot) with "
                f"{', '.join(endings[:_SHOWN])}: set webdataset.image to the ending of one"
            )
        chosen: dict[_Sample, Labels] = {}
        for sample, labels in self.labels.items():
            values = [value for ending, value in labels.items() if ending != "txt" and value is not None]
            if len(values) > 1 and comparable(values[0], names) != comparable(values[1], names):
                raise DataError(
                    f"{path!r} has samples whose cls and json differ, such as {sample[1]!r}: {labels['cls']!r:.80}, "
                    f"{labels['json']!r:.80}: set webdataset.labels to cls or json"
                )
            chosen[sample] = values[0] if values else labels["txt"] if set(labels) == {"txt"} else None
        return chosen

    def described(self) -> str:
        """The members that labels were read from."""
        return " and ".join(sorted({f".{ending}" for labels in self.labels.values() for ending in labels}))


def _choose_samples(found: _Members) -> _Samples:
    """Samples by WebDataset's rule, or by the last dot if it fits more members: names such as `2024.01.jpg`."""
    first = _group(found, last_dot=False)
    if not first.problems() or found.settings.labels is not None or found.settings.image is not None:
        return first
    last = _group(found, last_dot=True)
    return last if last.problems() < first.problems() else first


def _group(found: _Members, *, last_dot: bool) -> _Samples:
    images: dict[_Sample, list[str]] = {}
    labels: dict[_Sample, dict[str, Labels]] = {}
    unread: Counter[str] = Counter()
    bad: list[str] = []
    split = [(tar, name, *_split_name(name, last_dot)) for tar, name in found.images]
    known = {ending for *_, ending in split}
    endings = {ending for ending in known if "." not in ending} or known
    if found.settings.image_ending is not None:
        endings = {found.settings.image_ending}
    for tar, name, key, ending in split:
        if ending not in endings:
            unread[ending] += 1
        elif ending in (others := images.setdefault((tar, key), [])):
            bad.append(f"two members are named {name!r}")
        else:
            others.append(ending)
    unread_images = unread.total()
    for tar, name, value in found.labels:
        key, ending = _split_name(name, last_dot)
        if ending not in found.settings.label_endings:
            unread[ending] += 1
        elif ending in (members := labels.setdefault((tar, key), {})):
            bad.append(f"two members are named {name!r}")
        else:
            members[ending] = value
    return _Samples(
        last_dot=last_dot, endings=endings, images=images, labels=labels, unread=unread, bad=bad,
        unread_labels=unread.total() - unread_images,
    )  # fmt: skip


def _sorted_classes(path: str, classes: Sequence[str]) -> ClassList:
    """The distinct classes: numbers in their order, then names."""
    order = sorted(set(classes), key=lambda cls: (0, int(cls), cls) if is_number(cls) else (1, 0, cls))
    return ClassList(path, order, order)


def _notes(found: _Members, samples: _Samples, resolver: LabelResolver, unlabeled: int) -> list[str]:
    parser, notes = found.parser, []
    if samples.last_dot:
        notes.append("keys end at the last dot of the names: up to the first dot, images would share one key")
    if unlabeled:
        notes.append(f"{unlabeled:,} images have no labels")
    if parser.fields:
        notes.append(f"labels of JSON are in the fields {_counted(parser.fields)}")
    if parser.unread_fields:
        notes.append(f"JSON fields that were not read: {_counted(parser.unread_fields)}; choose with webdataset.field")
    if parser.without_labels:
        notes.append(
            f"JSON without labels has the fields {_counted(parser.without_labels)}; choose with webdataset.field"
        )
    if unread := found.others + samples.unread:
        notes.append(f"members that were not read: {_counted(unread)}")
    if found.bad:
        notes.append(f"{len(found.bad):,} members or tar files could not be read, such as: {found.bad[0]}")
    if resolver.are_states:
        notes.append("the numbers are a state for each class, not class numbers")
    if resolver.below_zero:
        notes.append(f"{resolver.below_zero:,} class numbers below 0 were left out: they mean no class")
    return notes


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(_SHOWN))


def _no_labels(path: str, found: _Members, samples: _Samples) -> str:
    """Why no image has labels, with an example of each side."""
    if found.bad and not found.images:
        return found.bad[0]
    text = (
        f"{path!r} has no image with labels among {len(found.images):,} images and {len(found.labels):,} label members"
    )
    keys = [next((key for _, key in side), None) for side in (samples.images, samples.labels)]
    if None not in keys:
        text += f", such as the image {keys[0]!r} and the labels {keys[1]!r}"
    if found.bad:
        text += f"; {found.bad[0]}"
    unread = found.others + samples.unread
    if unread:
        text += f"; other members end in {_counted(unread)}"
    if found.parser.without_labels:
        text += f"; JSON has the fields {_counted(found.parser.without_labels)}"
    return f"{text}: set webdataset.labels to the ending of the members with labels, or webdataset.field to their field"
