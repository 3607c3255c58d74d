"""Verdicts on labels, as people give them on the page of an audit, merged into a label table as a new version of it.

A verdict file has the columns and states of `annotations-human.csv`: Confidence 1 for yes, 0 for no; what was skipped
has no row. The rules: a verdict wins over what the table says; a pair that the files answer both ways is answered by
neither, and the table's own label stays.

The apostrophe that exported fields have in front of what a spreadsheet would run (`paml.spreadsheet`) is taken off when
verdicts are read.
"""

import csv
import io
import os
import tempfile
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from paml import storage
from paml.labels.build import HEADER
from paml.labels.edit import keep, merge
from paml.labels.states import NEGATIVE, POSITIVE, LabelError
from paml.labels.table import LabelTable, as_strings, table_from_triples
from paml.spreadsheet import restored

KINDS = ("malformed_row", "unknown_class", "malformed_confidence", "unknown_image", "duplicate", "contradiction")
_STATES = {"1": POSITIVE, "1.0": POSITIVE, "0": NEGATIVE, "0.0": NEGATIVE}
_REJECTS = pa.schema(
    [("kind", pa.string()), ("file", pa.string()), ("line", pa.int64()), *((name, pa.string()) for name in HEADER)]
)


@dataclass(frozen=True, kw_only=True)
class VerdictReport:
    """What the verdicts changed. `rows` = `added` + `overturned` + `confirmed` + the sum of `rejected`."""

    table: LabelTable
    """The new version, opened."""
    rejects_path: str
    """The rejected rows (Parquet), with kind, file, line and what they said."""
    rows: int
    """Rows of all files."""
    added: int
    """Verdicts on pairs that were unobserved."""
    overturned: int
    """Verdicts against the table's label, which they replace."""
    confirmed: int
    """Verdicts that the table's label agrees with."""
    rejected: dict[str, int]
    """Rejected rows by kind; all of KINDS are there."""

    def __str__(self) -> str:
        lines = [
            f"label table {self.table.path}: {self.rows:,} verdicts read, {self.added:,} labels added, "
            f"{self.overturned:,} overturned, {self.confirmed:,} confirmed; {self.table.num_annotations:,} labels"
        ]
        if any(self.rejected.values()):
            kinds = ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in self.rejected.items() if count)
            lines.append(f"rejected: {kinds}; see {self.rejects_path}")
        return "\n".join(lines)


def apply_verdicts(
    table: LabelTable, files: Sequence[str], out: str, *, images: Sequence[str] | pa.Array | None = None
) -> VerdictReport:
    """Write `table` with the verdicts of `files` to `out`; the table itself is not changed.

    files: CSV with the header ImageID,Source,LabelName,Confidence, local or s3://. images: keys that may be named
    beside the table's own, such as those of a manifest; an image that has a verdict then enters the table.
    Rows that cannot be used are counted by kind and written to `<out stem>.rejects.parquet`: malformed rows, classes
    and images that are not known, repeats, and pairs answered both ways. Metadata of `out`: the table's digest, the
    files' names, sizes and SHA-256, the counts.
    Raises LabelError for no file, one without a row, another header, or no usable row; FileNotFoundError.
    """
    if not files:
        raise LabelError("there are no verdict files: name at least one")
    if os.path.abspath(out) == os.path.abspath(table.path):
        raise LabelError(f"label table {out!r} would be written over itself: name another file")
    classes = {mid: number for number, mid in enumerate(table.classes)}
    rejects: list[tuple] = []
    sound: list[tuple[str, int, int, tuple]] = []
    for path in files:
        for line, fields in _rows_of(path):
            row = (os.path.basename(path), line, *(fields + [""] * 4)[:4])
            if kind := _fault(fields, classes):
                rejects.append((kind, *row))
            else:
                sound.append((fields[0], classes[fields[2]], _STATES[fields[3].strip()], row))
    rows = len(rejects) + len(sound)

    keys = sorted({key for key, *_ in sound})
    row_of = dict(zip(keys, table.rows_of(keys).tolist(), strict=True))
    known = {key for key, row in row_of.items() if row >= 0}
    if images is not None:
        listed = pc.call_function("is_in", [pa.array(keys, pa.string())], pc.SetLookupOptions(as_strings(images)))
        known |= {key for key, here in zip(keys, listed.to_pylist(), strict=True) if here}
    given, lost = _settled(sound, known)
    rejects += lost
    rejects_path = os.path.splitext(out)[0] + ".rejects.parquet"
    _write_rejects(rejects, rejects_path)
    if not given:
        raise LabelError(
            f"no usable verdict in {', '.join(map(repr, files))}: all {rows} rows are rejected; the reasons are in "
            f"{rejects_path}. Name the files that the audit of this table's images exported"
        )

    known_rows = sorted({row_of[key] for key, *_ in given} - {-1})
    labels = table.lookup(known_rows)
    before = {
        (known_rows[image], cls): state
        for image, cls, state in zip(labels.image.tolist(), labels.cls.tolist(), labels.state.tolist(), strict=True)
    }
    old = [before.get((row_of[key], cls)) for key, cls, _ in given]
    agreed = sum(state == was for (*_, state), was in zip(given, old, strict=True))
    added = old.count(None)
    rejected = Counter(kind for kind, *_ in rejects)
    counts = {"added": added, "overturned": len(given) - added - agreed, "confirmed": agreed}
    about = {
        "verdicts_on": table.digest,
        "verdicts": {
            "files": [_about(path) for path in files],
            "rule": "a verdict wins over the table's label; a pair answered both ways keeps it",
            "rows": rows,
            **counts,
            "rejected": {kind: rejected[kind] for kind in KINDS},
        },
    }
    # The pairs that have a verdict leave the old labels, so that merging the two finds nothing to settle.
    answered = np.array([row_of[key] * table.num_classes + cls for key, cls, _ in given if row_of[key] >= 0], np.int64)
    place = {key: number for number, key in enumerate(sorted({key for key, *_ in given}))}
    image, cls, state = (np.array(column) for column in zip(*((place[k], c, s) for k, c, s in given), strict=True))
    with tempfile.TemporaryDirectory(prefix="paml-verdicts-") as folder:
        left = keep(
            table,
            os.path.join(folder, "left.arrow"),
            lambda labels: ~np.isin(labels.image.astype(np.int64) * table.num_classes + labels.cls, answered),
        )
        new = table_from_triples(
            list(place), table.classes, table.names, image, cls, state, os.path.join(folder, "given.arrow")
        )
        report = merge([left, new], out, conflict="error", metadata=about)
    return VerdictReport(
        table=report.table,
        rejects_path=rejects_path,
        rows=rows,
        rejected={kind: rejected[kind] for kind in KINDS},
        **counts,
    )


