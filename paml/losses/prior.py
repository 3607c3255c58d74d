"""A file of class priors, columns `mid` and `prior`: a network's estimate of the fraction of images with the class.

`paml evaluate --prior_out` writes it from a trained run. Rows are matched by MID, in any order.
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
from paml.parsing import parse_errors_as

NAMED = 5
"""MIDs listed in an error."""


def read_prior(path: str, classes: Sequence[str]) -> np.ndarray:
    """float64 [K], the prior of each of `classes`, from a CSV or a .parquet file.

    Raises DataError for a missing or unreadable file, for repeated, unknown or missing MIDs, and for a prior outside
    [0, 1].
    """
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise DataError(
            f"loss.p_asl.prior_file: no file {path}. Train a run with loss.name p-asl-ignore, then write the file with "
            "`paml evaluate --run <its folder> --prior_out <file>`"
        ) from error
    with parse_errors_as(path, "use a CSV or .parquet file with the columns mid and prior", also=(OSError,)):
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
        (repeated, "appear more than once"),
        ([mid for mid in mids if mid not in known], "are not classes of the label table"),
        ([mid for mid in classes if mid not in row_of], "are classes of the label table without a prior"),
    )
    for faulty, problem in faults:
        if faulty:
            more = f" and {len(faulty) - NAMED} more" if len(faulty) > NAMED else ""
            raise DataError(
                f"{path}: {', '.join(faulty[:NAMED])}{more} {problem}; use a file with exactly the classes of the run"
            )
    prior_K = priors[[row_of[mid] for mid in classes]]
    outside = np.flatnonzero(~((prior_K >= 0) & (prior_K <= 1)))
    if len(outside):
        raise DataError(f"{path}: the prior of {classes[outside[0]]} is {prior_K[outside[0]]}; it must be in [0, 1]")
    return prior_K


def write_prior(path: str, classes: Sequence[str], prior_K: np.ndarray) -> None:
    """Write the file that `read_prior` reads: Parquet if the path ends in .parquet, else CSV."""
    table = pa.table({"mid": pa.array(classes, pa.string()), "prior": pa.array(prior_K, pa.float64())})
    out = io.BytesIO()
    if path.endswith(".parquet"):
        pyarrow.parquet.write_table(table, out)
    else:
        pyarrow.csv.write_csv(table, out)
    storage.write_bytes(path, out.getvalue())
