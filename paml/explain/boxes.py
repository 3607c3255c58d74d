"""Boxes of objects, read from the CSV of Open Images (`annotations-human-bbox.csv`)."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from paml import storage
from paml.errors import DataError

EDGES = ("XMin", "XMax", "YMin", "YMax")


@dataclasses.dataclass(frozen=True)
class Boxes:
    """The boxes of some images."""

    of: dict[tuple[str, str], np.ndarray]
    """(image key, MID) to float64 [b, 4]: x_min, x_max, y_min, y_max as shares of the picture's sides."""
    rows: int
    """Rows of the file."""
    malformed: int
    """Rows left out since their edges are not 0 ≤ min < max ≤ 1."""


def read_boxes(path: str, keys: Sequence[str], classes: Sequence[str]) -> Boxes:
    """The boxes of these images and classes, read in one streamed pass; all other rows are passed over.

    path: CSV, local or s3://, of Open Images V2 to V7 (ImageID, Source, LabelName, Confidence, XMin, XMax, YMin,
    YMax, more); the columns are found by name, and boxes of groups count as boxes. The edges hold for shards too,
    since they resize pictures without cutting. Raises DataError where a column is missing or no number.
    """
    columns = ("ImageID", "LabelName", *EDGES)
    types: dict[str, pa.DataType] = {"ImageID": pa.string(), "LabelName": pa.string()}
    wanted = csv.ConvertOptions(column_types=types | dict.fromkeys(EDGES, pa.float64()), include_columns=list(columns))
    images, mids = pa.array(keys, pa.string()), pa.array(classes, pa.string())
    found: dict[tuple[str, str], list[list[float]]] = {}
    rows = malformed = 0
    try:
        with storage.open_input(path) as file, csv.open_csv(file, convert_options=wanted) as reader:
            for batch in reader:
                rows += batch.num_rows
                kept = batch.filter(
                    pc.and_(pc.is_in(batch["ImageID"], value_set=images), pc.is_in(batch["LabelName"], value_set=mids))  # pyright: ignore[reportAttributeAccessIssue]
                )
                edges = np.stack([kept[name].to_numpy(zero_copy_only=False) for name in EDGES], axis=1)
                sound = np.asarray(
                    (edges >= 0).all(1) & (edges <= 1).all(1) & (edges[:, [1, 3]] > edges[:, [0, 2]]).all(1)
                )
                malformed += int((~sound).sum())
                names = zip(kept["ImageID"].to_pylist(), kept["LabelName"].to_pylist(), strict=True)
                for pair, box, good in zip(names, edges.tolist(), sound.tolist(), strict=True):
                    if good:
                        found.setdefault(pair, []).append(box)
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there: --boxes names a CSV of boxes ({','.join(columns)})") from error
    except (pa.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no CSV of boxes with the columns {','.join(columns)}: {error}") from error
    return Boxes({pair: np.array(boxes) for pair, boxes in found.items()}, rows, malformed)
