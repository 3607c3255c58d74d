"""A stock `webdataset` pipeline over shards, joined to a label table by key, for custom training loops."""

import bisect
import logging
import os
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any
from urllib.parse import unquote

import numpy as np

from paml import storage
from paml.errors import DataError
from paml.labels.states import UNOBSERVED
from paml.labels.table import LabelTable
from paml.shards.index import IMAGE_EXTENSIONS
from paml.shards.manifest import MANIFEST_NAME, Manifest
from paml.sources.tars import list_tars

log = logging.getLogger(__name__)


def open_webdataset(
    shards: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    table: LabelTable,
    *,
    decode: str | None = "rgb8",
    shardshuffle: bool | int = False,
    **options: Any,
) -> Any:
    """A `webdataset.WebDataset` of dicts with `__key__`, `image` and `states`, over shards written by paml or others::

        dataset = open_webdataset("data/mine/shards/train", table, decode="torchrgb", shardshuffle=100)
        for image, states in dataset.shuffle(1000).to_tuple("image", "states"):
            ...

    `states` is int8 [K]: 1 positive, 0 negative, -1 unobserved.

    shards: a folder of tar files, or paths or URLs of tar files (local, s3:// or any URL that webdataset supports).
    decode: a `webdataset` image format (rgb8: uint8 [H, W, 3]; torchrgb: float32 [3, H, W]; pil; …); None for bytes.
    shardshuffle, options: arguments of `webdataset.WebDataset`, such as nodesplitter.

    Skips images that are not in the table; each iteration logs their number. Raises DataError if the table has none of
    the images: at once for a folder with a manifest, otherwise at the end of an iteration.
    """
    from webdataset.compat import WebDataset

    urls, manifest = _find_shards(shards)
    if manifest is not None and len(manifest) and not (table.rows_of(manifest.keys()) >= 0).any():
        raise _no_match_error(manifest.key(0), len(manifest), table)
    dataset: Any = WebDataset(urls, shardshuffle=shardshuffle, **options)
    dataset.pipeline.insert(1, _enable_s3)
    dataset.append(partial(_join_labels, table=table, verified=manifest is not None))
    if decode is not None:
        dataset = dataset.decode(decode, only=IMAGE_EXTENSIONS)
    return dataset.map(_rename_image)


def _find_shards(shards: Any) -> tuple[list[str], Manifest | None]:
    """(paths or URLs of the tar files, the folder's manifest if it has one)."""
    if not isinstance(shards, str | os.PathLike):
        return [os.fspath(shard) for shard in shards], None
    path = os.fspath(shards)
    if path.endswith(".tar") or ("://" in path and not storage.is_remote(path)):
        return [path], None
    if storage.exists(storage.join(path, MANIFEST_NAME)):
        manifest = Manifest.open(path)
        return [manifest.shard_path(shard) for shard in range(len(manifest.shards))], manifest
    return list_tars(path), None


def _enable_s3(urls: Iterable[Any]) -> Iterator[Any]:
    """A pipeline stage that lets webdataset open s3:// URLs in this process, with the retries of `paml.storage`."""
    from importlib import import_module

    schemes = import_module("webdataset.gopen").gopen_schemes
    schemes.setdefault("s3", lambda url, *_args, **_kwargs: storage.open_input(url))
    yield from urls


def _join_labels(samples: Iterable[dict[str, Any]], table: LabelTable, verified: bool) -> Iterator[dict[str, Any]]:
    """A pipeline stage that adds `states` to samples and yields one image of each.

    verified: whether a manifest shows that the table has some of the images.
    """
    total, unlabeled, example = 0, 0, ""
    for sample in samples:
        extension = next((name for name in sample if name in IMAGE_EXTENSIONS), None)
        if extension is None:
            continue
        key, total = sample["__key__"], total + 1
        row = _find_row(table, key)
        if row is None and "%" in key:  # the shard writer escapes some characters of keys
            row = _find_row(table, unquote(key))
        if row is None:
            unlabeled, example = unlabeled + 1, example or key
            continue
        labels, states = table.lookup([row]), np.full(table.num_classes, UNOBSERVED, np.int8)
        states[labels.cls] = labels.state
        yield {"__key__": key, extension: sample[extension], "states": states}
    if unlabeled:
        if unlabeled == total and not verified:
            raise _no_match_error(example, total, table)
        log.warning("%d of %d images are not in %s, such as %r", unlabeled, total, table.path, example)


def _find_row(table: LabelTable, key: str) -> int | None:
    if table.has_hex_keys:
        row = int(table.rows_of([key])[0])
        return row if row >= 0 else None
    keys = table.key_column()  # sorted
    row = bisect.bisect_left(range(len(keys)), key, key=lambda row: keys[row].as_py())
    return row if row < len(keys) and keys[row].as_py() == key else None


def _rename_image(sample: dict[str, Any]) -> dict[str, Any]:
    return {"image" if name in IMAGE_EXTENSIONS else name: value for name, value in sample.items()}


def _no_match_error(key: str, images: int, table: LabelTable) -> DataError:
    example = repr(table.keys([0])[0]) if table.num_images else "none"
    return DataError(
        f"none of {images:,} images is in the label table {table.path}: a key of the shards is {key!r}, a key of the "
        f"table is {example}: use shards and a table of the same data set"
    )
