"""From a source's records to one label table per split: splits, keys, classes and unlisted labels."""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml.errors import DataError, LabelError
from paml.labels import LabelSettings, LabelTable
from paml.labels.build import LabelReport, build_from_batches
from paml.labels.class_list import ClassList, read_class_list, write_class_list
from paml.labels.edit import check_outputs
from paml.labels.rejects import HEADER, rejects_path_of
from paml.labels.stratify import stratified_split
from paml.sources.matching import check_distinct, label_key
from paml.sources.parts import KeyRule
from paml.sources.records import Records
from paml.sources.splits import standard_split

_SCHEMA = pa.schema([(name, pa.string()) for name in HEADER])
_BATCH_ROWS = 1 << 16
_MATRIX_CELLS = 1 << 24
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class SplitRecords:
    """The images of one split, and their labels."""

    records: Records
    rows: np.ndarray
    """int64[n], ascending: the images of the split in `records.images`."""
    keys: list[str]
    """The keys of these images."""
    unlisted: str
    """`negative` or `unobserved`: the state of a pair that is not listed."""
    divided: bool = False
    """Whether paml chose the images of this split, so that no folder of images is for it alone."""
    bad_rows: Sequence[tuple[int, str]] = ()
    """Rows that are not labels, to be reported with this split."""

    @property
    def names(self) -> list[str]:
        """The images as the source names them."""
        return [self.records.images[int(row)] for row in self.rows]

    @property
    def files(self) -> list[str] | None:
        """Their paths below `records.folder`, "" for unknown ones; None if the source names none."""
        files = self.records.files
        chosen = [] if files is None else [files[int(row)] for row in self.rows]
        return chosen if any(chosen) else None


def split_names(records: Records, names: Mapping[str, str]) -> list[str] | None:
    """The split of each image, by the user's `names` (of the source's split for one of ours) or their usual aliases.

    None if the source has no splits. Raises DataError for a name that means no split, unless the user names some, and
    if two names mean the same split.
    """
    if records.splits is None or not any(records.splits):
        return None
    distinct = sorted({name for name in records.splits if name})
    ours = {theirs: split for split, theirs in names.items()}
    unknown = [theirs for theirs in ours if theirs not in distinct]
    if unknown:
        raise DataError(f"{records.path!r} has no split {unknown[0]!r}: it has {', '.join(distinct)}; set split_names")
    split_of = {name: ours.get(name) or standard_split(name) for name in distinct}
    split_of = {name: None if name not in ours and split in names else split for name, split in split_of.items()}
    unnamed = [name for name, split in split_of.items() if split is None]
    if unnamed and not ours:
        raise DataError(
            f"{records.path!r} has the splits {', '.join(distinct)}; {unnamed[0]!r} is none of train, validation and "
            "test: name one for each with split_names, such as '{train: " + unnamed[0] + "}'"
        )
    chosen = Counter(split for split in split_of.values() if split)
    if twice := [split for split, count in chosen.items() if count > 1]:
        both = [name for name, split in split_of.items() if split == twice[0]]
        raise DataError(
            f"{records.path!r} has several splits for {twice[0]}: {', '.join(both)}; choose with split_names, such as "
            f"'{{{twice[0]}: {both[0]}}}'"
        )
    return [split_of.get(name) or "" for name in records.splits]


def make_keys(records: Records, rule: KeyRule) -> list[str]:
    """The key of each image. Raises DataError if two images have the same key."""
    if records.keys is not None:
        return list(records.keys)
    if records.parts is not None:
        return list(records.images)
    keys = [label_key(name, rule) for name in records.images]
    check_distinct(records.images, keys, records.path, rule)
    return keys


def divide(
    records: Records,
    keys: Sequence[str],
    rows: np.ndarray,
    classes: ClassList,
    fractions: Mapping[str, float],
    seed: int,
) -> dict[str, np.ndarray]:
    """`rows` by split: a sample stratified by class, the same for the same images, labels and seed."""
    row_keys = [keys[row] for row in rows.tolist()]
    cls, state = _codes(records, classes)
    chosen = np.flatnonzero(np.isin(records.image, rows) & (cls >= 0) & (state >= 0))
    image_keys = pa.array(keys, pa.string()).take(pa.array(records.image[chosen]))
    table = LabelTable.from_arrays(
        image_keys, cls[chosen], state[chosen], classes=classes.classes, images=row_keys, conflict="negative"
    )
    part = stratified_split(table, list(fractions.values()), seed)[table.require_rows(row_keys)]
    return {name: rows[part == number] for number, name in enumerate(fractions)}


