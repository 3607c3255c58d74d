"""The label table: the observed labels of all images, sparse, in one memory-mapped Arrow file.

The file is an Arrow IPC file of one record batch with a row an image, sorted by key:
- `key`: uint64 where every key is 16 lower-case hex digits (as ImageIDs are), else string;
- `labels`: list of `2 * class + (1 if positive else 0)`, ascending (uint16, or uint32 above 32,768 classes).
Lists lie end to end with int32 offsets, so that a look-up is arithmetic on three flat arrays, shared by all
processes that map the file. Classes, names, digest and the sources' digests are JSON in the schema's metadata.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml import storage
from paml.labels.states import NEGATIVE, POSITIVE, LabelError
from paml.reading import MISSHAPEN, parse_object
from paml.seal import UNSEALED, BrokenSeal, check_seal, file_mark, seal_file

SCHEMA_VERSION = 1
_METADATA_KEY = b"paml"
_KIND = "label_table"
_MAX_ANNOTATIONS = 2**31 - 1
_COUNT_BLOCK = 1 << 22
_HEX_BLOCK = 1 << 15  # what stays in the cache


class Triples(NamedTuple):
    """Observed labels of a list of images, in the list's order and by ascending class within an image.

    image: int32[m], position in the list of rows; cls: int32[m], class index; state: int8[m], POSITIVE or NEGATIVE.
    """

    image: np.ndarray
    cls: np.ndarray
    state: np.ndarray


class LabelTable:
    """A label table opened for reading. Pickles as its path and digest: another process maps the file again.

    Raises LabelError where the file is no label table, is cut, was changed, or has another schema version;
    FileNotFoundError where it is missing. All its bytes are checked when it is opened, not again when it is
    unpickled and the file is the same; a remote one that arrives damaged is fetched a second time.
    """

    path: str
    digest: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    num_classes: int
    num_images: int
    num_annotations: int
    metadata: Mapping[str, Any]

    def __init__(self, path: str | os.PathLike[str], _mark: tuple[int, ...] = ()) -> None:
        self.path = os.fspath(path)
        try:
            batch, self.metadata, sealed, self._mark = _read_batch(self.path, storage.local_copy(self.path), _mark)
        except LabelError:
            if not storage.is_remote(self.path):
                raise
            local = storage.local_copy(self.path, again=True)
            batch, self.metadata, sealed, self._mark = _read_batch(self.path, local, ())
        self.digest = self.metadata["digest"]
        self.classes = tuple(self.metadata["classes"])
        self.names = tuple(self.metadata["names"])
        self.num_classes = len(self.classes)
        self.num_images = batch.num_rows
        self._keys: pa.Array = batch.column("key")
        lists = batch.column("labels")
        self._codes: np.ndarray = lists.values.to_numpy(zero_copy_only=True)
        self._offsets: np.ndarray = lists.offsets.to_numpy(zero_copy_only=True)
        self.num_annotations = len(self._codes)
        self._class_counts: tuple[np.ndarray, np.ndarray] | None = None
        if not sealed:
            self.verify()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "LabelTable":
        """Map the table at `path`; one in S3 is first copied to the local cache."""
        return cls(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_same, (self.path, self.digest, self._mark)

    def __repr__(self) -> str:
        return (
            f"LabelTable({self.path!r}, {self.num_images:,} images, {self.num_classes:,} classes, "
            f"{self.num_annotations:,} labels)"
        )

    @property
    def has_hex_keys(self) -> bool:
        """Whether keys are stored as uint64 (16 lower-case hex digits)."""
        return pa.types.is_uint64(self._keys.type)

    def rows_of(self, keys: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
        """int64[n]: the row of each key, -1 where the table has no such image. One vectorised join."""
        wanted = as_strings(keys)
        if not self.has_hex_keys:
            found = pc.call_function("index_in", [wanted], pc.SetLookupOptions(self._keys))
            return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        values, valid = hex_to_uint64(wanted)
        # Searching for ascending values touches the mapped keys in order: ten times as fast as at random.
        order = rough_order(values)
        rows = np.full(len(values), -1, np.int64)
        table_keys = self._hex_keys()
        if len(table_keys):
            place = np.minimum(np.searchsorted(table_keys, values[order]), len(table_keys) - 1)
            hit = (table_keys[place] == values[order]) & valid[order]
            rows[order[hit]] = place[hit]
        return rows

    def keys(self, rows: np.ndarray | Sequence[int] | None = None) -> list[str]:
        """The keys of `rows` (int64[n]); of all rows, in order, by default."""
        chosen = None if rows is None else self._checked(rows)
        if self.has_hex_keys:
            values = self._hex_keys()
            return uint64_to_hex(values if chosen is None else values[chosen]).to_pylist()
        return (self._keys if chosen is None else self._keys.take(pa.array(chosen))).to_pylist()

    def key_column(self) -> pa.Array:
        """All keys as they are stored, ascending: uint64[num_images] or string[num_images]."""
        return self._keys

    def label_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """(offsets int32[num_images + 1], codes uint16 or uint32[num_annotations]) as stored: 2 * class + state."""
        return self._offsets, self._codes

    def lookup(self, rows: np.ndarray | Sequence[int]) -> Triples:
        """The observed labels of `rows` (int64[n], any order, repeats allowed). Raises LabelError for other rows."""
        chosen = self._checked(rows)
        starts = self._offsets[chosen]
        lengths = self._offsets[chosen + 1] - starts
        image = np.repeat(np.arange(len(chosen), dtype=np.int32), lengths)
        # An entry's place is its own number, moved by its image's start minus the entries of images before it.
        moves = starts - (np.cumsum(lengths, dtype=np.int32) - lengths)
        codes = self._codes[moves[image] + np.arange(len(image), dtype=np.int32)]
        return Triples(image, (codes >> 1).astype(np.int32), (codes & 1).astype(np.int8))

    def label_counts(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """int32[n]: how many labels are observed of each of `rows`."""
        chosen = self._checked(rows)
        return self._offsets[chosen + 1] - self._offsets[chosen]

    def key_hashes(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """uint64[n]: a hash of the key of each of `rows`, as of `paml.labels.hashing.hash_keys`."""
        from paml.labels.hashing import hash_keys, mix

        chosen = self._checked(rows)
        if self.has_hex_keys:
            return mix(self._hex_keys()[chosen])
        return hash_keys(self._keys.take(pa.array(chosen)))

    def class_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(positives int64[K], negatives int64[K]): the labels of each class over all images."""
        if self._class_counts is None:
            counts = np.zeros(2 * self.num_classes, np.int64)
            # Block by block: bincount widens its input to int64.
            for start in range(0, self.num_annotations, _COUNT_BLOCK):
                counts += np.bincount(self._codes[start : start + _COUNT_BLOCK], minlength=len(counts))
            positives, negatives = counts[1::2].copy(), counts[0::2].copy()
            positives.setflags(write=False)
            negatives.setflags(write=False)
            self._class_counts = positives, negatives
        return self._class_counts

    def verify(self) -> None:
        """Read the whole file and compare its digest. Raises LabelError where a bit has changed."""
        found = _digest(self.classes, self.names, self._keys, self._offsets, self._codes)
        if found != self.digest:
            raise LabelError(
                f"label table {self.path!r} is damaged: its content has digest {found[:16]}…, its metadata say "
                f"{self.digest[:16]}…: build or copy it again"
            )

    def _hex_keys(self) -> np.ndarray:
        return self._keys.to_numpy(zero_copy_only=True)

    def _checked(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        chosen = np.asarray(rows, dtype=np.int64)
        if chosen.ndim != 1:
            raise LabelError(f"rows have shape {chosen.shape}, allowed is one axis: pass a flat array of row numbers")
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= self.num_images):
            bad = chosen[(chosen < 0) | (chosen >= self.num_images)][0]
            raise LabelError(
                f"row {bad} is not in label table {self.path!r}, which has rows 0 to {self.num_images - 1}: "
                "drop the keys for which rows_of gave -1"
            )
        return chosen