def _settled(
    sound: Sequence[tuple[str, int, int, tuple]], known: Container[str]
) -> tuple[list[tuple[str, int, int]], list[tuple]]:
    """(key, class, state) of every pair that was answered one way, and what is rejected: (kind, *row)."""
    rejects: list[tuple] = []
    said: dict[tuple[str, int], list[tuple[int, tuple]]] = {}
    for key, cls, state, row in sound:
        if key in known:
            said.setdefault((key, cls), []).append((state, row))
        else:
            rejects.append(("unknown_image", *row))
    given: list[tuple[str, int, int]] = []
    for (key, cls), answers in said.items():
        one = len({state for state, _ in answers}) == 1
        if one:
            given.append((key, cls, answers[0][0]))
        kind, lost = ("duplicate", answers[1:]) if one else ("contradiction", answers)
        rejects += [(kind, *row) for _, row in lost]
    return given, rejects


def _rows_of(path: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its line, fields) of each row. Raises LabelError for another header, or no row."""
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LabelError(f"verdict file {path!r} is not UTF-8 text ({error}): export it again") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        found = next(reader, [])
    except csv.Error as error:
        raise LabelError(f"verdict file {path!r} cannot be read at line 1 ({error})") from None
    if tuple(found) != HEADER:
        raise LabelError(
            f"verdict file {path!r} has the header {','.join(found)[:200]!r}, expected is {','.join(HEADER)!r}: "
            "name a file that the page of an audit exported, or rewrite it with these four columns"
        )
    some = False
    try:
        for fields in reader:
            if fields:
                some = True
                yield reader.line_num, [restored(field) for field in fields]
    except csv.Error as error:
        raise LabelError(f"verdict file {path!r} cannot be read at line {reader.line_num} ({error})") from None
    if not some:
        raise LabelError(f"verdict file {path!r} holds a header and no verdict: leave it out")


def _fault(fields: list[str], classes: dict[str, int]) -> str | None:
    """The kind of what is wrong with a row, None for a sound one."""
    if len(fields) != len(HEADER) or not fields[0] or not fields[2]:
        return "malformed_row"
    if fields[2] not in classes:
        return "unknown_class"
    return None if fields[3].strip() in _STATES else "malformed_confidence"


def _about(path: str) -> dict:
    sha256, size = storage.sha256_of(path)
    return {"file": os.path.basename(path), "sha256": sha256, "bytes": size}


def _write_rejects(rejects: list[tuple], path: str) -> None:
    columns = list(zip(*rejects, strict=True)) or [()] * len(_REJECTS)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _REJECTS, strict=True)]
    with storage.replacing(path) as temporary:
        pq.write_table(pa.table(arrays, schema=_REJECTS), temporary, compression="zstd")
