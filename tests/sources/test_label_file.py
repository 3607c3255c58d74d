"""Label files of any data set: every row becomes a label or a counted reject."""

import csv
import io
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml import storage
from paml.labels import LabelError, LabelTable
from paml.sources.label_file import build_from_label_file
from tests.labels.test_table import pairs_of

CLASSES = "/m/a,Apple\n/m/b,Bee\n/m/c,Cat\n/m/d,Bee\n"


def write(folder: Path, text: str, name: str = "mine.csv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def rejects(folder: Path) -> list[dict]:
    return pq.read_table(folder / "labels.rejects.parquet").to_pylist()


def out(folder: Path) -> str:
    return str(folder / "labels.arrow")


def test_row_per_label(tmp_path: Path) -> None:
    text = """image,class,state
        a.jpg,dog,1
        sub/b.png,dog,negative
        b.png,cat,Positive
        a.jpg,cat,0

        c,cat,1.0
        d.e.jpg,"bird, small",1
        """.replace("        ", "")
    report = build_from_label_file(write(tmp_path, text.replace("sub/", "")), out(tmp_path))
    table = report.table
    assert table.classes == ("bird, small", "cat", "dog")
    assert pairs_of(table) == {
        ("a", "dog"): 1,
        ("b", "dog"): 0,
        ("b", "cat"): 1,
        ("a", "cat"): 0,
        ("c", "cat"): 1,
        ("d.e", "bird, small"): 1,
    }
    assert report.rows == 6
    assert sum(report.rejected.values()) == 0
    stored = list(csv.reader(io.StringIO((tmp_path / "labels.classes.csv").read_text())))
    assert stored == [[cls, cls] for cls in table.classes]


def test_written_classes_are_used_for_other_splits(tmp_path: Path) -> None:
    build_from_label_file(write(tmp_path, "image,labels\na,dog;cat\nb,ape\n"), out(tmp_path))
    other = str(tmp_path / "test.arrow")
    report = build_from_label_file(
        write(tmp_path, "image,labels\nx,dog\ny,emu\n", "test.csv"), other, classes=str(tmp_path / "labels.classes.csv")
    )
    assert LabelTable.open(other).classes == LabelTable.open(out(tmp_path)).classes == ("ape", "cat", "dog")
    assert report.rejected["unknown_class"] == 1
    assert report.unknown_classes == (("emu", 1),)


@pytest.mark.parametrize("complete", [False, True])
def test_row_per_image(tmp_path: Path, complete: bool) -> None:
    text = 'id,image,labels\n1,p/a.jpg,"dog; cat"\n2,b.jpg,\n3,c.jpg,cat;;cat;\n4,d.jpg,emu\n'
    report = build_from_label_file(
        write(tmp_path, text), out(tmp_path), classes=write(tmp_path, "dog\ncat\n", "classes.txt"), complete=complete
    )
    positives = {("a", "dog"): 1, ("a", "cat"): 1, ("c", "cat"): 1}
    negatives = {("b", "dog"): 0, ("b", "cat"): 0, ("c", "dog"): 0, ("d", "dog"): 0, ("d", "cat"): 0}
    assert pairs_of(report.table) == (positives | negatives if complete else positives)
    assert report.rejected == Counter(duplicate=1, unknown_class=1) | dict.fromkeys(
        ("malformed_row", "malformed_confidence", "contradiction"), 0
    )
    unknown = next(row for row in rejects(tmp_path) if row["kind"] == "unknown_class")
    assert (unknown["ImageID"], unknown["LabelName"], unknown["Source"]) == ("d", "emu", "row 4")


def test_classes_by_name_or_mid(tmp_path: Path) -> None:
    classes = write(tmp_path, CLASSES, "classes.csv")
    report = build_from_label_file(
        write(tmp_path, "image,class,state\n1,Apple,1\n2,/m/a,0\n3,Cat,1\n4,/m/b,1\n"), out(tmp_path), classes=classes
    )
    table = report.table
    assert pairs_of(table) == {("1", "/m/a"): 1, ("2", "/m/a"): 0, ("3", "/m/c"): 1, ("4", "/m/b"): 1}
    assert table.names == ("Apple", "Bee", "Cat", "Bee")
    with pytest.raises(LabelError, match=r"2 classes are named 'Bee' \(/m/b, /m/d\)"):
        build_from_label_file(write(tmp_path, "image,class,state\n1,Bee,1\n"), out(tmp_path), classes=classes)


def test_bad_rows_are_counted_by_kind(tmp_path: Path) -> None:
    text = (
        'image,class,state\na,dog,1\nb,dog\nb,dog,1,"x"\nc,dog,maybe\n,dog,1\nd,,1\na,dog,1\na,dog,0\ne,dog,\nf,dog,1\n'
    )
    report = build_from_label_file(write(tmp_path, text), out(tmp_path))
    assert report.rejected == {
        "malformed_row": 4,
        "unknown_class": 0,
        "malformed_confidence": 2,
        "duplicate": 0,
        "contradiction": 2,
    }
    assert pairs_of(report.table) == {("a", "dog"): 0, ("f", "dog"): 1}
    rows = rejects(tmp_path)
    maybe = next(row for row in rows if row["Confidence"] == "maybe")
    assert (maybe["ImageID"], maybe["Source"], maybe["file"]) == ("c", "row 2", "mine.csv")
    texts = [row["text"] for row in rows if row["text"]]
    assert any("2 columns, expected 3: b,dog" in text for text in texts)
    assert any("4 columns, expected 3" in text for text in texts)


@pytest.mark.parametrize("kind", ["int", "float", "bool", "text", "dictionary"])
def test_parquet_with_any_type_of_state(tmp_path: Path, kind: str, s3: str) -> None:
    states = {
        "int": pa.array([1, 0, None], pa.int8()),
        "float": pa.array([1.0, 0.0, 0.5]),
        "bool": pa.array([True, False, None]),
        "text": pa.array(["positive", "negative", "?"]),
        "dictionary": pa.array(["1", "0", "2"]).dictionary_encode(),
    }[kind]
    table = pa.table(
        {"state": states, "image": ["a.jpg", "b.jpg", "c.jpg"], "class": ["x", "x", "x"], "more": [1, 2, 3]}
    )
    pq.write_table(table, tmp_path / "mine.parquet")
    storage.copy(str(tmp_path / "mine.parquet"), f"{s3}/mine.parquet")
    for place in (str(tmp_path / "mine.parquet"), f"{s3}/mine.parquet"):
        report = build_from_label_file(place, out(tmp_path))
        assert pairs_of(report.table) == {("a", "x"): 1, ("b", "x"): 0}
        assert report.rejected["malformed_confidence"] == 1


def test_two_images_with_the_same_key(tmp_path: Path) -> None:
    path = write(tmp_path, "image,labels\nday/1.jpg,dog\nnight/1.jpg,cat\nnight/1.jpg,dog\n")
    with pytest.raises(LabelError, match=r"'day/1.jpg' and 'night/1.jpg'.* '1': set keys"):
        build_from_label_file(path, out(tmp_path))
    report = build_from_label_file(path, out(tmp_path), keys="path")
    assert pairs_of(report.table) == {("day/1", "dog"): 1, ("night/1", "cat"): 1, ("night/1", "dog"): 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\na,b\n", "has the columns image, label; expected image,class,state"),
        ("image;class;state\na;b;1\n", "has the columns image;class;state;"),
        ("", "has the columns none;"),
        ("image,class,state\n", "has no class: .* 'class'"),
        ("image,labels\na,\nb,;\n", "has no class: .* 'labels'"),
    ],
)
def test_other_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        build_from_label_file(write(tmp_path, text), out(tmp_path))
    with pytest.raises(LabelError, match="complete is only for"):
        build_from_label_file(write(tmp_path, "image,class,state\na,b,1\n"), out(tmp_path), complete=True)


