"""A manifest for WebDataset shards that others wrote: one pass over the tar files, which stay in place."""

import hashlib
import io
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.shards.images import BadImage, image_size
from paml.shards.manifest import Manifest, ShardInfo, make_batch, rejects_csv, write_manifest
from paml.sources.tars import BadMember, TarDamage, list_tars, open_tar, walk_tar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
"""WebDataset's own rule: folders and the name up to its first dot, then the extension."""

log = logging.getLogger(__name__)


class _Row(NamedTuple):
    key: str
    offset: int
    size: int
    crc32: int
    width: int
    height: int


class _HashingReader(io.RawIOBase):
    """Reads a seekable file and takes the SHA-256 of all of it on the way, whatever the reader skips."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file, self._at, self._hashed = file, 0, 0
        self._sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            self._at = self._file.seek(offset, whence)
        else:
            self._at = offset + (self._at if whence == os.SEEK_CUR else 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._hash_up_to(self._at)
        self._file.seek(self._at)
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        new = self._at + len(data) - self._hashed
        if new > 0:
            self._sha256.update(data[len(data) - new :])
            self._hashed += new
        self._at += len(data)
        return len(data)

    def _hash_up_to(self, end: int | None) -> None:
        self._file.seek(self._hashed)
        while end is None or self._hashed < end:
            data = self._file.read(8 << 20 if end is None else min(8 << 20, end - self._hashed))
            if not data:
                return
            self._sha256.update(data)
            self._hashed += len(data)

    def finish(self) -> tuple[str, int]:
        """(hex SHA-256, size in bytes) of the whole file."""
        self._hash_up_to(None)
        return self._sha256.hexdigest(), self._hashed


def index_shards(
    tars: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Manifest:
    """Write `manifest.arrow` to the folder `out` for tar files (or all below a folder), and open it.

    A sample's image is its first member with the extension jpg, jpeg, png or webp; its key is WebDataset's
    (the name up to the first dot, folders included). Samples without an image, images whose header cannot be read,
    a second image of a sample, keys seen before and damaged tar files go to `rejects.csv` with the reason;
    `Manifest.report` counts them. Raises DataError where no image was found or a tar is compressed.
    """
    out = os.fspath(out)
    paths = list_tars(tars)
    packed = [path for path in paths if not path.endswith(".tar")]
    if packed:
        raise DataError(f"{packed[0]} is compressed: its images cannot be read by offset: unpack it first")
    storage.ensure_writable(out)
    shards: list[ShardInfo] = []
    kept: list[tuple[int, _Row]] = []
    rejects: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for done, (path, result) in enumerate(zip(paths, pool.map(_index_tar, paths), strict=True), start=1):
            rows, (sha256, size), faults = result
            rejects.extend(faults)
            count = 0
            for row in rows:
                if row.key in seen:
                    rejects.append((row.key, f"in {path}, but seen before in {seen[row.key]}"))
                    continue
                seen[row.key] = path
                kept.append((len(shards), row))
                count += 1
            shards.append(ShardInfo(_name_within(out, path), count, size, sha256))
            if progress is not None:
                progress("shards", done, len(paths))
    storage.write_bytes(storage.join(out, "rejects.csv"), rejects_csv(rejects))
    if rejects:
        log.warning("%d rejected while indexing, see rejects.csv in %s", len(rejects), out)
    if not kept:
        raise DataError(
            f"no image (a member ending in {', '.join(IMAGE_EXTENSIONS)}) in {len(paths)} tar files: see "
            f"rejects.csv in {out}; the first tar file is {paths[0]}"
        )
    batch = make_batch(
        keys=[row.key for _, row in kept],
        shard=np.array([shard for shard, _ in kept], np.int32),
        offset=np.array([row.offset for _, row in kept], np.int64),
        size=np.array([row.size for _, row in kept], np.int32),
        crc32=np.array([row.crc32 for _, row in kept], np.uint32),
        width=np.array([row.width for _, row in kept], np.int32),
        height=np.array([row.height for _, row in kept], np.int32),
    )
    report = {"written": len(kept), "rejected": len(rejects), "shards": len(shards)}
    return write_manifest(out, batch, shards, settings={}, report=report)


def _name_within(out: str, path: str) -> str:
    """A shard's name in the manifest: relative where it lies below the manifest's folder."""
    if storage.is_remote(path) != storage.is_remote(out):
        return path if storage.is_remote(path) else os.path.abspath(path)
    if storage.is_remote(path):
        root = out.rstrip("/") + "/"
        return path.removeprefix(root)
    root, path = os.path.abspath(out), os.path.abspath(path)
    return os.path.relpath(path, root) if os.path.commonpath([root, path]) == root else path


def _key_fault(key: str) -> str | None:
    """Why no manifest can hold a key; None where it can."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return "the name is not valid UTF-8: rename the member"
    return None


def _index_tar(path: str) -> tuple[list[_Row], tuple[str, int], list[tuple[str, str]]]:
    """(images, SHA-256 and size, rejects) of one tar file."""
    rows: list[_Row] = []
    rejects: list[tuple[str, str]] = []
    with_image: set[str] = set()
    keys: dict[str, None] = {}
    with open_tar(path) as file:
        hashing = _HashingReader(file)
        buffered = io.BufferedReader(cast(io.RawIOBase, hashing), 1 << 20)
        try:
            for member in walk_tar(buffered, path, unpack=False):
                match = _KEY.match(member.name)
                if match is None or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                key, extension = match[1], match[2].lower()
                if fault := _key_fault(key):
                    rejects.append((key, f"{fault} (in {path})"))
                    continue
                keys[key] = None
                if extension not in IMAGE_EXTENSIONS:
                    continue
                if key in with_image:
                    rejects.append((key, f"a second image of the sample in {path}: {member.name}"))
                    continue
                with_image.add(key)
                try:
                    data = member.read()
                    width, height = image_size(data)
                except (BadImage, BadMember) as bad:
                    rejects.append((key, f"{bad} (in {path})"))
                    continue
                rows.append(_Row(key, member.offset, member.size, zlib.crc32(data), width, height))
        except TarDamage as damage:
            rejects.append((path, str(damage)))
        rejects.extend((key, f"no image in the sample (in {path})") for key in keys if key not in with_image)
        return rows, hashing.finish(), rejects
