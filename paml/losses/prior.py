"""A file of class priors, columns `mid` and `prior`: the share of images that show a class, as a network estimates it.

`python -m paml.training.prior` makes one of a trained run. Rows are found by MID, never by their order.
"""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from paml import storage
from paml.errors import DataError
from paml.reading import reading

NAMED = 5
"""MIDs named in an error."""


def read_prior(path: str, classes: Sequence[str]) -> np.ndarray:
    """float64[K], the prior of each of `classes`, from a CSV or Parquet file (by its ending, .parquet).

    Raises DataError for a file that is absent or not readable so, and where MIDs repeat, are not among `classes` or
    lack among the file's, and for a prior outside [0, 1].
    """
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise DataError(
            f"loss.p_asl.prior_file: {path} is not there. Train a run with loss.name p-asl-ignore and make it by "
            "`python -m paml.training.prior --run <its folder> --out <file>`"
        ) from error
    with reading(path, "it is to be CSV or .parquet with the columns mid and prior", also=(OSError,)):
        if path.endswith(".parquet"):
            table = pyarrow.parquet.read_table(io.BytesIO(data))
        else:
            options = pyarrow.csv.ConvertOptions(column_types={"mid": pa.string(), "prior": pa.float64()})
            table = pyarrow.csv.read_csv(io.BytesIO(data), convert_options=options)
        mids = [str(mid) for mid in table.column("mid").to_pylist()]
        priors = pc.cast(table.column("prior"), pa.float64()).to_numpy()

    row_of = {mid: row for row, mid in enumerate(mids)}
    repeated = sorted({mid for row, mid in enumerate(mids) if row_of[mid] != row})
    known = set(classes)
    faults = (
        (repeated, "stand there more than once"),
        ([mid for mid in mids if mid not in known], "are not among the classes of the label table"),
        ([mid for mid in classes if mid not in row_of], "are classes of the label table and have no prior there"),
    )
    for found, what in faults:
        if found:
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            raise DataError(
                f"{path}: {', '.join(found[:NAMED])}{more} {what}; a prior file is of the very classes that are trained"
            )
    prior_K = priors[[row_of[mid] for mid in classes]]
    outside = np.flatnonzero(~((prior_K >= 0) & (prior_K <= 1)))
    if len(outside):
        raise DataError(f"{path}: the prior of {classes[outside[0]]} is {prior_K[outside[0]]}; it must lie in [0, 1]")
    return prior_K


def write_prior(path: str, classes: Sequence[str], prior_K: np.ndarray) -> None:
    """Write the file that `read_prior` reads; the ending .parquet makes it one, any other a CSV."""
    table = pa.table({"mid": pa.array(classes, pa.string()), "prior": pa.array(prior_K, pa.float64())})
    out = io.BytesIO()
    if path.endswith(".parquet"):
        pyarrow.parquet.write_table(table, out)
    else:
        pyarrow.csv.write_csv(table, out)
    storage.write_bytes(path, out.getvalue())
