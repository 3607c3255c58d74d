"""Bounding boxes from the CSV files of Open Images (`annotations-human-bbox.csv`)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from paml import storage
from paml.errors import DataError

EDGES = ["XMin", "XMax", "YMin", "YMax"]
COLUMNS = ["ImageID", "LabelName", *EDGES]


class Boxes(NamedTuple):
    """The boxes of some images and classes."""

    by_label: dict[tuple[str, str], np.ndarray]
    """(image key, MID) to float64 [b, 4]: x_min, x_max, y_min, y_max as fractions of the image's sides."""
    rows: int
    """Rows of the file."""
    malformed: int
    """Rows skipped because their edges are not 0 ≤ min < max ≤ 1."""


def read_boxes(path: str, keys: Sequence[str], classes: Sequence[str]) -> Boxes:
    """Read the boxes of these images and classes (at least one of each) in one streaming pass.

    path: CSV file of Open Images V2 to V7, local or remote. Columns are identified by name; boxes of groups count.
    Boxes are valid for shards too, because shards resize images without cropping. Raises DataError if a column is
    missing, an edge is not a number, or no box is valid and of these images and classes.
    """
    types = dict.fromkeys(COLUMNS[:2], pa.string()) | dict.fromkeys(EDGES, pa.float64())
    convert = csv.ConvertOptions(column_types=types, include_columns=COLUMNS)
    images, mids = pc.field("ImageID").isin(list(keys)), pc.field("LabelName").isin(list(classes))
    selected, rows, example = [], 0, "none"
    try:
        with storage.open_input(path) as file, csv.open_csv(file, convert_options=convert) as reader:
            for batch in reader:
                if not rows and batch.num_rows:
                    example = f"of image {batch['ImageID'][0]} and class {batch['LabelName'][0]}"
                rows += batch.num_rows
                selected.append(pa.Table.from_batches([batch]).filter(images & mids))
            frame = pa.concat_tables([reader.schema.empty_table(), *selected]).to_pandas()
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist: set boxes to a CSV file with the columns {','.join(COLUMNS)}"
        ) from error
    except (pa.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a CSV file of boxes with the columns {','.join(COLUMNS)}: {error}") from error
    inside = frame[EDGES].ge(0).all(axis=1) & frame[EDGES].le(1).all(axis=1)
    valid = frame[inside & (frame["XMin"] < frame["XMax"]) & (frame["YMin"] < frame["YMax"])]
    by_label = {label: boxes[EDGES].to_numpy() for label, boxes in valid.groupby(COLUMNS[:2], sort=False)}
    if not by_label:
        raise DataError(
            f"none of the {rows:,} boxes of {path} can be used ({len(frame) - len(valid):,} have invalid edges): the "
            f"first box is {example}, the first image is {keys[0]} and the first class {classes[0]}: set boxes to a "
            "file of the same images and classes, or to null"
        )
    return Boxes(by_label, rows, len(frame) - len(valid))
