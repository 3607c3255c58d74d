"""A prediction, with the true labels and maps, as a data set that FiftyOne opens:

`fiftyone.Dataset.from_dir(out, dataset_type=fiftyone.types.FiftyOneDataset)`

Format: https://docs.voxel51.com/user_guide/export_datasets.html#fiftyonedataset
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from paml import storage
from paml.audit.page import map_grays
from paml.errors import DataError, check_setting
from paml.inference.bulk import BulkSettings, image_parts
from paml.labels.states import NEGATIVE, POSITIVE
from paml.labels.table import LabelTable
from paml.parsing import parse_errors_as, read_json, safe_join
from paml.sources.fiftyone import NEGATIVE_FIELD, POSITIVE_FIELD
from paml.spreadsheet import unescape_formula

PREDICTIONS_FIELD = "predictions"
_FORMAT_VERSION = "1.0.0"
"""The oldest version of FiftyOne that reads the data set; newer ones migrate it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiftyOneExportSettings:
    """What to export."""

    predictions: str
    """Output folder of `paml predict --images`, local or s3://."""
    out: str
    """Folder of the data set. Files are overwritten."""
    images: str | None = None
    """Where the predicted images are, if they were moved; null: as the prediction says. Local image files are named by
    their paths; others are copied to data/."""
    labels: str | None = None
    """Label table with the true labels: fields positive_labels and negative_labels. null: without."""
    top: int | None = 20
    """Predicted classes per image, those of the highest scores; null: all that are stored."""
    maps: int = 3
    """Maps per image, of the first classes, as heatmaps map_1, map_2, ...; needs a prediction with bulk.maps."""

    def __post_init__(self) -> None:
        check_setting(self.top is None or self.top >= 1, "top", self.top, "at least 1")
        check_setting(self.maps >= 0, "maps", self.maps, "at least 0")


def export_fiftyone(settings: FiftyOneExportSettings, log: Callable[[str], None] = print) -> None:
    """Write the data set. Memory: the images of one part of the prediction.

    A class is called by its name, followed by its id if other classes have the name too. The confidence is the
    stored probability, or the sigmoid of the stored logit. Raises DataError for an incomplete prediction, LabelError.
    """
    hint = "name the --out folder of a completed `paml predict --images`"
    path = storage.join(settings.predictions, "prediction.json")
    if not storage.exists(path):
        raise DataError(f"there is no {path}: {hint}")
    about = read_json(path, hint)
    table = None if settings.labels is None else LabelTable.open(settings.labels)
    with parse_errors_as(settings.predictions, hint):
        name_of = _class_names(settings.predictions)
        bulk = BulkSettings(**{name: about[name] for name in ("top", "value", "maps", "keys", "files_per_part")})
        parts = image_parts(settings.images or about["images"], bulk)
    if table is not None:
        name_of = _unique_names([*table.classes], [*table.names]) | name_of
    maps = settings.maps if bulk.maps else 0
    if settings.maps and not bulk.maps:
        log("the prediction has no maps, so there are no heatmaps: predict with --bulk.maps true to have them")
    count = 0
    path = storage.join(settings.out, "samples.json")
    with storage.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write('{"samples": [')
        for part in parts:
            rows = _read_scores(storage.join(settings.predictions, "scores", f"{part.name}.parquet"), settings, bulk)
            truth = {} if table is None else _truth(table, list(rows), name_of)
            for key, payload in part:
                if key not in rows or isinstance(payload, Exception):
                    continue
                mids, scores, images = rows[key]
                labels = [
                    {**_label(key, PREDICTIONS_FIELD, name_of.get(mid, mid)), "confidence": float(score)}
                    for mid, score in zip(mids, scores, strict=True)
                ]
                sample = {
                    "filepath": _write_image(settings.out, key, payload),
                    "tags": [],
                    "_media_type": "image",
                    PREDICTIONS_FIELD: {"_cls": "Classifications", "classifications": labels},
                    **truth.get(key, {}),
                }
                for number, grays in enumerate(images, 1):
                    sample[f"map_{number}"] = _write_map(settings.out, key, number, grays, labels[number - 1]["label"])
                file.write((",\n" if count else "\n") + json.dumps(sample, ensure_ascii=False))
                count += 1
        file.write("\n]}\n")
    fields = [PREDICTIONS_FIELD, *((POSITIVE_FIELD, NEGATIVE_FIELD) if table is not None else ())]
    metadata = _metadata(about, fields, maps, sorted(set(name_of.values())))
    storage.write_bytes(storage.join(settings.out, "metadata.json"), json.dumps(metadata, indent=1).encode())
    log(f"wrote {count:,} samples to {settings.out}; open them with fiftyone.Dataset.from_dir")


def _class_names(folder: str) -> dict[str, str]:
    """The name of each class of the prediction."""
    text = storage.read_bytes(storage.join(folder, "classes.csv")).decode()
    rows = [[unescape_formula(cell) for cell in row] for row in csv.reader(io.StringIO(text, newline=""))][1:]
    return _unique_names([row[1] for row in rows], [row[2] for row in rows])