def find_classes(all_records: Sequence[Records], class_list: str | None) -> ClassList:
    """The classes of all splits: those of `class_list`, of the sources in their order, or all labels', sorted."""
    if class_list is not None:
        listed = read_class_list(class_list)
        return listed._replace(classes=[normalize_class(cls) for cls in listed.classes])
    names: dict[str, str] = {}
    if all(records.classes is not None for records in all_records):
        for records in all_records:
            if records.classes is not None:
                for cls, name in zip(records.classes.classes, records.classes.names, strict=True):
                    names.setdefault(normalize_class(cls), normalize_class(name))
    else:
        distinct = {normalize_class(cls) for records in all_records for cls in _distinct(records.cls)}
        names = {cls: cls for cls in sorted(distinct - {""})}
    if not names:
        raise LabelError(f"{all_records[0].path!r} has no class: {all_records[0].understood}")
    return ClassList(all_records[0].path, list(names), list(names.values()))


def write_table(
    split: SplitRecords, classes: ClassList, out: str, settings: LabelSettings, log: Callable[[str], None]
) -> LabelReport:
    """Write the table of a split, its class list and its rejects; log the values that were not understood."""
    class_list = out.removesuffix(".arrow") + ".classes.csv"
    check_outputs([out, class_list, rejects_path_of(out)], [split.records.path, classes.path])
    write_class_list(class_list, classes.classes, classes.names)
    _log_rejected_values(split, log)
    if split.unlisted != "negative" and not _has_label(split):
        raise DataError(f"{split.records.path!r} has no label that is positive or negative for this split's images")
    report = build_from_batches(
        split.records.path, _batches(split, classes), [text for _, text in split.bad_rows], classes, out,
        settings=settings,
    )  # fmt: skip
    log(str(dataclasses.replace(report, first_text_key=None)))
    if split.bad_rows:
        log(f"  rejected: {split.bad_rows[0][1]}")
    return report


def check_scorable(name: str, table: LabelTable) -> None:
    """Raise DataError if no class of an evaluation split has both a positive and a negative label."""
    positives, negatives = table.class_counts()
    if ((positives > 0) & (negatives > 0)).any():
        return
    fix = f"it has {table.num_images:,} images: give it more, or leave it out of splits"
    if not negatives.any():
        fix = f"if its labels are complete, set unlisted to '{{{name}: negative}}', else leave it out of splits"
    raise DataError(
        f"{name} cannot be scored: no class has both positive and negative labels there ({int(positives.sum()):,} "
        f"positive, {int(negatives.sum()):,} negative); {fix}"
    )


def check_disjoint(keys: Mapping[str, Sequence[str]]) -> None:
    """Raise DataError if an image is in two splits: the score would be that of known images."""
    split_of: dict[str, str] = {}
    pairs = [(key, split) for split, names in keys.items() for key in names]
    shared = [(key, split_of[key], split) for key, split in pairs if split_of.setdefault(key, split) != split]
    if shared:
        key, first, second = shared[0]
        raise DataError(
            f"{len(shared):,} images are in two splits, such as {key!r} in {first} and {second}: remove them from one"
        )


def _batches(split: SplitRecords, classes: ClassList) -> Iterator[pa.RecordBatch]:
    """The labels of a split in the columns of HEADER: the listed ones, then those that the rule fills in."""
    records = split.records
    position = np.full(len(records.images), -1, np.int64)
    position[split.rows] = np.arange(len(split.rows))
    keys = pa.array(split.keys, pa.string())
    chosen = np.flatnonzero((position[records.image] >= 0) & (_index_of(records.state, [""]) < 0))
    translate = class_translator(classes)
    cls, state = _map_distinct(records.cls, translate), _decoded(records.state)
    for start in range(0, len(chosen), _BATCH_ROWS):
        part = chosen[start : start + _BATCH_ROWS]
        if records.row is None:
            source: pa.Array = pa.repeat("label", len(part))
        else:
            numbers = pa.array(records.row[part]).cast(pa.string())
            source = pc.call_function("binary_join_element_wise", [pa.scalar("row"), numbers, pa.scalar(" ")])
        image = keys.take(pa.array(position[records.image[part]]))
        columns = [image, source, cls.take(pa.array(part)), state.take(pa.array(part))]
        yield pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
    if split.unlisted == "negative":
        index, _ = _codes(records, classes)
        listed = (position[records.image] >= 0) & (index >= 0)
        labeled = np.ones(len(keys), bool) if records.unlabeled is None else ~records.unlabeled[split.rows]
        yield from _negatives(keys, labeled, position[records.image[listed]], index[listed], classes)


