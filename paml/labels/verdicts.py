"""Merge verdicts on labels, exported from an audit page, into a new version of a label table.

A verdict file has the columns and states of `annotations-human.csv`: Confidence 1 for yes, 0 for no; skipped labels
have no row. A verdict replaces the table's label. If the files answer a pair both ways, the table's label stays.

The leading apostrophe that exported fields have against spreadsheet formulas (`paml.spreadsheet`) is removed.
"""

import csv
import io
import operator
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from paml import storage
from paml.errors import LabelError
from paml.labels.class_list import read_text
from paml.labels.edit import check_outputs, filter_labels, merge
from paml.labels.keys import as_strings
from paml.labels.rejects import HEADER, REJECTS_SCHEMA, describe_source, format_counts, rejects_path_of
from paml.labels.states import NEGATIVE, POSITIVE
from paml.labels.table import LabelTable
from paml.spreadsheet import unescape_formula

VERDICT_REJECT_KINDS = (
    *("malformed_row", "unknown_class", "malformed_confidence"),
    *("unknown_image", "duplicate", "contradiction"),
)
_STATES = {"1": POSITIVE, "1.0": POSITIVE, "0": NEGATIVE, "0.0": NEGATIVE}


@dataclass(frozen=True, kw_only=True)
class VerdictReport:
    """What the verdicts changed. `rows` = `added` + `overturned` + `confirmed` + the sum of `rejected`."""

    table: LabelTable
    """The new version, opened."""
    rejects_path: str
    """The rejected rows (Parquet), with kind, file, line and content."""
    rows: int
    """Rows of all files."""
    added: int
    """Verdicts on pairs that were unobserved."""
    overturned: int
    """Verdicts that replaced the table's label."""
    confirmed: int
    """Verdicts equal to the table's label."""
    rejected: dict[str, int]
    """Rejected rows by kind, for every one of VERDICT_REJECT_KINDS."""

    def __str__(self) -> str:
        lines = [
            f"label table {self.table.path}: {self.rows:,} verdicts read, {self.added:,} labels added, "
            f"{self.overturned:,} overturned, {self.confirmed:,} confirmed; {self.table.num_annotations:,} labels"
        ]
        if any(self.rejected.values()):
            lines.append(f"rejected: {format_counts(self.rejected)}; see {self.rejects_path}")
        return "\n".join(lines)


class _Verdict(NamedTuple):
    """One row of a verdict file."""

    file: str
    line: int
    fields: list[str]

    def reject(self, kind: str) -> dict[str, Any]:
        columns = dict(zip(HEADER, self.fields, strict=False))
        return {"kind": kind, "file": os.path.basename(self.file), "line": self.line, **columns}


def apply_verdicts(
    table: LabelTable, files: Sequence[str], out: str, *, images: Sequence[str] | pa.Array | None = None
) -> VerdictReport:
    """Write `table` with the verdicts of `files` to `out`; the table itself is not changed.

    files: CSV with the header ImageID,Source,LabelName,Confidence, local or s3://. images: keys that are valid in
    addition to the table's own, such as those of a manifest; an image with a verdict is then added to the table.
    Unusable rows are counted by kind and written to `<out stem>.rejects.parquet`: malformed rows, unknown classes and
    images, duplicates, and pairs answered both ways. Metadata of `out`: the table's digest, the files' names, sizes
    and SHA-256, the counts.
    Raises LabelError for no file, a missing one, one without a row, another header, no usable row, or an output that is
    an input.
    """
    if not files:
        raise LabelError("there are no verdict files: name at least one")
    rejects_path = rejects_path_of(out)
    check_outputs([out, rejects_path], [table.path, *files])
    verdicts = [verdict for path in files for verdict in _read_verdicts(path)]
    states, rejects = _one_per_pair(verdicts, table, images)
    with storage.replacing(rejects_path) as temporary:
        pq.write_table(pa.Table.from_pylist(rejects, REJECTS_SCHEMA), temporary, compression="zstd")
    if not states:
        raise LabelError(
            f"no usable verdict in {', '.join(map(repr, files))}: all {len(verdicts)} rows are rejected; the reasons "
            f"are in {rejects_path}. Use the files that the audit of this table's images exported"
        )
    keys, classes = zip(*states, strict=True)
    rows = table.rows_of(keys)
    pairs = rows * table.num_classes + np.array(classes)  # negative for an image that is not in the table
    labels = table.lookup(np.unique(rows[rows >= 0]))
    old_pairs = np.unique(rows[rows >= 0])[labels.image] * table.num_classes + labels.cls
    old_states = dict(zip(old_pairs.tolist(), labels.state.tolist(), strict=True))
    old = [old_states.get(pair) for pair in pairs.tolist()]
    added, confirmed = old.count(None), sum(map(operator.eq, old, states.values()))
    counts = {"added": added, "overturned": len(states) - added - confirmed, "confirmed": confirmed}
    by_kind = Counter(reject["kind"] for reject in rejects)
    rejected = {kind: by_kind[kind] for kind in VERDICT_REJECT_KINDS}
    metadata = {
        "verdicts_on": table.digest,
        "verdicts": {
            "files": [describe_source(path) for path in files],
            "rule": "a verdict replaces the table's label; a pair answered both ways keeps it",
            "rows": len(verdicts),
            **counts,
            "rejected": rejected,
        },
    }
    answered = LabelTable.from_arrays(keys, classes, [*states.values()], classes=table.classes, names=table.names)
    unanswered = filter_labels(
        table, None, lambda labels: ~np.isin(labels.image.astype(np.int64) * table.num_classes + labels.cls, pairs)
    )
    new_table = merge([unanswered, answered], out, conflict="error", metadata=metadata)
    return VerdictReport(table=new_table, rejects_path=rejects_path, rows=len(verdicts), rejected=rejected, **counts)


