"""Data files of Hugging Face `datasets`: their rows without the images, and the images as parts.

Parquet is read by row group, Arrow streams (as `datasets` saves them) by batch. Metadata of an image folder is CSV or
JSON lines with a column `file_name`.
"""

import posixpath
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from paml import storage
from paml.errors import DataError, StorageError
from paml.parsing import PARSE_ERRORS, parse_errors_as
from paml.sources.folder import IMAGE_SUFFIXES
from paml.sources.parts import MAX_IMAGE_BYTES, Part, Payload, fingerprint

HINT = "download it again, or write it again with datasets"
_PART_IMAGES = 2000
_BATCH_IMAGES = 64
_JSON_BLOCK = 1 << 24
_FILE_MAGIC = b"ARROW1"
_SUFFIX = "(?i)([^/])(?:" + "|".join(suffix.replace(".", r"\.") for suffix in sorted(IMAGE_SUFFIXES)) + ")$"


class DataFile(NamedTuple):
    """A file of rows, in pieces: row groups, batches, or one table."""

    path: str
    kind: str
    schema: pa.Schema
    places: list[int]
    """The index of each row group, or the offset in bytes of each batch."""
    counts: list[int]
    """Rows of each piece."""
    table: pa.Table | None = None
    """The rows of a metadata file."""


def read_schema(path: str) -> pa.Schema:
    """The schema of a Parquet or Arrow file. Raises DataError, FileNotFoundError or StorageError."""
    with parse_errors_as(path, HINT, also=(OSError, EOFError)), _open_input(path) as file:
        return _read_arrow_schema(file) if path.endswith(".arrow") else pq.read_schema(file)


def open_file(path: str) -> DataFile:
    """The pieces of a file. Raises DataError, FileNotFoundError or StorageError."""
    with parse_errors_as(path, HINT, also=(OSError, EOFError)), _open_input(path) as file:
        if path.endswith(".parquet"):
            parquet = pq.ParquetFile(file)
            groups = range(parquet.num_row_groups)
            counts = [parquet.metadata.row_group(group).num_rows for group in groups]
            return DataFile(path, "Parquet", parquet.schema_arrow, list(groups), counts)
        if path.endswith(".arrow"):
            schema = _read_arrow_schema(file)
            sizes = [(place, batch.num_rows) for place, batch in _walk_arrow(file, schema, path, schema.names[:1])]
            return DataFile(path, "Arrow", schema, [place for place, _ in sizes], [count for _, count in sizes])
        if path.endswith(".csv"):
            table = pacsv.read_csv(file)
        else:
            table = pajson.read_json(file, read_options=pajson.ReadOptions(block_size=_JSON_BLOCK))
        return DataFile(path, "metadata", table.schema, [0], [len(table)], table)


def _open_input(path: str) -> pa.NativeFile:
    """Local Arrow files are mapped into memory, so that images are not read with the other columns."""
    is_mapped = path.endswith(".arrow") and not storage.is_remote(path)
    return pa.memory_map(path) if is_mapped else storage.open_input(path)


def _read_arrow_schema(file: pa.NativeFile) -> pa.Schema:
    """The schema at the start of an Arrow stream; a file in Arrow's other format is a stream after 8 bytes."""
    file.seek(8 if file.read(len(_FILE_MAGIC)) == _FILE_MAGIC else 0)
    return pa.ipc.read_schema(pa.ipc.read_message(file))