def _open_same(path: str, digest: str, mark: tuple[int, ...]) -> LabelTable:
    table = LabelTable(path, mark)
    if table.digest != digest:
        raise LabelError(
            f"label table {path!r} has changed since it was opened (digest {table.digest[:16]}…, "
            f"expected {digest[:16]}…): start the job again"
        )
    return table


def _read_batch(
    path: str, local: str, mark: tuple[int, ...]
) -> tuple[pa.RecordBatch, dict[str, Any], bool, tuple[int, ...]]:
    """(batch, metadata, whether the file has a seal, its mark); a file of the mark given is not checked again."""
    try:
        with pa.memory_map(local) as mapped:
            data = mapped.read_buffer()
        found = file_mark(local)
        sealed = found == mark or check_seal(memoryview(data)) is not None
        reader = pa.ipc.open_file(data)
        metadata = _metadata_of(path, reader.schema)
        if not sealed and len(reader.schema.metadata) > 1:
            raise BrokenSeal("its seal is not whole")
        if reader.num_record_batches != 1:
            raise LabelError(
                f"label table {path!r} has {reader.num_record_batches} record batches, allowed is one: build it again"
            )
        batch = reader.get_batch(0)
    except pa.ArrowInvalid as error:
        raise LabelError(
            f"{path!r} is not a whole Arrow file ({error}): it was cut off or is another kind of file: "
            "build the label table again, or copy it again"
        ) from error
    except (BrokenSeal, OSError, *MISSHAPEN) as error:
        if isinstance(error, LabelError | FileNotFoundError):
            raise
        raise LabelError(f"label table {path!r} is damaged ({error}): build or copy it again") from error
    if found != mark:
        _check_parts(path, batch, metadata)
    _check_batch(path, batch, metadata)
    return batch, metadata, sealed, found


