"""Create a manifest for existing WebDataset shards, which remain unchanged."""

import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from paml import storage
from paml.checksum import crc32_of
from paml.errors import DataError
from paml.shards.images import UndecodableError, image_size
from paml.shards.manifest import SCHEMA, Manifest, ShardInfo, write_manifest, write_rejects
from paml.sources.tars import BadMember, Paths, TarDamage, list_tars, walk_tar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
"""WebDataset's rule: folders and the name up to its first dot, then the extension."""

log = logging.getLogger(__name__)


def index_shards(tars: Paths, out: str | os.PathLike[str]) -> Manifest:
    """Write `manifest.arrow` for tar files, or for all below a folder, to the folder `out`, and open it.

    A sample's image is its first member with the extension jpg, jpeg, png or webp. Its key is WebDataset's: the name,
    with folders, up to the first dot. `rejects.csv` lists samples without an image, images with an unreadable header,
    second images of a sample, duplicate keys and damaged tar files; `Manifest.report` counts them. Raises DataError if
    there is no image, or a tar file is compressed.
    """
    out = os.fspath(out)
    paths = list_tars(tars)
    compressed = [path for path in paths if not path.endswith(".tar")]
    if compressed:
        raise DataError(f"{compressed[0]} is compressed and cannot be read by offset: uncompress it first")
    storage.ensure_writable(out)
    shards: list[ShardInfo] = []
    batches: list[pa.RecordBatch] = []
    rejects: list[tuple[str, str]] = []
    tar_of_key: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = pool.map(_index_tar, paths)
        for path, (tar_rows, (sha256, size), tar_rejects) in zip(paths, results, strict=True):
            rejects.extend(tar_rejects)
            unique = []
            for row in tar_rows:
                if row["key"] in tar_of_key:
                    rejects.append((row["key"], f"in {path}: duplicate of the one in {tar_of_key[row['key']]}"))
                    continue
                tar_of_key[row["key"]] = path
                unique.append(row | {"shard": len(shards)})
            batches.append(pa.RecordBatch.from_pylist(unique, schema=SCHEMA))
            shards.append(ShardInfo(_name_within(out, path), len(unique), size, sha256))
    write_rejects(out, sorted(rejects))
    if rejects:
        log.warning("%d rejected while indexing: see rejects.csv in %s", len(rejects), out)
    if not tar_of_key:
        raise DataError(
            f"no image (a member ending in {', '.join(IMAGE_EXTENSIONS)}) in {len(paths)} tar files: see "
            f"rejects.csv in {out}; the first tar file is {paths[0]}"
        )
    report = {"written": len(tar_of_key), "rejected": len(rejects), "shards": len(shards)}
    return write_manifest(out, pa.concat_batches(batches), shards, settings={}, report=report)


def _name_within(out: str, path: str) -> str:
    """A shard's name in the manifest: relative if it is below the manifest's folder."""
    out, path = (name if storage.is_remote(name) else os.path.abspath(name) for name in (out, path))
    return path.removeprefix(out.rstrip("/") + "/")


def _index_tar(path: str) -> tuple[list[dict[str, Any]], tuple[str, int], list[tuple[str, str]]]:
    """(rows of the manifest without `shard`, SHA-256 and size, rejects) of one tar file."""
    rows: list[dict[str, Any]] = []
    rejects: list[tuple[str, str]] = []
    with_image: set[str] = set()
    keys: dict[str, None] = {}
    with storage.local_file(path) as local, open(local, "rb") as file:
        try:
            for member in walk_tar(file, path, unpack=False):
                match = _KEY.match(member.name)
                if match is None or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                key, extension = match[1], match[2].lower()
                try:
                    key.encode()
                except UnicodeEncodeError:
                    rejects.append((key, f"the name is not valid UTF-8: rename the member (in {path})"))
                    continue
                keys[key] = None
                if extension not in IMAGE_EXTENSIONS:
                    continue
                if key in with_image:
                    rejects.append((key, f"second image of the sample in {path}: {member.name}"))
                    continue
                with_image.add(key)
                try:
                    data = member.read()
                    width, height = image_size(data)
                except (UndecodableError, BadMember) as error:
                    rejects.append((key, f"{error} (in {path})"))
                    continue
                row = {"key": key, "offset": member.offset, "size": member.size, "crc32": crc32_of(data)}
                rows.append(row | {"width": width, "height": height})
        except TarDamage as error:
            rejects.append((path, str(error)))
        rejects.extend((key, f"no image in the sample (in {path})") for key in keys if key not in with_image)
        return rows, storage.sha256_of(local), rejects
