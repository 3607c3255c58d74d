"""Label tables as Parquet."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.errors import LabelError
from paml.labels import NEGATIVE, POSITIVE, LabelTable
from paml.labels.parquet import export_parquet

CLASSES = ["cat", "dog", "a,b"]
KEYS = st.one_of(st.text("xyz/é", min_size=1, max_size=3), st.integers(0, 99).map("{:016x}".format))
TABLES = st.dictionaries(
    KEYS, st.dictionaries(st.sampled_from(CLASSES), st.sampled_from([POSITIVE, NEGATIVE])), max_size=5
)


def make_table(labels: dict[str, dict[str, int]]) -> LabelTable:
    triples = [(key, CLASSES.index(cls), state) for key, states in labels.items() for cls, state in states.items()]
    keys, classes, states = zip(*triples, strict=True) if triples else ((), (), ())
    return LabelTable.from_arrays(keys, classes, states, classes=CLASSES, images=list(labels))


@settings(max_examples=50, deadline=None)
@given(labels=TABLES.filter(bool))
def test_every_label_is_in_its_list(
    tmp_path_factory: pytest.TempPathFactory, labels: dict[str, dict[str, int]]
) -> None:
    out = tmp_path_factory.mktemp("parquet") / "table.parquet"
    export_parquet(make_table(labels), str(out))
    rows = pq.read_table(out).to_pylist()
    lists = {POSITIVE: "positive", NEGATIVE: "negative"}
    assert {
        row["image"]: {**dict.fromkeys(row["positive"], POSITIVE), **dict.fromkeys(row["negative"], NEGATIVE)}
        for row in rows
    } == labels
    for row in rows:
        for state, column in lists.items():
            assert len(row[column]) == sum(value == state for value in labels[row["image"]].values())


def test_metadata(tmp_path: Path) -> None:
    table = make_table({"a": {"cat": POSITIVE}})
    export_parquet(table, str(tmp_path / "table.parquet"))
    metadata = pq.read_schema(tmp_path / "table.parquet").metadata
    assert json.loads(metadata[b"paml"])["classes"] == CLASSES
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert {name: feature["_type"] for name, feature in features.items()} == {
        "image": "Value",
        "positive": "Sequence",
        "negative": "Sequence",
    }
    stored = table.write(str(tmp_path / "table.arrow"))
    with pytest.raises(LabelError, match=r"table\.arrow"):
        export_parquet(stored, stored.path)