def _check_parts(path: str, batch: pa.RecordBatch, metadata: Mapping[str, Any]) -> None:
    """A seal tells that bytes have changed, not who wrote them: all parts must lie within the file, whatever it says.

    What reads a table afterwards takes offsets and codes for places in memory.
    """
    try:
        if not {"digest", "classes", "names", "num_images", "num_annotations"} <= metadata.keys():
            raise ValueError(f"its metadata are {', '.join(metadata)} alone")
        check_classes(metadata["classes"], metadata["names"])
        if not all(isinstance(text, str) for text in [*metadata["classes"], *metadata["names"], metadata["digest"]]):
            raise TypeError("a class, its name or the digest is no text")
        codes = batch.schema.field("labels").type.value_type
        if batch.schema.names != ["key", "labels"] or codes not in (pa.uint16(), pa.uint32()):
            raise ValueError(f"its columns are {', '.join(map(str, batch.schema))}")
        if batch.schema.field("key").type not in (pa.uint64(), pa.string()):
            raise ValueError(f"its keys are {batch.schema.field('key').type}")
        batch.validate(full=True)
        lists = batch.column("labels")
        if any(column.null_count for column in (*batch.columns, lists.values)):
            raise ValueError("it has nulls")
        highest = pc.call_function("max", [lists.values]).as_py()
        if highest is not None and highest >= 2 * len(metadata["classes"]):
            raise ValueError(f"it has the code {highest} and {len(metadata['classes'])} classes")
        if batch.num_rows and lists.offsets[0].as_py() != 0:
            raise ValueError("its lists do not begin at 0")
    except MISSHAPEN as error:
        raise LabelError(f"label table {path!r} is damaged ({error}): build or copy it again") from error


def _metadata_of(path: str, schema: pa.Schema) -> dict[str, Any]:
    raw = (schema.metadata or {}).get(_METADATA_KEY)
    metadata = parse_object(raw) if raw else {}
    if metadata.get("kind") != _KIND:
        raise LabelError(
            f"{path!r} is an Arrow file but no label table of paml: pass the file that build_label_table wrote"
        )
    version = metadata.get("schema_version")
    if version != SCHEMA_VERSION:
        raise LabelError(
            f"label table {path!r} has schema version {version}, this paml reads version {SCHEMA_VERSION}: "
            "build the table again with this paml, or use the paml that wrote it"
        )
    return metadata


