"""Build a label table from annotation CSV files of Open Images (V3 to V7), or from batches of rows.

Memory is O(annotations): a row takes 10 bytes until it is resolved. Every row becomes a label of the table or is
counted by kind and written to the rejects file next to it.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from paml import storage
from paml.errors import LabelError
from paml.labels.annotations import open_annotation_file, read_annotations
from paml.labels.class_list import ClassList, read_class_list
from paml.labels.collect import LabelCollector
from paml.labels.edit import check_outputs
from paml.labels.rejects import REJECT_KINDS, RejectsWriter, describe_source, format_counts, rejects_path_of
from paml.labels.resolve import CONFLICT_RULES, ConflictRule, check_conflict_rule
from paml.labels.table import LabelTable
from paml.labels.table_file import make_contents


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How label files become a table."""

    conflict: ConflictRule = "negative"
    """State of a pair that is labeled both 1 and 0: `negative`, `positive`, `drop` (unobserved) or `error` (stop).
    Recorded in the table."""
    image_ids: Literal["auto", "hex"] = "auto"
    """`hex` rejects ImageIDs other than 16 lower-case hex digits as malformed rows. `auto` accepts any name and stores
    all keys as text (20 bytes per image instead of 8) if one is not hex."""
    threads: int = 0
    """Threads that parse and sort; 0 uses all cores available to this process."""

    def __post_init__(self) -> None:
        check_conflict_rule(self.conflict)
        if self.image_ids not in ("auto", "hex"):
            raise LabelError(f"image_ids is {self.image_ids!r}, allowed are auto and hex")
        if self.threads < 0:
            raise LabelError(f"threads is {self.threads}, allowed is 0 (all cores) or more: set 0")


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """What a build did. `rows` = labels of `table` + the sum of `rejected`."""

    table: LabelTable
    """The table, opened."""
    rejects_path: str
    """The rejected rows (Parquet), with kind, file and content."""
    rows: int
    """Rows of all files, without headers and empty lines."""
    unnamed_classes: int
    """Classes without a description, which are named by their MIDs."""
    rejected: dict[str, int]
    """Rejected rows by kind, for every one of REJECT_KINDS."""
    conflicting_pairs: int
    """(image, class) pairs that were both 1 and 0."""
    unknown_classes: tuple[tuple[str, int], ...]
    """Classes that are not in the class list, with their rows, the most frequent first."""
    suffixes_cut: int
    """Rows whose ImageID had the suffix of a JPEG file, which was cut off."""
    first_text_key: str | None
    """The first ImageID that is not 16 lower-case hex digits: all keys are then text."""

    def __str__(self) -> str:
        lines = [
            str(self.table),
            f"{self.rows:,} rows read, {sum(self.rejected.values()):,} rejected: " + format_counts(self.rejected),
        ]
        if self.conflicting_pairs:
            lines.append(
                f"{self.conflicting_pairs:,} contradicting pairs: {CONFLICT_RULES[self.table.metadata['conflict']]}"
            )
        if self.unknown_classes:
            first = ", ".join(f"{mid} ({count:,})" for mid, count in self.unknown_classes[:5])
            lines.append(f"{len(self.unknown_classes):,} classes are not in the class list, most often {first}")
        if self.unnamed_classes:
            lines.append(f"{self.unnamed_classes:,} classes have no description and are named by their MIDs")
        if self.suffixes_cut:
            lines.append(f"{self.suffixes_cut:,} rows have an ImageID with .jpg, which was cut off")
        if self.first_text_key is not None:
            lines.append(f"keys are stored as text, because {self.first_text_key!r} is not 16 lower-case hex digits")
        if any(self.rejected.values()):
            lines.append(f"the rejected rows are in {self.rejects_path}")
        return "\n".join(lines)