def _walk_arrow(
    file: pa.NativeFile, schema: pa.Schema, path: str, columns: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(offset in bytes, some columns) of the batches from the current position of an Arrow stream to its end.

    Raises DataError, and ArrowInvalid for columns whose parts do not fit together: using them could crash the process.
    """
    while True:
        place = file.tell()
        try:
            message = pa.ipc.read_message(file)
        except EOFError:
            if file.tell() == place:
                raise DataError(f"{path} is truncated, because it has no end mark: {HINT}") from None
            return
        if message.type != "record batch":
            raise DataError(f"{path} has dictionary-encoded columns, which are not read: save it as Parquet")
        batch = pa.ipc.read_record_batch(message, schema)
        batch = batch.select(columns)
        batch.validate(full=True)
        yield place, batch


def is_embedded(kind: pa.DataType) -> bool:
    """Whether a column can hold images: bytes, or a struct with bytes."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_embedded(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def read_rows(file: DataFile, names: Sequence[str], image: str) -> tuple[pa.Table, pa.ChunkedArray]:
    """(the columns `names`, the paths in the column `image` as string) of all rows; null for an unknown path."""
    kind = file.schema.field(image).type
    is_struct = pa.types.is_struct(kind)
    has_paths = kind.get_field_index("path") >= 0 if is_struct else not is_embedded(kind)
    if file.table is not None:
        table = file.table
    elif file.kind == "Parquet":
        leaf = [f"{image}.path" if is_struct else image] if has_paths else []
        with storage.open_input(file.path) as source:
            table = pq.ParquetFile(source).read(columns=list(dict.fromkeys([*names, *leaf])))
    else:
        wanted = list(dict.fromkeys([*names, image]))
        with _open_input(file.path) as source:
            schema = _read_arrow_schema(source)
            batches = [batch for _, batch in _walk_arrow(source, schema, file.path, wanted)]
        table = pa.Table.from_batches(batches, pa.schema([schema.field(name) for name in wanted]))
    table.select(names).validate(full=True)  # Parquet does not guarantee that text is valid UTF-8
    if not has_paths:
        return table.select(names), pa.chunked_array([pa.nulls(sum(file.counts), pa.string())])
    return table.select(names), pa.chunked_array(map(_paths, table.column(image).chunks), pa.string())


def _paths(column: pa.Array) -> pa.Array:
    """The paths of images as string; a blank one is null."""
    texts = column
    if pa.types.is_struct(column.type):
        texts = column.flatten()[column.type.get_field_index("path")]
    texts = texts.cast(pa.string())
    texts.validate(full=True)
    return pc.call_function("replace_with_mask", [texts, _is_blank(texts), pa.scalar(None, pa.string())])


def _is_blank(texts: pa.Array) -> pa.Array:
    return pc.call_function("equal", [texts, pa.scalar("")]).fill_null(False)


def has_bytes(file: DataFile, image: str) -> bool:
    """Whether any image is in the file itself."""
    kind = file.schema.field(image).type
    if not is_embedded(kind):
        return False
    with _open_input(file.path) as source:
        if file.kind == "Parquet":  # not by its statistics: reading damaged ones ends the process
            leaf = f"{image}.bytes" if pa.types.is_struct(kind) else image
            batches = pq.ParquetFile(source).iter_batches(_BATCH_IMAGES, columns=[leaf])
            return any(len(batch) > _bytes(batch.column(0)).null_count for batch in batches)
        schema = _read_arrow_schema(source)
        walk = _walk_arrow(source, schema, file.path, [image])
        return any(len(batch) > _bytes(batch.column(image)).null_count for _, batch in walk)


def _bytes(column: pa.Array) -> pa.Array:
    """The bytes of images."""
    if pa.types.is_struct(column.type):
        return column.flatten()[column.type.get_field_index("bytes")]
    return column


# --- images --------------------------------------------------------------------------------------------------------


def path_keys(paths: pa.Array) -> pa.Array:
    """The keys of images by their paths: with forward slashes, in Unicode's composed form, without the suffix."""
    texts = pc.call_function("utf8_normalize", [paths], pc.Utf8NormalizeOptions("NFC"))
    texts = pc.call_function("replace_substring", [texts], pc.ReplaceSubstringOptions("\\", "/"))
    for pattern, text in ((r"^(?:\./|/)+", ""), (_SUFFIX, r"\1")):
        texts = pc.call_function("replace_substring_regex", [texts], pc.ReplaceSubstringOptions(pattern, text))
    return texts


def row_keys(stem: str, first: int, count: int) -> list[str]:
    """The keys of images without usable paths: the file's name and the number of the row, from 0."""
    return [f"{stem}-{row:07d}" for row in range(first, first + count)]


def image_parts(file: DataFile, image: str, stem: str | None) -> list[Part]:
    """The images in a file, about 2,000 or one piece per part. stem: for `row_keys`; None: keys are `path_keys`."""
    size = storage.size_of(file.path)
    parts: list[Part] = []
    places: list[int] = []
    first = count = 0
    for number, (place, rows) in enumerate(zip(file.places, file.counts, strict=True), 1):
        places.append(place)
        count += rows
        if count < _PART_IMAGES and number < len(file.places):
            continue
        digits = fingerprint([file.path, str(size), image, str(stem), *map(str, places)])
        read = partial(_read_images, file.path, image, stem, tuple(places), first)
        parts.append(Part(f"{posixpath.basename(file.path)}-{len(parts):05d}-{digits}", read, count))
        places, first, count = [], first + count, 0
    return parts


def _read_images(
    path: str, image: str, stem: str | None, places: Sequence[int], first: int
) -> Iterator[tuple[str, Payload]]:
    """(key, payload) of the images in some pieces, whose first row is `first`; at damage (path, DataError)."""
    try:
        for column in _image_columns(path, image, places):
            keys = path_keys(_paths(column)).to_pylist() if stem is None else row_keys(stem, first, len(column))
            yield from zip(keys, _payloads(_bytes(column), path, first), strict=True)
            first += len(column)
    except (StorageError, FileNotFoundError):
        raise
    except (*PARSE_ERRORS, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(error.errno, f"cannot read {path!r} to its end: {error}: try again") from error
        yield path, DataError(f"{path} is damaged after row {first}: {error}: {HINT}")


def _image_columns(path: str, image: str, places: Sequence[int]) -> Iterator[pa.Array]:
    with _open_input(path) as source:
        if path.endswith(".parquet"):
            parquet = pq.ParquetFile(source)
            for place in places:
                for batch in parquet.iter_batches(_BATCH_IMAGES, row_groups=[place], columns=[image]):
                    yield batch.column(0)
            return
        schema = _read_arrow_schema(source)
        for place in places:
            source.seek(place)
            yield next(_walk_arrow(source, schema, path, [image]))[1].column(image)


def _payloads(images: pa.Array, path: str, first: int) -> Iterator[Payload]:
    sizes = pc.call_function("binary_length", [images]).fill_null(-1).to_pylist()
    for number, size in enumerate(sizes):
        if size < 0:
            yield DataError(f"row {first + number} of {path} has no image")
        elif size > MAX_IMAGE_BYTES:
            yield DataError(f"row {first + number} of {path} has {size:,} bytes, allowed are {MAX_IMAGE_BYTES:,}")
        else:
            yield images[number].as_py()