NAMES = st.sampled_from(["a.jpg", "b", "c d.png", 'quo"te', "comma,name", "", "ü.jpg", "semi"])
TEXTS = st.sampled_from(["dog", "Dog", 'big "cat"', "a,b", "", "ünï", "0"])
STATES = st.sampled_from(["1", "0", "positive", "Negative", "", "2", "yes"])


def reference(rows: list[tuple[str, str, str]]) -> tuple[dict, int]:
    """(pairs, rejected rows), row by row; a contradicting pair is NEGATIVE."""
    states: dict[tuple[str, str], set[int]] = {}
    bad = 0
    for image, cls, state in rows:
        value = {"1": 1, "positive": 1, "0": 0, "negative": 0}.get(state.lower())
        if not image or not cls or value is None:
            bad += 1
            continue
        key = image.rsplit(".", 1)[0] if image.endswith((".jpg", ".png")) else image
        states.setdefault((key, cls), set()).add(value)
    pairs = {pair: min(values) for pair, values in states.items()}
    return pairs, bad


def test_any_file_equals_the_reference(tmp_path: Path) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(NAMES, TEXTS, STATES), min_size=1, max_size=12))
    def check(rows: list[tuple[str, str, str]]) -> None:
        text = io.StringIO()
        csv.writer(text).writerows([("image", "class", "state"), *rows])
        path = write(tmp_path, text.getvalue())
        pairs, bad = reference(rows)
        if not pairs:
            with pytest.raises(LabelError, match=r"no usable row|has no class"):
                build_from_label_file(path, out(tmp_path))
            return
        report = build_from_label_file(path, out(tmp_path))
        assert pairs_of(report.table) == pairs
        assert report.rows == len(rows) == report.table.num_annotations + sum(report.rejected.values())
        malformed = report.rejected["malformed_row"] + report.rejected["malformed_confidence"]
        assert malformed == bad
        assert report.table.classes == tuple(sorted({cls for _, cls, _ in rows} - {""}))

    check()