def _check_batch(path: str, batch: pa.RecordBatch, metadata: Mapping[str, Any]) -> None:
    lists = batch.column("labels")
    found = (batch.num_rows, len(lists.values), lists.offsets[-1].as_py() if batch.num_rows else 0)
    expected = (metadata["num_images"], metadata["num_annotations"], metadata["num_annotations"])
    if found != expected:
        raise LabelError(
            f"label table {path!r} is damaged: images, labels and last offset are {found}, "
            f"its metadata say {expected}: build or copy it again"
        )


def as_strings(keys: Any) -> pa.Array:
    """string[n] of a list of keys, an Arrow array or a chunked one."""
    if isinstance(keys, pa.ChunkedArray):
        return as_strings(pa.concat_arrays(keys.chunks))
    if isinstance(keys, pa.Array):
        return keys if pa.types.is_string(keys.type) else keys.cast(pa.string())
    return pa.array(keys, pa.string())


def words_to_uint64(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint64[n], bool[n]): the values of 16 hex digits each, as two little-endian words of 8 characters uint64[n, 2],
    and which of them are all digits or lower-case letters a to f. The arithmetic treats 8 characters at a time.
    """
    halves, wrong = [], np.zeros(len(words), np.uint64)
    for text in np.ascontiguousarray(words.T):
        digits = (text >> np.uint64(6)) & np.uint64(0x0101010101010101)  # 1 for a letter
        digits *= np.uint64(9)
        digits += text & np.uint64(0x0F0F0F0F0F0F0F0F)
        # A character is right if its digit is below 16 and writes that character again.
        wrong |= digits & np.uint64(0xF0F0F0F0F0F0F0F0)
        again = (digits + np.uint64(0x0606060606060606)) >> np.uint64(4)
        again &= np.uint64(0x0101010101010101)
        again *= np.uint64(0x27)
        again += digits
        again += np.uint64(0x3030303030303030)
        wrong |= again ^ text
        # Digits move together: into bytes, pairs, and the word, whose first digit is the highest.
        digits = ((digits << np.uint64(4)) | (digits >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
        digits = (digits | (digits >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
        halves.append((digits | (digits >> np.uint64(16))) & np.uint64(0xFFFFFFFF))
    values = halves[1] << np.uint64(32)
    values |= halves[0]
    return values.byteswap(inplace=True), wrong == 0


def hex_to_uint64(keys: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(uint64[n], bool[n]): the values of keys of 16 lower-case hex digits, and which keys are such. Vectorised."""
    count = len(keys)
    if count == 0:
        return np.zeros(0, np.uint64), np.zeros(0, bool)
    _, offset_buffer, data_buffer = keys.buffers()
    offset_type = np.int64 if pa.types.is_large_string(keys.type) else np.int32
    offsets = np.frombuffer(offset_buffer, offset_type, count + 1, keys.offset * np.dtype(offset_type).itemsize)
    text = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    valid = np.diff(offsets) == 16
    if keys.null_count:
        valid &= keys.is_valid().to_numpy(zero_copy_only=False)
    if valid.all():
        digits = text[offsets[0] : offsets[-1]].reshape(count, 16)
    else:
        digits = np.zeros((count, 16), np.uint8)
        digits[valid] = text[offsets[:-1][valid][:, None] + np.arange(16)]
    values = np.empty(count, np.uint64)
    for start in range(0, count, _HEX_BLOCK):
        part = slice(start, start + _HEX_BLOCK)
        values[part], right = words_to_uint64(digits[part].view("<u8"))
        valid[part] &= right
    return values, valid


def rough_order(values: np.ndarray) -> np.ndarray:
    """int64[n]: an order in which uint64[n] ascend, but for values that differ in their last bits alone.

    Value and place share one number as far as they fit, since numpy sorts numbers several times as fast as it finds
    their order.
    """
    if len(values) < 2:
        return np.arange(len(values))
    low = values.min()
    place_bits = (len(values) - 1).bit_length()
    mixed = values - low
    mixed >>= np.uint64(max(0, int(values.max() - low).bit_length() + place_bits - 64))
    mixed <<= np.uint64(place_bits)
    mixed |= np.arange(len(values), dtype=np.uint64)
    mixed.sort()
    mixed &= np.uint64((1 << place_bits) - 1)
    return mixed.view(np.int64)