def build_label_table(
    annotations: str | Sequence[str],
    classes: str,
    out: str,
    *,
    descriptions: str | None = None,
    settings: LabelSettings | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> LabelReport:
    """Read annotation files and write the label table `out` and, next to it, `<out stem>.rejects.parquet`.

    annotations: CSV files with header `ImageID,Source,LabelName,Confidence` (`annotations-human.csv` of V3,
    `*-human-imagelabels.csv` of V4 to V7, with or without the prefixes oidv6- and oidv7-); Confidence is 1 or 0.
    classes: one MID per line (`classes-trainable.txt`), or a class CSV whose first column is the MID; its order is
    the order of the class indices. descriptions: class CSV of MID and name, with or without a header.
    progress: called with (file, rows read so far).

    Raises LabelError for a missing or empty file, a wrong header, no usable row, or, by rule, a contradiction;
    StorageError for files that cannot be read or written.
    """
    settings = settings or LabelSettings()
    paths = [annotations] if isinstance(annotations, str) else list(annotations)
    if not paths:
        raise LabelError("there are no annotation files: name at least one")
    if len(set(paths)) != len(paths):
        repeated = next(path for path in paths if paths.count(path) > 1)
        raise LabelError(
            f"annotation file {repeated!r} is listed twice: all its rows would be duplicates, name it once"
        )
    check_outputs([out, rejects_path_of(out)], [*paths, classes, *([descriptions] if descriptions else [])])
    class_list = read_class_list(classes, descriptions)
    files = [open_annotation_file(path) for path in paths]
    with RejectsWriter(rejects_path_of(out)) as rejects, ThreadPoolExecutor(1, "paml-digests") as pool:
        # Hashing releases the interpreter lock, so it runs while the files are parsed.
        digests = pool.submit(
            lambda: [describe_source(file.path, file.local) for file in files] + [describe_source(classes)]
        )
        collector, suffixes_cut = LabelCollector(class_list, settings.image_ids, rejects), 0
        for file in files:
            on_rows = functools.partial(progress or (lambda path, rows: None), file.path)
            suffixes_cut += read_annotations(file, collector, _threads_of(settings), on_rows)
        return _write(out, paths, collector, settings, digests.result(), suffixes_cut)


def build_from_batches(
    path: str,
    batches: Iterable[pa.RecordBatch],
    bad_lines: Sequence[str],
    class_list: ClassList,
    out: str,
    *,
    settings: LabelSettings | None = None,
) -> LabelReport:
    """As `build_label_table`, from batches of rows with string columns ImageID, Source, LabelName and Confidence.

    path: the file of the rows, for messages and rejects. bad_lines: lines of it that are not rows, with the reason;
    read after the last batch.
    """
    settings = settings or LabelSettings()
    with RejectsWriter(rejects_path_of(out)) as rejects:
        collector = LabelCollector(class_list, settings.image_ids, rejects)
        for batch in batches:
            collector.add_batch(path, batch)
        collector.add_bad_lines(path, list(bad_lines))
        is_file = storage.exists(path) and not os.path.isdir(path)
        return _write(out, [path], collector, settings, [describe_source(path)] if is_file else [])


def _threads_of(settings: LabelSettings) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return settings.threads or cores


def _write(
    out: str,
    paths: Sequence[str],
    collector: LabelCollector,
    settings: LabelSettings,
    sources: list[dict[str, Any]],
    suffixes_cut: int = 0,
) -> LabelReport:
    """Resolve the collected labels, write the table and report."""
    rejects, class_list = collector.rejects, collector.class_list
    if collector.count == 0:
        raise LabelError(_no_usable_row(paths, collector))
    rows = collector.rows
    resolved, stored = collector.resolve(settings.conflict, _threads_of(settings))
    rejects.add_labels("duplicate", stored, resolved.duplicates, class_list.classes)
    rejects.add_labels("contradiction", stored, resolved.contradictions, class_list.classes)
    rejected = {kind: rejects.counts[kind] for kind in REJECT_KINDS}
    about = {
        "rows": rows,
        "rejected": rejected,
        "conflict": settings.conflict,
        "conflicting_pairs": resolved.conflicting_pairs,
        "sources": sources,
    }
    contents = make_contents(
        stored(resolved.keys), resolved.offsets, resolved.codes, class_list.classes, class_list.names, about
    )
    table = LabelTable(contents).write(out)
    return LabelReport(
        table=table,
        rejects_path=rejects_path_of(out),
        rows=rows,
        unnamed_classes=class_list.unnamed,
        rejected=rejected,
        conflicting_pairs=resolved.conflicting_pairs,
        unknown_classes=tuple(collector.unknown_classes.most_common()),
        suffixes_cut=suffixes_cut,
        first_text_key=collector.first_text_key,
    )


def _no_usable_row(paths: Sequence[str], collector: LabelCollector) -> str:
    message = f"no usable row in {', '.join(repr(path) for path in paths[:3])}: "
    counts, class_list = collector.rejects.counts, collector.class_list
    if not counts:
        return message + "there is no row after the header: download the file again"
    message += f"{counts.total():,} rows read, all rejected ({format_counts(counts)}). "
    if counts["unknown_class"] == counts.total():
        return message + (
            f"The files have classes such as {collector.unknown_classes.most_common(1)[0][0]!r}, the class list "
            f"{class_list.path!r} such as {class_list.classes[0]!r}: use the class list of the same release"
        )
    if counts["malformed_confidence"]:
        return message + (
            f"Confidence must be 1 or 0, one row is {collector.examples['malformed_confidence']!r}: machine-generated "
            "labels have fractions; use the human-verified ones"
        )
    return message + "A row is `ImageID,Source,LabelName,Confidence`: fix the files"
