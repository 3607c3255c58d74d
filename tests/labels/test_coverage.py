"""Coverage: what is found and missing by class, said loudly, and a standard error that simulation bears out."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.labels import NEGATIVE, POSITIVE, LabelError, LabelTable, table_from_triples
from paml.labels import coverage as coverage_module
from paml.labels.coverage import map_standard_error, measure_coverage, missing_keys

CLASSES = ["/m/a", "/m/b", "/m/c", "/m/d"]
NAMES = ["Apple", "Bee", "Cat", "Dog"]


def table_of(folder: Path, labels: dict[str, dict[str, int]]) -> LabelTable:
    """A table from {key: {MID: state}}."""
    keys = list(labels)
    rows = [(keys.index(key), CLASSES.index(mid), state) for key in keys for mid, state in labels[key].items()]
    image, cls, state = (np.array([row[axis] for row in rows], int) for axis in range(3))
    return table_from_triples(keys, CLASSES, NAMES, image, cls, state, str(folder / "labels.arrow"))


def by_hand(labels: dict[str, dict[str, int]], have: set[str]) -> dict[str, dict[str, int]]:
    """Counts by class in plain Python, a label at a time."""
    counts = {mid: dict.fromkeys(("P+", "P-", "N+", "N-"), 0) for mid in CLASSES}
    for key, states in labels.items():
        for mid, state in states.items():
            counts[mid][("P" if state == POSITIVE else "N") + ("+" if key in have else "-")] += 1
    return counts


KEYS = [f"{n:016x}" for n in range(12)] + ["photo a", "photo b"]
LABELS = st.dictionaries(
    st.sampled_from(KEYS),
    st.dictionaries(st.sampled_from(CLASSES), st.sampled_from([POSITIVE, NEGATIVE])),
    min_size=1,
)


@pytest.mark.parametrize("arrow", [False, True])
def test_counts_equal_those_by_hand(arrow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_module, "_BLOCK_ROWS", 3)

    @settings(max_examples=60, deadline=None)
    @given(LABELS, st.sets(st.sampled_from([*KEYS, "elsewhere"])))
    def check(labels: dict[str, dict[str, int]], have: set[str]) -> None:
        table = table_of(tmp_path, labels)
        keys = pa.array(sorted(have), pa.string()) if arrow else sorted(have)
        found = measure_coverage(table, keys)
        rows = by_hand(labels, have)
        assert found.by_class().select(["positives_found", "positives_missing"]).to_pylist() == [
            {"positives_found": rows[mid]["P+"], "positives_missing": rows[mid]["P-"]} for mid in CLASSES
        ]
        assert found.by_class().select(["negatives_found", "negatives_missing"]).to_pylist() == [
            {"negatives_found": rows[mid]["N+"], "negatives_missing": rows[mid]["N-"]} for mid in CLASSES
        ]
        labelled = {key for key, states in labels.items() if states}
        assert found.images_found == len(labelled & have)
        assert found.images_missing == len(labelled - have)
        assert found.images_unlabelled == len(have - labelled)
        assert missing_keys(table, keys) == sorted(labelled - have)
        lost = [mid for mid in CLASSES if rows[mid]["P-"] and not rows[mid]["P+"]]
        assert sorted(CLASSES[c] for c in found.lost) == lost
        assert [mid for mid, is_scored in zip(CLASSES, found.scored, strict=True) if is_scored] == [
            mid for mid in CLASSES if rows[mid]["P+"]
        ]
        assert str(found)

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


def test_half_a_set_is_shouted_about(half: LabelTable) -> None:
    text = str(measure_coverage(half, [f"{n:016x}" for n in range(4, 22)]))
    first, second, *rest = text.splitlines()
    assert first.startswith("ATTENTION: 55.0% OF THE LABELLED IMAGES ARE MISSING")
    assert "with published ones" in first
    assert "18 of 40 labelled images found (45.0%)" in second
    assert "1 classes lost all their positives: Cat (/m/c, 6 of 6)" in rest
    assert "most of their positives lost besides: Apple (/m/a, 22 of 40), Bee (/m/b, 4 of 8)" in rest
    assert "as a test set it can score 2 of 3 classes (1 of them have no negative" in rest[-1]


def test_a_whole_set_is_said_quietly(half: LabelTable) -> None:
    found = measure_coverage(half, [f"{n:016x}" for n in range(42)])
    assert found.share == 1
    assert found.images_unlabelled == 2
    text = str(found)
    assert "ATTENTION" not in text
    assert "lost" not in text
    assert "40 of 40 labelled images found (100.0%)" in text
    assert found.standard_error == found.standard_error_of_all


def test_nothing_found(half: LabelTable) -> None:
    found = measure_coverage(half, [])
    assert found.share == 0
    assert np.isnan(found.standard_error)
    assert "can score 0 of 3 classes" in str(found)


def test_the_file_by_class(half: LabelTable, tmp_path: Path) -> None:
    found = measure_coverage(half, [f"{n:016x}" for n in range(4, 22)], expected_ap=0.8)
    found.write(tmp_path / "deep" / "coverage.parquet")
    written = pq.read_table(tmp_path / "deep" / "coverage.parquet")
    assert written.to_pylist()[1] == {
        "class": "/m/b",
        "name": "Bee",
        "images_found": 18,
        "images_missing": 22,
        "positives_found": 4,
        "positives_missing": 4,
        "negatives_found": 14,
        "negatives_missing": 18,
        "scored": True,
        "standard_error": pytest.approx(0.2),
    }
    assert written["standard_error"].to_pylist()[2:] == [None, None]
    totals = json.loads(written.schema.metadata[b"paml"])
    assert (totals["images_found"], totals["images_missing"]) == (18, 22)
    assert (totals["classes_scored"], totals["classes_unscored"]) == (2, 1)
    assert totals["map_standard_error"] == pytest.approx(found.standard_error)


def test_an_impossible_expectation_is_refused(half: LabelTable) -> None:
    with pytest.raises(LabelError, match=r"expected_ap is 1.0, allowed is a number between 0 and 1"):
        measure_coverage(half, [], expected_ap=1.0)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    hits = positive[np.argsort(-scores)]
    return float((np.cumsum(hits)[hits] / (np.flatnonzero(hits) + 1)).mean())


@pytest.mark.parametrize("distance", [1.0, 2.0])
def test_the_standard_error_agrees_with_simulation(distance: float) -> None:
    """mAP over test sets drawn anew, for a model whose positives score higher by `distance`."""
    rng = np.random.default_rng(0)
    positives = np.array([3, 10, 30, 60])
    maps, aps = [], []
    for _ in range(1500):
        ap = []
        for count in positives:
            positive = np.arange(4 * count) < count
            ap.append(average_precision(rng.normal(size=len(positive)) + distance * positive, positive))
        aps.append(ap)
        maps.append(np.mean(ap))
    measured = float(np.std(maps))
    stated = map_standard_error(np.append(positives, 0), float(np.mean(aps)))
    assert 0.6 < measured / stated < 1.0
    assert map_standard_error(positives * 4) == pytest.approx(map_standard_error(positives) / 2)
