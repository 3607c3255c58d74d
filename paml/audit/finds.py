"""The finds as a table: Parquet with all that is known of each, CSV in the form of Open Images."""

import dataclasses
import io
import json
from typing import Any

import numpy as np

from paml import storage
from paml.labels.build import HEADER
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.spreadsheet import ReportWriter

SCHEMA_VERSION = 1
UNOBSERVED_POSITIVE = "unobserved-positive"
OBSERVED_WRONG = "observed-wrong"
STATE_NAMES = {POSITIVE: "positive", NEGATIVE: "negative", UNOBSERVED: "unobserved"}


@dataclasses.dataclass(frozen=True)
class Finds:
    """The n finds: unobserved labels first, then observed ones, each by rank."""

    kind: np.ndarray
    """str [n], UNOBSERVED_POSITIVE or OBSERVED_WRONG."""
    rank: np.ndarray
    """int64 [n], from 1 within a kind."""
    place: np.ndarray
    """int64 [n], the image's place in the manifest."""
    cls: np.ndarray
    """int32 [n], the class's number."""
    state: np.ndarray
    """int8 [n], the label state in the table."""
    logit: np.ndarray
    """float32 [n], by the scoring checkpoint, averaged over the views."""
    score: np.ndarray
    """float64 [n], class-normalised; higher is more likely wrong in the table."""

    def __len__(self) -> int:
        return len(self.cls)

    @property
    def probability(self) -> np.ndarray:
        """float64 [n]: of the logit, that the class is in the picture. A boost in scoring alone pushes it towards 1."""
        return 1 / (1 + np.exp(-self.logit.astype(np.float64)))


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What speaks for each of the n finds, by C checkpoints."""

    logits: np.ndarray
    """float32 [n, C]."""
    agreement: np.ndarray
    """float64 [n], share of the checkpoints that by themselves score the label as high as the last find of its kind."""
    rejected_in: np.ndarray
    """int64 [n], checkpoints at whose epoch's reject rate the label is among the rejected of the whole split."""
    corrected: np.ndarray
    """bool [n], whether LL-Cp has made the label a positive for good."""


def write_parquet(
    finds: Finds,
    evidence: Evidence,
    keys: list[str],
    mids: list[str],
    names: list[str],
    about: dict[str, Any],
    path: str,
) -> None:
    """Write a row a find to `path` (local or s3://). Metadata `paml`: schema_version and `about` (JSON values).

    Columns: kind, rank, key, mid, name, state, score, probability, logit, logit_by_checkpoint (list, in the order of
    `about["checkpoints"]`), agreement, rejected_in, corrected.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "kind": pa.array(finds.kind.tolist(), pa.string()),
        "rank": pa.array(finds.rank, pa.int64()),
        "key": pa.array(keys, pa.string()),
        "mid": pa.array(mids, pa.string()),
        "name": pa.array(names, pa.string()),
        "state": pa.array([STATE_NAMES[int(state)] for state in finds.state], pa.string()),
        "score": pa.array(finds.score, pa.float64()),
        "probability": pa.array(finds.probability, pa.float64()),
        "logit": pa.array(finds.logit, pa.float32()),
        "logit_by_checkpoint": pa.array(list(evidence.logits), pa.list_(pa.float32())),
        "agreement": pa.array(evidence.agreement, pa.float64()),
        "rejected_in": pa.array(evidence.rejected_in, pa.int64()),
        "corrected": pa.array(evidence.corrected, pa.bool_()),
    }
    facts = {"schema_version": SCHEMA_VERSION, **about}
    table = pa.table(columns).replace_schema_metadata({"paml": json.dumps(facts)})
    with storage.replacing(path) as local:
        pq.write_table(table, local, compression="zstd")


def write_csv(finds: Finds, keys: list[str], mids: list[str], path: str) -> None:
    """Write the finds by kind and rank as Open Images writes machine-made labels: ImageID, Source (`machine`),
    LabelName, Confidence (the probability that the class is in the picture, so that a low one doubts a positive).

    Fields that a spreadsheet would run get an apostrophe in front (see paml.spreadsheet).
    """
    text = io.StringIO(newline="")
    writer = ReportWriter(text)
    writer.writerow(HEADER)
    for key, mid, probability in zip(keys, mids, finds.probability.tolist(), strict=True):
        writer.writerow((key, "machine", mid, f"{probability:.6f}"))
    storage.write_bytes(path, text.getvalue().encode())
