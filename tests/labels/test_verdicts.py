"""Verdicts merged into a label table: which label remains, counts and rejects."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.labels import NEGATIVE, POSITIVE, LabelError, LabelTable, table_from_triples
from paml.labels.command import main
from paml.labels.verdicts import apply_verdicts
from paml.spreadsheet import escape_formula, unescape_formula

KEYS = [f"{number:016x}" for number in range(4)]
MIDS = ["/m/a", "/m/b", "/m/c"]
OLD = {(KEYS[0], "/m/a"): POSITIVE, (KEYS[0], "/m/b"): NEGATIVE, (KEYS[1], "/m/a"): POSITIVE}
HEADER = "ImageID,Source,LabelName,Confidence\n"


def _table(path: Path, labels: dict, keys: list[str] = KEYS) -> LabelTable:
    image, cls, state = zip(*((keys.index(k), MIDS.index(m), s) for (k, m), s in labels.items()), strict=True)
    return table_from_triples(keys, MIDS, ["A", "B", "C"], image, cls, state, str(path))


def _labels(table: LabelTable) -> dict:
    keys, found = table.keys(), table.lookup(np.arange(table.num_images))
    rows = zip(found.image.tolist(), found.cls.tolist(), found.state.tolist(), strict=True)
    return {(keys[image], table.classes[cls]): state for image, cls, state in rows}


def _verdicts(path: Path, *rows: tuple) -> str:
    with open(path, "w", newline="") as file:
        file.write(HEADER)
        csv.writer(file).writerows((key, "verification", mid, state) for key, mid, state in rows)
    return str(path)


def test_verdicts_replace_labels_and_all_rows_are_counted(tmp_path: Path) -> None:
    old = _table(tmp_path / "old.arrow", OLD)
    digest = old.digest
    first = _verdicts(
        tmp_path / "one.csv",
        (KEYS[0], "/m/a", 0),  # overturns a positive
        (KEYS[0], "/m/b", 0),  # confirms a negative
        (KEYS[2], "/m/c", 1),  # adds to an image without labels
        (KEYS[2], "/m/c", "1.0"),  # a duplicate
        ("00000000000000ff", "/m/a", 1),  # unknown image
        (KEYS[0], "/m/z", 1),  # unknown class
        (KEYS[0], "/m/c", 0.7),  # not a verdict
    )
    second = _verdicts(tmp_path / "two.csv", (KEYS[1], "/m/a", 0), (KEYS[1], "/m/a", 1), (KEYS[3], "/m/b", 1))
    report = apply_verdicts(old, [first, second], str(tmp_path / "new.arrow"))

    expected = OLD | {(KEYS[0], "/m/a"): NEGATIVE, (KEYS[2], "/m/c"): POSITIVE, (KEYS[3], "/m/b"): POSITIVE}
    assert _labels(report.table) == expected  # the answers on KEYS[1] contradict each other
    assert (report.rows, report.added, report.overturned, report.confirmed) == (10, 2, 1, 1)
    assert {kind: count for kind, count in report.rejected.items() if count} == {
        "unknown_class": 1, "malformed_confidence": 1, "unknown_image": 1, "duplicate": 1, "contradiction": 2,
    }  # fmt: skip
    assert report.rows == report.added + report.overturned + report.confirmed + sum(report.rejected.values())
    rejects = pq.read_table(report.rejects_path).to_pylist()
    assert {(row["kind"], row["file"], row["line"]) for row in rejects} == {
        ("duplicate", "one.csv", 5), ("unknown_image", "one.csv", 6), ("unknown_class", "one.csv", 7),
        ("malformed_confidence", "one.csv", 8), ("contradiction", "two.csv", 2), ("contradiction", "two.csv", 3),
    }  # fmt: skip
    assert LabelTable.open(old.path).digest == digest
    assert report.table.metadata["verdicts_on"] == digest
    assert report.table.metadata["verdicts"]["overturned"] == 1
    assert report.table.classes == old.classes
    assert report.table.names == old.names
    assert "rejected" in str(report)


def test_images_of_the_manifest_are_added(tmp_path: Path) -> None:
    old = _table(tmp_path / "old.arrow", OLD)
    new = "00000000000000ff"
    files = [_verdicts(tmp_path / "one.csv", (new, "/m/c", 1))]
    with pytest.raises(LabelError, match="no usable verdict"):
        apply_verdicts(old, files, str(tmp_path / "refused.arrow"))
    report = apply_verdicts(old, files, str(tmp_path / "new.arrow"), images=[*KEYS, new])
    assert _labels(report.table) == OLD | {(new, "/m/c"): POSITIVE}


def test_escaped_formulas_are_restored(tmp_path: Path) -> None:
    keys = ["=1+1", "'quoted", "plain", "-x,y"]
    old = _table(tmp_path / "old.arrow", {("plain", "/m/a"): POSITIVE}, keys)
    path = _verdicts(tmp_path / "one.csv", *((escape_formula(key), "/m/b", 1) for key in keys))
    assert not any(line.lstrip('"').startswith(tuple("=-+@")) for line in Path(path).read_text().splitlines()[1:])
    report = apply_verdicts(old, [path], str(tmp_path / "new.arrow"))
    assert _labels(report.table) == {("plain", "/m/a"): POSITIVE} | {(key, "/m/b"): POSITIVE for key in keys}


@given(st.text(min_size=0, max_size=6, alphabet="=+-@＝＋－＠'\t\r\nab"))
def test_escaping_is_reversible_and_leaves_no_formula(field: str) -> None:
    assert unescape_formula(escape_formula(field)) == field
    assert not escape_formula(field).startswith(tuple("=+-@＝＋－＠\t\r\n"))


PAIRS = st.tuples(st.sampled_from(KEYS), st.sampled_from(MIDS))


@settings(deadline=None, max_examples=40)
@given(
    old=st.dictionaries(PAIRS, st.sampled_from([0, 1]), min_size=1),
    verdicts=st.dictionaries(PAIRS, st.sampled_from([0, 1]), min_size=1),
)
def test_new_table_equals_a_dictionary_update(tmp_path_factory, old: dict, verdicts: dict) -> None:
    folder = tmp_path_factory.mktemp("verdicts")
    table = _table(folder / "old.arrow", old)
    path = _verdicts(folder / "v.csv", *((key, mid, state) for (key, mid), state in verdicts.items()))
    report = apply_verdicts(table, [path], str(folder / "new.arrow"))
    assert _labels(report.table) == old | verdicts
    assert report.added == len(verdicts.keys() - old.keys())
    assert report.overturned == sum(old.get(pair, state) != state for pair, state in verdicts.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header ''"),
        ("image,state\n1,2\n", "header 'image,state'"),
        (HEADER, "no verdict"),
        (HEADER + "x,verification,/m/a\n", "no usable verdict"),
        (HEADER + 'x,"unended\n', "no usable verdict|line 2"),
    ],
)
def test_invalid_files(tmp_path: Path, text: str, message: str) -> None:
    old = _table(tmp_path / "old.arrow", OLD)
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(LabelError, match=message):
        apply_verdicts(old, [str(tmp_path / "v.csv")], str(tmp_path / "new.arrow"))
    assert not (tmp_path / "new.arrow").exists()


def test_invalid_arguments(tmp_path: Path) -> None:
    old = _table(tmp_path / "old.arrow", OLD)
    path = _verdicts(tmp_path / "v.csv", (KEYS[0], "/m/a", 0))
    with pytest.raises(LabelError, match="overwrite"):
        apply_verdicts(old, [path], old.path)
    with pytest.raises(LabelError, match="no verdict files"):
        apply_verdicts(old, [], str(tmp_path / "new.arrow"))
    with pytest.raises(LabelError, match=r"none.csv"):
        apply_verdicts(old, [str(tmp_path / "none.csv")], str(tmp_path / "new.arrow"))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = _table(tmp_path / "old.arrow", OLD)
    files = [_verdicts(tmp_path / f"{n}.csv", (KEYS[n], "/m/c", 1)) for n in range(2)]
    out = str(tmp_path / "new.arrow")
    main(["apply-verdicts", old.path, *files, out])
    assert "2 verdicts read, 2 labels added" in capsys.readouterr().out
    assert _labels(LabelTable.open(out)) == OLD | {(KEYS[0], "/m/c"): POSITIVE, (KEYS[1], "/m/c"): POSITIVE}
    with pytest.raises(LabelError, match="overwrite"):
        main(["apply-verdicts", old.path, *files, old.path])