def _unique_names(mids: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    counts = Counter(names)
    pairs = zip(mids, names, strict=True)
    return {mid: name if name and counts[name] == 1 else f"{name} ({mid})".strip() for mid, name in pairs}


def _read_scores(
    path: str, settings: FiftyOneExportSettings, bulk: BulkSettings
) -> dict[str, tuple[list[str], np.ndarray, list[np.ndarray]]]:
    """(classes, confidences, maps uint8 [h, w]) of each image of a part, the highest score first."""
    try:
        with storage.open_input(path) as file:
            footer, content = pq.read_metadata(file).metadata or {}, pq.read_table(file)
    except FileNotFoundError:
        raise DataError(
            f"there is no {path}: the prediction is incomplete, or the images changed; run it again"
        ) from None
    with parse_errors_as(path, "run the prediction again"):
        all_mids = json.loads(footer[b"mids"]) if bulk.top is None else []
        shape = json.loads(footer[b"map_size"]) if bulk.maps else ()
        rows = {}
        for row in content.to_pylist():
            scores = np.array(row["scores"], np.float64)
            mids = row.get("mids") or all_mids
            order = np.argsort(-scores, kind="stable")[: settings.top].tolist()
            chosen = order[: settings.maps] if bulk.maps else []
            maps = [map_grays(np.array(row["maps"][i], np.float32).reshape(shape)) for i in chosen]
            if bulk.value == "logit":
                scores = 1 / (1 + np.exp(-scores))
            rows[row["key"]] = ([mids[i] for i in order], scores[order], maps)
        return rows


def _truth(table: LabelTable, keys: Sequence[str], name_of: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The fields of the true labels of each image that the table has."""
    rows = table.rows_of(keys)
    known = [key for key, row in zip(keys, rows.tolist(), strict=True) if row >= 0]
    fields: dict[str, dict[str, Any]] = {
        key: {name: {"_cls": "Classifications", "classifications": []} for name in (POSITIVE_FIELD, NEGATIVE_FIELD)}
        for key in known
    }
    labels = table.lookup(rows[rows >= 0])
    for image, cls, state in zip(labels.image.tolist(), labels.cls.tolist(), labels.state.tolist(), strict=True):
        name = {POSITIVE: POSITIVE_FIELD, NEGATIVE: NEGATIVE_FIELD}[state]
        mid = table.classes[cls]
        label = _label(known[image], name, name_of.get(mid, mid))
        fields[known[image]][name]["classifications"].append(label)
    return fields


def _label(key: str, name: str, label: str) -> dict[str, Any]:
    return {"_id": _object_id(key, name, label), "_cls": "Classification", "tags": [], "label": label}


def _object_id(*texts: str) -> dict[str, str]:
    """An id as MongoDB writes them, the same in every export."""
    return {"$oid": hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:24]}


def _write_image(out: str, key: str, payload: bytes | str | os.PathLike[str]) -> str:
    """The path of an image for its sample: of the file itself if it is local, else of a copy below `out`."""
    if not isinstance(payload, bytes):
        path = os.fspath(payload)
        if not storage.is_remote(path):
            return os.path.abspath(path)
        payload = storage.read_bytes(path)
    with Image.open(io.BytesIO(payload)) as image:
        suffix = {"JPEG": "jpg"}.get(image.format or "", (image.format or "img").lower())
    return _write_below(out, f"data/{key}.{suffix}", payload)


def _write_map(out: str, key: str, number: int, grays: np.ndarray, label: str) -> dict[str, Any]:
    """A Heatmap field; the map, uint8 [h, w], is written as PNG."""
    data = io.BytesIO()
    Image.fromarray(grays).save(data, "PNG")
    field = f"map_{number}"
    path = _write_below(out, f"fields/{field}/{key}.png", data.getvalue())
    return {"_id": _object_id(key, field), "_cls": "Heatmap", "tags": [], "map_path": path, "label": label}


def _write_below(out: str, name: str, data: bytes) -> str:
    try:
        storage.write_bytes(safe_join(out, name), data)
    except ValueError as error:
        raise DataError(f"the key of an image is no file name: {error}; rename the image, then predict again") from None
    return name


def _metadata(about: Mapping[str, Any], fields: Sequence[str], maps: int, classes: Sequence[str]) -> dict[str, Any]:
    """The content of metadata.json: the fields of the samples and their types."""
    text, number = (f"fiftyone.core.fields.{kind}Field" for kind in ("String", "Float"))
    base = [
        {"name": "id", "db_field": "_id", "ftype": "fiftyone.core.fields.ObjectIdField"},
        {"name": "tags", "db_field": "tags", "ftype": "fiftyone.core.fields.ListField", "subfield": text},
    ]
    label = {"name": "label", "db_field": "label", "ftype": text}
    confidence = {"name": "confidence", "db_field": "confidence", "ftype": number}
    labels = {
        "name": "classifications",
        "db_field": "classifications",
        "ftype": "fiftyone.core.fields.ListField",
        "subfield": "fiftyone.core.fields.EmbeddedDocumentField",
        "embedded_doc_type": "fiftyone.core.labels.Classification",
        "fields": [*base, label, confidence],
    }
    map_path = {"name": "map_path", "db_field": "map_path", "ftype": text}

    def field(name: str, kind: str, parts: Sequence[Any]) -> dict[str, Any]:
        kinds = {
            "ftype": "fiftyone.core.fields.EmbeddedDocumentField",
            "embedded_doc_type": f"fiftyone.core.labels.{kind}",
        }
        return {"name": name, "db_field": name, **kinds, "fields": parts}

    return {
        "version": _FORMAT_VERSION,
        "media_type": "image",
        "info": {"model": about["model"], "model_digest": about["model_digest"]},
        "default_classes": classes,
        "sample_fields": [
            *base,
            {"name": "filepath", "db_field": "filepath", "ftype": text},
            *(field(name, "Classifications", [labels]) for name in fields),
            *(field(f"map_{number}", "Heatmap", [*base, map_path, label]) for number in range(1, maps + 1)),
        ],
    }
