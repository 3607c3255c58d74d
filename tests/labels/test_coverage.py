"""Coverage: found and missing labels by class."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.labels import NEGATIVE, POSITIVE, LabelTable, table_from_triples
from paml.labels import edit as edit_module
from paml.labels.coverage import measure_coverage, missing_keys

CLASSES = ["/m/a", "/m/b", "/m/c", "/m/d"]
NAMES = ["Apple", "Bee", "Cat", "Dog"]


def table_of(folder: Path, labels: dict[str, dict[str, int]]) -> LabelTable:
    """A table from {key: {MID: state}}."""
    keys = list(labels)
    rows = [(keys.index(key), CLASSES.index(mid), state) for key in keys for mid, state in labels[key].items()]
    image, cls, state = (np.array([row[axis] for row in rows], int) for axis in range(3))
    return table_from_triples(keys, CLASSES, NAMES, image, cls, state, str(folder / "labels.arrow"))


def reference_counts(labels: dict[str, dict[str, int]], available: set[str]) -> dict[str, dict[str, int]]:
    """Counts by class, label by label in plain Python."""
    counts = {mid: dict.fromkeys(("P+", "P-", "N+", "N-"), 0) for mid in CLASSES}
    for key, states in labels.items():
        for mid, state in states.items():
            counts[mid][("P" if state == POSITIVE else "N") + ("+" if key in available else "-")] += 1
    return counts


KEYS = [f"{n:016x}" for n in range(12)] + ["photo a", "photo b"]
LABELS = st.dictionaries(
    st.sampled_from(KEYS),
    st.dictionaries(st.sampled_from(CLASSES), st.sampled_from([POSITIVE, NEGATIVE])),
    min_size=1,
)


@pytest.mark.parametrize("arrow", [False, True])
def test_counts_equal_the_reference(arrow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edit_module, "_BLOCK_ROWS", 3)

    @settings(max_examples=60, deadline=None)
    @given(LABELS, st.sets(st.sampled_from([*KEYS, "elsewhere"])))
    def check(labels: dict[str, dict[str, int]], available: set[str]) -> None:
        table = table_of(tmp_path, labels)
        keys = pa.array(sorted(available), pa.string()) if arrow else sorted(available)
        coverage = measure_coverage(table, keys)
        rows = reference_counts(labels, available)
        assert coverage.by_class.select(["positives_found", "positives_missing"]).to_pylist() == [
            {"positives_found": rows[mid]["P+"], "positives_missing": rows[mid]["P-"]} for mid in CLASSES
        ]
        assert coverage.by_class.select(["negatives_found", "negatives_missing"]).to_pylist() == [
            {"negatives_found": rows[mid]["N+"], "negatives_missing": rows[mid]["N-"]} for mid in CLASSES
        ]
        labeled = {key for key, states in labels.items() if states}
        assert coverage.images_found == len(labeled & available)
        assert coverage.images_missing == len(labeled - available)
        assert coverage.images_unlabeled == len(available - labeled)
        assert missing_keys(table, keys) == sorted(labeled - available)
        assert str(coverage)

    check()


@pytest.fixture
def half(tmp_path: Path) -> LabelTable:
    """40 images: class a everywhere, b on the first 8, c positive on the last 6 only, d never positive."""
    labels: dict[str, dict[str, int]] = {}
    for n in range(40):
        labels[f"{n:016x}"] = {
            "/m/a": POSITIVE,
            "/m/b": POSITIVE if n < 8 else NEGATIVE,
            "/m/c": POSITIVE if n >= 34 else NEGATIVE,
            "/m/d": NEGATIVE,
        }
    return table_of(tmp_path, labels)


def test_warning_if_half_of_the_images_are_missing(half: LabelTable) -> None:
    text = str(measure_coverage(half, [f"{n:016x}" for n in range(4, 22)]))
    first, second, last = text.splitlines()
    assert first.startswith("WARNING: 55.0% of the labeled images are missing")
    assert "18 of 40 labeled images found (45.0%)" in second
    assert last == "1 classes have no positive left and cannot be scored, such as Cat"


def test_no_warning_if_all_images_are_available(half: LabelTable) -> None:
    coverage = measure_coverage(half, [f"{n:016x}" for n in range(42)])
    assert coverage.found_fraction == 1
    assert coverage.images_unlabeled == 2
    text = str(coverage)
    assert "WARNING" not in text
    assert "missing" not in text
    assert "40 of 40 labeled images found (100.0%)" in text


def test_no_image_available(half: LabelTable) -> None:
    coverage = measure_coverage(half, [])
    assert coverage.found_fraction == 0
    assert "3 classes have no positive left" in str(coverage)


def test_write_by_class(half: LabelTable, tmp_path: Path) -> None:
    coverage = measure_coverage(half, [f"{n:016x}" for n in range(4, 22)])
    coverage.write(tmp_path / "deep" / "coverage.parquet")
    written = pq.read_table(tmp_path / "deep" / "coverage.parquet")
    assert written.to_pylist()[1] == {
        "class": "/m/b",
        "name": "Bee",
        "positives_found": 4,
        "positives_missing": 4,
        "negatives_found": 14,
        "negatives_missing": 18,
    }
    totals = json.loads(written.schema.metadata[b"paml"])
    assert (totals["images_found"], totals["images_missing"]) == (18, 22)
