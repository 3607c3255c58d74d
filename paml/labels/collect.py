"""Rows of annotation files, collected as 10 bytes each (key and code) until they are resolved."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml.labels.class_list import ClassList
from paml.labels.keys import hex_to_uint64, rank_texts, uint64_to_hex
from paml.labels.rejects import RejectsWriter
from paml.labels.resolve import ConflictRule, Labels, ResolvedLabels, resolve, sort_by_key, sorted_blocks
from paml.labels.table_file import code_type

_CONFIDENCES = pa.array(["0", "1", "0.0", "1.0"])  # the last bit of the index is the state


class LabelCollector:
    """Collects labels and passes rows that are not labels to the rejects. Keys are uint64 while all are hex."""

    def __init__(self, classes: ClassList, image_ids: str, rejects: RejectsWriter) -> None:
        self.class_list, self.classes = classes, classes.classes
        self.rejects = rejects
        self.count = 0
        self.first_text_key: str | None = None
        self.unknown_classes: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        """The first rejected row of each kind."""
        self.code_type = code_type(len(self.classes))
        self._class_array = pa.array(self.classes, pa.string())
        self._hex_only = image_ids == "hex"
        self._blocks: list[Labels] = []
        self._texts: list[tuple[pa.Array, np.ndarray]] = []

    @property
    def rows(self) -> int:
        """Rows added so far, labels and rejects."""
        return self.count + self.rejects.counts.total()

    def add_block(self, block: Labels) -> None:
        """Add labels with hex keys, ascending by key."""
        if self.first_text_key is None:
            self._blocks.append(block)
        else:
            self._texts.append((uint64_to_hex(block.keys), block.codes))
        self.count += len(block.keys)

    def add_batch(self, file: str, batch: pa.RecordBatch) -> None:
        """Add rows of `file` with the columns of HEADER as strings; null or empty is no value."""
        keys, cls_texts = batch.column("ImageID"), batch.column("LabelName")
        cls, confidence = _index_in(cls_texts, self._class_array), _index_in(batch.column("Confidence"), _CONFIDENCES)
        values, is_hex = hex_to_uint64(keys)
        faults = [
            ("malformed_row", _is_empty(keys) | _is_empty(cls_texts), None),
            ("unknown_class", cls < 0, None),
            ("malformed_confidence", confidence < 0, None),
            *([("malformed_row", ~is_hex, "ImageID is not 16 lower-case hex digits")] if self._hex_only else []),
        ]
        valid = np.ones(len(keys), bool)
        for kind, is_bad, reason in faults:
            if (is_bad & valid).any():
                self._reject(kind, file, batch.filter(pa.array(is_bad & valid)), reason)
                valid &= ~is_bad
        codes = (2 * cls + (confidence & 1))[valid].astype(self.code_type)
        if self.first_text_key is None and is_hex[valid].all():
            self.add_block(sort_by_key(values[valid], codes))
            return
        if self.first_text_key is None:
            self.first_text_key = keys[int(np.flatnonzero(valid & ~is_hex)[0])].as_py()
            self._texts = [(uint64_to_hex(block.keys), block.codes) for block in self._blocks]
            self._blocks = []
        self._texts.append((keys.filter(pa.array(valid)), codes))
        self.count += len(codes)

    def add_bad_lines(self, file: str, texts: Sequence[str], lines: Sequence[int] | None = None) -> None:
        """Lines of `file` that are not rows: their texts, with the reason, and their numbers (from 1) if known."""
        columns = {"text": pa.array(texts, pa.string()), **({} if lines is None else {"line": pa.array(lines)})}
        self.rejects.add("malformed_row", columns, file)

    def resolve(self, conflict: ConflictRule, threads: int) -> tuple[ResolvedLabels, Callable[[np.ndarray], pa.Array]]:
        """The resolved labels, and a function that turns their keys into stored keys. Empties the collector."""
        if self.first_text_key is None:
            return resolve(self._blocks, conflict, pa.array, self.classes, threads=threads), pa.array
        codes = np.concatenate([codes for _, codes in self._texts])
        texts = pa.concat_arrays([text.cast(pa.large_string()) for text, _ in self._texts])
        self._texts = []
        ranks, distinct = rank_texts(texts)

        def stored(keys: np.ndarray) -> pa.Array:
            return distinct.take(pa.array(keys)).cast(pa.string())

        return resolve(list(sorted_blocks(ranks, codes)), conflict, stored, self.classes, threads=threads), stored

    def _reject(self, kind: str, file: str, rows: pa.RecordBatch, reason: str | None) -> None:
        if kind == "unknown_class":
            self.unknown_classes.update(rows.column("LabelName").to_pylist())
        self.examples.setdefault(kind, ",".join(column[0].as_py() or "" for column in rows.columns))
        columns = dict(zip(rows.schema.names, rows.columns, strict=True))
        self.rejects.add(kind, columns | ({} if reason is None else {"text": pa.repeat(reason, len(rows))}), file)


def _index_in(values: pa.Array, allowed: pa.Array) -> np.ndarray:
    """int64[n]: the index of each value among `allowed`, or -1."""
    index = pc.call_function("index_in", [values], pc.SetLookupOptions(allowed))
    return index.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _is_empty(texts: pa.Array) -> np.ndarray:
    length = pc.call_function("binary_length", [texts]).fill_null(0)
    return length.to_numpy(zero_copy_only=False) == 0
