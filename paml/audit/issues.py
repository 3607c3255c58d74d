"""Label issues as a table: Parquet with all evidence, and CSV in the Open Images format."""

import dataclasses
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from paml import storage
from paml.labels.rejects import HEADER
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.spreadsheet import format_csv
from paml.training.data import Split

SCHEMA_VERSION = 1
MISSING = "missing"
WRONG = "wrong"
KIND_TITLES = {MISSING: "likely missing label", WRONG: "likely wrong label"}
STATE_NAMES = {POSITIVE: "positive", NEGATIVE: "negative", UNOBSERVED: "unobserved"}


@dataclasses.dataclass(frozen=True)
class LabelIssues:
    """n labels to review: likely missing positives first, then likely wrong observed labels, each by rank."""

    kind: np.ndarray
    """str [n], MISSING or WRONG."""
    rank: np.ndarray
    """int64 [n], from 1 within a kind."""
    image: np.ndarray
    """int64 [n], the image's position in the manifest."""
    cls: np.ndarray
    """int32 [n]."""
    state: np.ndarray
    """int8 [n], the label state in the table."""
    logit: np.ndarray
    """float32 [n], of the scoring checkpoint, averaged over the views."""
    score: np.ndarray
    """float64 [n], normalized by class; a higher score means that the table is more likely wrong."""

    def __len__(self) -> int:
        return len(self.cls)

    @property
    def probability(self) -> np.ndarray:
        """float64 [n]: sigmoid of the logit. Boost in scoring alone pushes it towards 1."""
        return 1 / (1 + np.exp(-self.logit.astype(np.float64)))


def issue_table(issues: LabelIssues, logits: np.ndarray, agreement: np.ndarray, split: Split) -> pa.Table:
    """One row per issue, with its evidence: the logits of C checkpoints, float32 [n, C], and their agreement.

    Columns: kind (missing or wrong), rank, key, mid, name, state, score, probability, logit, logit_by_checkpoint
    (list), agreement.
    """
    columns = {
        "kind": pa.array(issues.kind.tolist(), pa.string()),
        "rank": pa.array(issues.rank, pa.int64()),
        "key": pa.array([split.manifest.key(index) for index in issues.image.tolist()], pa.string()),
        "mid": pa.array([split.table.classes[cls] for cls in issues.cls], pa.string()),
        "name": pa.array([split.table.names[cls] for cls in issues.cls], pa.string()),
        "state": pa.array([STATE_NAMES[int(state)] for state in issues.state], pa.string()),
        "score": pa.array(issues.score, pa.float64()),
        "probability": pa.array(issues.probability, pa.float64()),
        "logit": pa.array(issues.logit, pa.float32()),
        "logit_by_checkpoint": pa.array(list(logits), pa.list_(pa.float32())),
        "agreement": pa.array(agreement, pa.float64()),
    }
    return pa.table(columns)


def write_parquet(table: pa.Table, about: dict[str, Any], path: str) -> None:
    """Write the table to `path` (local or s3://). Metadata `paml`: schema_version and `about` (JSON values)."""
    metadata = {"paml": json.dumps({"schema_version": SCHEMA_VERSION, **about})}
    with storage.replacing(path) as local:
        pq.write_table(table.replace_schema_metadata(metadata), local, compression="zstd")


def write_csv(table: pa.Table, path: str) -> None:
    """Write the issues in the format of Open Images' machine-generated labels: ImageID, Source (`machine`), LabelName,
    Confidence (the probability of the class, so a low one questions a positive label).

    Fields that a spreadsheet would run as a formula get a leading apostrophe (see paml.spreadsheet).
    """
    rows = table.select(["key", "mid", "probability"]).to_pylist()
    cells = [(row["key"], "machine", row["mid"], f"{row['probability']:.6f}") for row in rows]
    storage.write_bytes(path, format_csv([HEADER, *cells]).encode())