def _negatives(
    keys: pa.Array, labeled: np.ndarray, image: np.ndarray, cls: np.ndarray, classes: ClassList
) -> Iterator[pa.RecordBatch]:
    """A NEGATIVE label for each pair of the labeled images, bool[n], but the listed pairs (image, cls)."""
    names = pa.array(classes.classes, pa.string())
    order = np.argsort(image, kind="stable")
    image, cls = image[order], cls[order]
    step = max(1, _MATRIX_CELLS // len(names))
    for start in range(0, len(keys), step):
        stop = min(start + step, len(keys))
        first, last = np.searchsorted(image, [start, stop])
        unlisted = np.repeat(labeled[start:stop, None], len(names), axis=1)
        unlisted[image[first:last] - start, cls[first:last]] = False
        rows, columns = np.nonzero(unlisted)
        arrays = [
            keys.take(pa.array(rows + start)), pa.repeat("unlisted", len(rows)), names.take(pa.array(columns)),
            pa.repeat("0", len(rows)),
        ]  # fmt: skip
        yield pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _log_rejected_values(split: SplitRecords, log: Callable[[str], None]) -> None:
    """Show the cells whose text is not a state, with their counts and what is allowed."""
    states = split.records.state.filter(pa.array(_in_split(split))).value_counts()
    counts = dict(zip(states.field("values").to_pylist(), states.field("counts").to_pylist(), strict=True))
    bad = Counter({text: count for text, count in counts.items() if text not in ("1", "0", "")})
    if bad:
        shown = ", ".join(f"{text!r} ({count:,})" for text, count in bad.most_common(_SHOWN))
        log(
            f"WARNING: {bad.total():,} labels have a value that is not a state and were rejected: {shown}. Allowed are "
            "1 or yes, 0 or no, and blank for unobserved; to accept others, set table.minus_one, table.positive_words "
            "or the same settings of another source"
        )


def _in_split(split: SplitRecords) -> np.ndarray:
    """bool[M]: which labels are of images of the split."""
    chosen = np.zeros(len(split.records.images), bool)
    chosen[split.rows] = True
    return chosen[split.records.image]


def _has_label(split: SplitRecords) -> bool:
    return bool((_index_of(split.records.state, ["0", "1"])[_in_split(split)] >= 0).any())


def _codes(records: Records, classes: ClassList) -> tuple[np.ndarray, np.ndarray]:
    """(index of the class or -1, state 1 or 0 or -1) of each label, both int64[M]."""
    cls = _index_of(_map_distinct(records.cls, class_translator(classes)), classes.classes)
    return cls, _index_of(records.state, ["0", "1"])


def _index_of(texts: pa.Array, allowed: Sequence[str]) -> np.ndarray:
    """int64[n]: the index of each text among `allowed`, or -1."""
    index = pc.call_function("index_in", [_decoded(texts)], pc.SetLookupOptions(pa.array(allowed, pa.string())))
    return index.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _decoded(texts: pa.Array) -> pa.Array:
    return texts.cast(pa.string())


def _distinct(texts: pa.Array) -> set[str]:
    return set(texts.unique().cast(pa.string()).to_pylist())


def _map_distinct(texts: pa.Array, change: Callable[[str], str]) -> pa.Array:
    """`change` of each text, called once per distinct text."""
    coded = texts if pa.types.is_dictionary(texts.type) else texts.dictionary_encode()
    return pa.array([change(text) for text in coded.dictionary.to_pylist()], pa.string()).take(coded.indices)


def normalize_class(name: str) -> str:
    """A class in Unicode's composed form, without blanks around it."""
    return unicodedata.normalize("NFC", name).strip()


def class_translator(class_list: ClassList) -> Callable[[str], str]:
    """A function from a class or its name to the class; other texts are unchanged, to be rejected."""
    classes = set(class_list.classes)
    classes_of: dict[str, list[str]] = {}
    for cls, name in zip(class_list.classes, class_list.names, strict=True):
        classes_of.setdefault(name, []).append(cls)

    def translate(text: str) -> str:
        text = normalize_class(text)
        named = classes_of.get(text, [])
        if text in classes or not named:
            return text
        if len(named) > 1:
            raise LabelError(
                f"{len(named)} classes are named {text!r} ({', '.join(named)}): use the class, not its name"
            )
        return named[0]

    return translate