def uint64_to_hex(values: np.ndarray) -> pa.Array:
    """string[n]: the 16 lower-case hex digits of each of uint64[n]."""
    pairs = np.ascontiguousarray(values).astype(">u8").view(np.uint8).reshape(-1, 8)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.stack([digits[pairs >> 4], digits[pairs & 15]], axis=2)
    offsets = np.arange(len(values) + 1, dtype=np.int32) * 16
    return pa.Array.from_buffers(pa.string(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(text.tobytes())])


def _digest(
    classes: Sequence[str], names: Sequence[str], keys: pa.Array, offsets: np.ndarray, codes: np.ndarray
) -> str:
    """SHA-256 of what the table says, whatever made it: equal labels have equal digests."""
    digest = hashlib.sha256(json.dumps([list(classes), list(names), str(keys.type), str(codes.dtype)]).encode())
    for buffer in keys.buffers()[1:]:
        if buffer is not None:
            digest.update(buffer)
    digest.update(np.ascontiguousarray(offsets).data)
    digest.update(np.ascontiguousarray(codes).data)
    return digest.hexdigest()


def code_type(num_classes: int) -> np.dtype:
    """The type of a table's codes: uint16 up to 32,768 classes, else uint32."""
    return np.dtype(np.uint16 if 2 * num_classes <= 1 << 16 else np.uint32)


def check_classes(classes: Sequence[str], names: Sequence[str]) -> None:
    """Raises LabelError where there are no classes, one repeats, or the names do not match them in number."""
    if not classes:
        raise LabelError("there are no classes: name at least one")
    if len(set(classes)) != len(classes):
        seen: set[str] = set()
        twice = next(mid for mid in classes if mid in seen or seen.add(mid))
        raise LabelError(f"class {twice!r} is named twice: each class may stand once, remove the second")
    if len(names) != len(classes):
        raise LabelError(f"{len(names)} names for {len(classes)} classes: give one name a class")


