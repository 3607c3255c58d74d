"""A label table as Parquet for other tools, such as `datasets.load_dataset("parquet", data_files=...)`."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from paml import storage
from paml.labels.edit import check_outputs
from paml.labels.keys import as_text
from paml.labels.states import NEGATIVE, POSITIVE
from paml.labels.table import LabelTable

_BLOCK_ROWS = 1 << 17
_TEXT = {"dtype": "string", "_type": "Value"}
_TEXTS = {"feature": _TEXT, "_type": "Sequence"}
COLUMNS = {"image": _TEXT, "positive": _TEXTS, "negative": _TEXTS}
"""The features of the file, as Hugging Face's `datasets` stores them in a schema. Versions 2 to 4 read `Sequence`."""


def export_parquet(table: LabelTable, out: str) -> None:
    """Write a row per image, by key: `image` (the key), and the lists `positive` and `negative` of its classes.

    A class in neither list is unobserved. Metadata `paml` (JSON): the table's classes and their names, in its order.
    Raises LabelError if `out` is the table itself.
    """
    check_outputs([out], [table.path])
    classes = pa.array(table.classes, pa.string())
    metadata = {
        "huggingface": json.dumps({"info": {"features": COLUMNS}}),
        "paml": json.dumps({"classes": table.classes, "names": table.names, "digest": table.digest}),
    }
    fields = [("image", pa.string()), ("positive", pa.list_(pa.string())), ("negative", pa.list_(pa.string()))]
    schema = pa.schema(fields, metadata)
    with (
        storage.replacing(out) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for start in range(0, max(1, table.num_images), _BLOCK_ROWS):
            rows = np.arange(start, min(start + _BLOCK_ROWS, table.num_images))
            labels = table.lookup(rows)
            lists = []
            for state in (POSITIVE, NEGATIVE):
                chosen = labels.state == state
                ends = np.cumsum(np.bincount(labels.image[chosen], minlength=len(rows)))
                offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
                lists.append(pa.ListArray.from_arrays(offsets, classes.take(pa.array(labels.cls[chosen]))))
            keys = as_text(table.key_column().take(pa.array(rows)))
            writer.write_table(pa.table([keys.cast(pa.string()), *lists], schema=schema))