def _one_per_pair(
    verdicts: Sequence[_Verdict], table: LabelTable, images: Sequence[str] | pa.Array | None
) -> tuple[dict[tuple[str, int], int], list[dict[str, Any]]]:
    """(the state of each pair of (key, class index) of a known image that was answered one way, rejects)."""
    classes = {cls: number for number, cls in enumerate(table.classes)}
    answers: dict[tuple[str, int], list[_Verdict]] = {}
    rejects = []
    for verdict in verdicts:
        if kind := _reject_kind(verdict.fields, classes):
            rejects.append(verdict.reject(kind))
        else:
            answers.setdefault((verdict.fields[0], classes[verdict.fields[2]]), []).append(verdict)
    keys = pa.array([key for key, _ in answers], pa.string())
    is_known = table.rows_of(keys) >= 0
    if images is not None:
        listed = pc.call_function("is_in", [keys], pc.SetLookupOptions(as_strings(images)))
        is_known |= listed.to_numpy(zero_copy_only=False)
    states = {}
    for (pair, of_pair), known in zip(answers.items(), is_known.tolist(), strict=True):
        pair_states = {_STATES[verdict.fields[3].strip()] for verdict in of_pair}
        if not known:
            rejects += [verdict.reject("unknown_image") for verdict in of_pair]
        elif len(pair_states) == 2:
            rejects += [verdict.reject("contradiction") for verdict in of_pair]
        else:
            states[pair] = pair_states.pop()
            rejects += [verdict.reject("duplicate") for verdict in of_pair[1:]]
    return states, rejects


def _read_verdicts(path: str) -> Iterator[_Verdict]:
    """The rows of a verdict file. Raises LabelError for another header, or no row."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    has_rows = False
    try:
        header = next(reader, [])
        if tuple(header) != HEADER:
            raise LabelError(
                f"verdict file {path!r} has the header {','.join(header)[:200]!r}, expected {','.join(HEADER)!r}: use "
                "a file that an audit page exported, or rewrite it with these four columns"
            )
        for fields in reader:
            if fields:
                has_rows = True
                yield _Verdict(path, reader.line_num, [unescape_formula(field) for field in fields])
    except csv.Error as error:
        line = max(1, reader.line_num)
        raise LabelError(f"verdict file {path!r} cannot be read at line {line} ({error}): export it again") from None
    if not has_rows:
        raise LabelError(f"verdict file {path!r} has a header but no verdict: leave it out")


def _reject_kind(fields: list[str], classes: dict[str, int]) -> str | None:
    """Why a row cannot be used, None for a valid one."""
    if len(fields) != len(HEADER) or not fields[0] or not fields[2]:
        return "malformed_row"
    if fields[2] not in classes:
        return "unknown_class"
    return None if fields[3].strip() in _STATES else "malformed_confidence"