def write_table(
    out: str,
    *,
    keys: pa.Array,
    offsets: np.ndarray,
    codes: np.ndarray,
    classes: Sequence[str],
    names: Sequence[str],
    metadata: Mapping[str, Any],
) -> LabelTable:
    """Write a table whose arrays are sorted already, and open it.

    keys: uint64[n] or string[n], ascending, no repeats; offsets: int32[n + 1]; codes: uint16[m] or uint32[m].
    `metadata` (JSON values) joins what the table itself records.
    """
    check_classes(classes, names)
    if len(codes) > _MAX_ANNOTATIONS:
        raise LabelError(f"{len(codes):,} labels, a table holds at most {_MAX_ANNOTATIONS:,}: split the images in two")
    codes = codes.astype(code_type(len(classes)), copy=False)
    offsets = offsets.astype(np.int32, copy=False)
    about = {
        **metadata,
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "classes": list(classes),
        "names": list(names),
        "num_images": len(keys),
        "num_annotations": len(codes),
        "digest": _digest(classes, names, keys, offsets, codes),
    }
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes))
    schema = pa.schema(
        [pa.field("key", keys.type, nullable=False), pa.field("labels", lists.type, nullable=False)],
        metadata={**UNSEALED, _METADATA_KEY: json.dumps(about).encode()},
    )
    batch = pa.RecordBatch.from_arrays([keys, lists], schema=schema)
    with storage.replacing(out) as temporary:
        with pa.OSFile(temporary, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(batch)
        seal_file(temporary)
    return LabelTable(out)


def sorted_keys(keys: Sequence[str] | pa.Array) -> tuple[pa.Array, np.ndarray]:
    """(stored keys ascending, int64[n] order): the key column of a table of these images. Raises for repeats."""
    strings = as_strings(keys)
    if strings.null_count or (len(strings) and pc.call_function("binary_length", [strings]).to_numpy().min() == 0):
        raise LabelError("a key is empty: every image needs a key of one character or more")
    values, valid = hex_to_uint64(strings)
    if valid.all():
        order = np.argsort(values, kind="stable")
        stored: pa.Array = pa.array(values[order])
        repeated = values[order][1:] == values[order][:-1]
    else:
        order = pc.call_function("array_sort_indices", [strings]).to_numpy().astype(np.int64)
        stored = strings.take(pa.array(order))
        repeated = pc.call_function("equal", [stored[1:], stored[:-1]]).to_numpy(zero_copy_only=False)
    if repeated.any():
        again = strings[int(order[np.flatnonzero(repeated)[0]])].as_py()
        raise LabelError(f"key {again!r} stands twice: each image may stand once, merge its labels first")
    return stored, order


def table_from_triples(
    keys: Sequence[str] | pa.Array,
    classes: Sequence[str],
    names: Sequence[str] | None,
    image: np.ndarray | Sequence[int],
    cls: np.ndarray | Sequence[int],
    state: np.ndarray | Sequence[int],
    out: str,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> LabelTable:
    """Write a table from arrays and open it.

    keys: one a image, in any order, no repeats (an image may have no labels); names: None takes the MIDs;
    image int[m] (index into `keys`), cls int[m] (index into `classes`), state int[m] (POSITIVE or NEGATIVE), in
    any order. Raises LabelError for an index out of range, another state, or a pair that stands twice.
    """
    image, cls, state = (np.asarray(values) for values in (image, cls, state))
    if not image.shape == cls.shape == state.shape or image.ndim != 1:
        raise LabelError(
            f"image, cls and state have shapes {image.shape}, {cls.shape} and {state.shape}: give one of each a label"
        )
    for values, limit, what in ((image, len(keys), "image"), (cls, len(classes), "class")):
        if len(values) and (values.min() < 0 or values.max() >= limit):
            bad = values[(values < 0) | (values >= limit)][0]
            raise LabelError(f"{what} index {bad} is out of range: there are {limit}, counted from 0")
    if not np.isin(state, (POSITIVE, NEGATIVE)).all():
        bad = state[~np.isin(state, (POSITIVE, NEGATIVE))][0]
        raise LabelError(
            f"state {bad} cannot be stored: allowed are POSITIVE ({POSITIVE}) and NEGATIVE ({NEGATIVE}); "
            "leave unobserved pairs out"
        )
    stored, order = sorted_keys(keys)
    row_of = np.empty(len(order), np.int64)
    row_of[order] = np.arange(len(order))
    row = row_of[image.astype(np.int64)]
    pairs = (row << 32) | (cls.astype(np.int64) << 1) | (state == POSITIVE)
    pairs.sort()
    twice = np.flatnonzero((pairs[1:] >> 1) == (pairs[:-1] >> 1))
    if len(twice):
        pair = int(pairs[twice[0]])
        key = keys[int(order[pair >> 32])]
        raise LabelError(
            f"image {key!s} and class {classes[(pair & 0xFFFFFFFF) >> 1]!r} stand twice: a pair has one state at most"
        )
    offsets = np.zeros(len(order) + 1, np.int64)
    np.cumsum(np.bincount(pairs >> 32, minlength=len(order)), out=offsets[1:])
    return write_table(
        out,
        keys=stored,
        offsets=offsets,
        codes=(pairs & 0xFFFFFFFF).astype(code_type(len(classes))),
        classes=classes,
        names=classes if names is None else names,
        metadata=metadata or {},
    )


def select_images(table: LabelTable, keys: Sequence[str] | pa.Array, out: str) -> LabelTable:
    """Write the part of `table` that holds `keys`, and open it. Raises LabelError for a key that it lacks."""
    rows = table.rows_of(keys)
    if (rows < 0).any():
        first = as_strings(keys)[int(np.flatnonzero(rows < 0)[0])].as_py()
        raise LabelError(
            f"{int((rows < 0).sum())} of {len(rows)} keys are not in label table {table.path!r}, "
            f"the first is {first!r}: keep those for which rows_of gives 0 or more"
        )
    triples = table.lookup(rows)
    return table_from_triples(keys, table.classes, table.names, *triples, out, metadata={"selected_from": table.digest})
