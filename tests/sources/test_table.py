"""Tables of labels: every cell of any form becomes a label, a value that was not understood, or a bad row."""

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml import storage
from paml.errors import LabelError, SettingsError
from paml.sources.records import Records
from paml.sources.separators import detect_separator, parse_list
from paml.sources.table import TableSettings, detect_table, read_table

Labels = list[tuple[str, str, str]]


def write(folder: Path, content: str | bytes, name: str = "mine.csv") -> str:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder / name)


def labels_of(records: Records) -> Labels:
    """(image, class, state) of each label, sorted."""
    cls, state = records.cls.cast(pa.string()).to_pylist(), records.state.cast(pa.string()).to_pylist()
    return sorted(zip([records.images[i] for i in records.image.tolist()], cls, state, strict=True))


def read(folder: Path, content: str | bytes, name: str = "mine.csv", **values: object) -> Records:
    return read_table(write(folder, content, name), None, TableSettings(**values))  # pyright: ignore[reportArgumentType]


LONG = [("a.jpg", "cat", "1"), ("a.jpg", "dog", "0"), ("b.jpg", "bird, small", "1"), ("é.jpg", "cat", "")]
LONG_TEXT = "image,class,state\na.jpg,cat,1\na.jpg,dog,0\nb.jpg,'bird, small',yes\né.jpg,cat,\n".replace("'", '"')


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", LONG_TEXT.encode()),
        ("bom.csv", LONG_TEXT.encode("utf-8-sig")),
        ("utf16.csv", LONG_TEXT.encode("utf-16")),
        ("utf16be.csv", b"\xfe\xff" + LONG_TEXT.encode("utf-16-be")),
        ("crlf.csv", LONG_TEXT.replace("\n", "\r\n").encode()),
        ("mac.csv", LONG_TEXT.replace("\n", "\r").encode()),
        ("blank-lines.csv", ("\n\n" + LONG_TEXT.replace("\n", "\n\n")).encode()),
        ("no-last-newline.csv", LONG_TEXT.rstrip("\n").encode()),
        ("packed.csv.gz", gzip.compress(LONG_TEXT.encode(), mtime=0)),
        ("packed16.tsv.gz", gzip.compress(LONG_TEXT.encode("utf-16"), mtime=0)),
        ("excel.CSV", LONG_TEXT.replace('"', "").replace(", ", "~").replace(",", ";").replace("~", ", ").encode()),
        ("tabs.tsv", LONG_TEXT.replace('"', "").replace(", ", "~").replace(",", "\t").replace("~", ", ").encode()),
        ("tabs.txt", LONG_TEXT.replace('"', "").replace(", ", "~").replace(",", "\t").replace("~", ", ").encode()),
    ],
)
def test_encodings_and_delimiters(tmp_path: Path, name: str, content: bytes) -> None:
    records = read(tmp_path, content, name)
    assert labels_of(records) == sorted(LONG)
    assert records.images == ["a.jpg", "b.jpg", "é.jpg"]
    assert records.row is not None
    assert records.row.tolist() == [1, 2, 3, 4]
    assert not records.complete
    assert not records.bad_rows
    assert detect_table(str(tmp_path / name))


def test_a_bucket_is_read_like_a_folder(tmp_path: Path, s3: str) -> None:
    for name, content in (("a.csv", LONG_TEXT.encode()), ("a.csv.gz", gzip.compress(LONG_TEXT.encode(), mtime=0))):
        storage.write_bytes(f"{s3}/{name}", content)
        assert labels_of(read_table(f"{s3}/{name}", None, TableSettings())) == sorted(LONG)
        assert detect_table(f"{s3}/{name}")
    with pytest.raises(LabelError, match=r"absent\.csv"):
        read_table(f"{s3}/absent.csv", None, TableSettings())
    assert detect_table(f"{s3}/absent.csv") is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "empty.csv.* is empty"),
        ("blank.csv", b"\n \n", "blank.csv.* is empty"),
        ("header.csv", b"image,class,state", "header.csv.* no row"),
        ("header2.csv", b"image,class,state\n", "header2.csv.* no row"),
        ("allbad.csv", b"image,class\na\nb,c,d\n", "allbad.csv.* 1 columns, expected 2: a"),
        ("latin.csv", "image,class\né.jpg,cat\n".encode("latin-1"), "latin.csv.*iconv"),
        ("nobom.csv", "image,class\na.jpg,cat\n".encode("utf-16-le"), "nobom.csv.* UTF-16"),
        ("damaged.csv.gz", gzip.compress(LONG_TEXT.encode() * 2000, mtime=0)[:300], "damaged.csv.gz"),
        ("no.csv.gz", b"\x1f\x8b\x08\x00abc", "no.csv.gz"),
        ("damaged.parquet", b"PAR1abcdPAR1", "damaged.parquet"),
        ("book.xlsx", b"PK\x03\x04", "book.xlsx.* export it as CSV"),
        ("book.csv", b"PK\x03\x04", "book.csv.* export it as CSV"),
        ("labels.json", b"{}", "labels.json.* .csv, .tsv"),
        ("noimage.csv", b"photo of,class\na,b\n", "noimage.csv.* photo of, class.* table.image_column"),
        ("noclass.csv", b"image,age\na,33\n", r"noclass.csv.* age \('33'\).* table.class_columns"),
        ("twice.csv", b"image,cat, cat\na,1,0\n", "twice.csv.* several columns 'cat'"),
        ("equal.csv", b"Image,image,cat\na,b,1\n", "equal.csv.* 'Image' and 'image'"),
        ("open.csv", b'image,class,state\na,cat,"1\nb,dog,0\nc,dog,0\n', "open.csv.* quote"),
        ("open2.csv", b'image,class,state\na,"cat,1\nb,dog,0\nc,dog,0\n', "open2.csv.* quote"),
        ("lists.parquet", pa.table({"image": ["a"], "labels": [[1, 2]]}), "lists.parquet.* source to hf"),
        ("images.parquet", pa.table({"image": [["a"]], "labels": [["b"]]}), "images.parquet.* lists in 'image'"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | pa.Table, message: str) -> None:
    if isinstance(content, pa.Table):
        pq.write_table(content, tmp_path / name)
    else:
        write(tmp_path, content, name)
    with pytest.raises(LabelError, match=message) as error:
        read_table(str(tmp_path / name), None, TableSettings())
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name in ("absent.csv", "folder.csv"):
        with pytest.raises(LabelError, match=name):
            read_table(str(tmp_path / name), None, TableSettings())
        assert detect_table(str(tmp_path / name)) is None


def test_bad_rows_are_kept_with_their_numbers(tmp_path: Path) -> None:
    text = '\n \nimage,class,state\na,dog,1\nb,dog\n\n,,\nc,dog,1,"x"\n,dog,1\nd,,1\ne,dog,1\n'
    records = read(tmp_path, text)
    assert labels_of(records) == [("a", "dog", "1"), ("e", "dog", "1")]
    assert records.row is not None
    assert records.row.tolist() == [1, 7]
    numbers, reasons = zip(*records.bad_rows, strict=True)
    assert numbers == (2, 4, 5, 6)
    for reason, text in zip(reasons, ("2 columns", "4 columns", "no image: ,dog,1", "d,,1"), strict=True):
        assert text in reason
    assert any("1 empty row" in note for note in records.notes)


def test_numbers_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paml.sources.table_columns._BLOCK_BYTES", 64)
    rows = [f"{i}.jpg,c{i % 7}" if i % 10 else f"{i}.jpg" for i in range(1, 300)]
    records = read(tmp_path, "image,class\n" + "\n".join(rows))
    assert [number for number, _ in records.bad_rows] == list(range(10, 300, 10))
    assert records.row is not None
    assert [records.images[i] for i in records.image] == [f"{number}.jpg" for number in records.row]


@pytest.mark.parametrize("kind", ["int", "float", "bool", "text", "dictionary", "float16"])
def test_parquet_with_any_type_of_state(tmp_path: Path, kind: str) -> None:
    states = {
        "int": pa.array([1, 0, None], pa.int8()),
        "float": pa.array([1.0, 0.0, None]),
        "float16": pa.array(np.array([1, 0, np.nan], np.float16)),
        "bool": pa.array([True, False, None]),
        "text": pa.array(["positive", " No ", "?"], pa.large_string()),
        "dictionary": pa.array(["1", "0", "2"]).dictionary_encode(),
    }[kind]
    table = pa.table(
        {"state": states, "image": pa.array([1.0, 2.0, 3.0]), "class": ["x"] * 3, "more": [[{"a": 1}]] * 3}
    )
    pq.write_table(table, tmp_path / "mine.parquet")
    records = read_table(str(tmp_path / "mine.parquet"), None, TableSettings())
    other = {"text": "?", "dictionary": "2"}.get(kind, "")
    assert labels_of(records) == [("1", "x", "1"), ("2", "x", "0"), ("3", "x", other)]
    assert any("more" in note for note in records.notes)


def test_parquet_lists_of_text(tmp_path: Path) -> None:
    lists = pa.array([["cat", " big dog", None], [], None, ["cat", ""]], pa.list_(pa.string()))
    for name, column in (("labels", lists), ("whatever", lists.cast(pa.large_list(pa.large_string())))):
        pq.write_table(pa.table({"file_name": list("abcd"), name: column}), tmp_path / "mine.parquet", row_group_size=2)
        records = read_table(str(tmp_path / "mine.parquet"), None, TableSettings())
        assert labels_of(records) == [("a", "big dog", "1"), ("a", "cat", "1"), ("d", "cat", "1")]
        assert records.images == ["a", "b", "c", "d"]


def test_what_is_left_to_other_sources(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "a"}], "labels": [["a"]]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"x"], "labels": [["a"]]}), tmp_path / "b.parquet")
    write(tmp_path, "{}", "a.json")
    write(tmp_path, "a.jpg 0 1\nb.jpg 1 0\n", "list.txt")
    write(tmp_path, b"\x00\x01", "c.csv")
    for name in ("a.parquet", "b.parquet", "a.json", "list.txt", "c.csv", "."):
        assert detect_table(str(tmp_path / name)) is None
    pq.write_table(pa.table({"image": ["a"], "labels": [["a"]]}), tmp_path / "c.parquet")
    assert "image, labels" in (detect_table(str(tmp_path / "c.parquet")) or "")


# --- states --------------------------------------------------------------------------------------------------------

POSITIVE = ["1", "1.0", "1.00", "+1", "yes", "Y", "TRUE", "t", "present", "positive", "Pos"]
NEGATIVE = ["0", "0.0", "0.", "-0.0", "no", "N", "False", "f", "absent", "Negative", "neg"]
BLANK = ["", "  ", "nan", "NULL", "unknown", "Uncertain", "unobserved"]
OTHER = ["0.7", "maybe", "2", "-1", "-1.0", "1e400", "٣"]


def test_state_words(tmp_path: Path) -> None:
    words = POSITIVE + NEGATIVE + BLANK + OTHER
    expected = ["1"] * len(POSITIVE) + ["0"] * len(NEGATIVE) + [""] * len(BLANK) + OTHER
    records = read(tmp_path, "image,class,state\n" + "".join(f"{i:03},c,{word}\n" for i, word in enumerate(words)))
    assert [state for _, _, state in labels_of(records)] == expected
    assert any("-1: 2" in note and "minus_one" in note for note in records.notes)


@pytest.mark.parametrize(("minus_one", "state"), [("negative", "0"), ("unobserved", ""), ("positive", "1")])
def test_minus_one_by_setting(tmp_path: Path, minus_one: str, state: str) -> None:
    long = read(tmp_path, "image,class,state\na,cat,-1\nb,cat,-1.0\n", minus_one=minus_one)
    wide = read(tmp_path, "image,cat\na,-1\nb,-1.0\nc,1\n", minus_one=minus_one)
    assert labels_of(long) == [("a", "cat", state), ("b", "cat", state)]
    assert labels_of(wide) == [*labels_of(long), ("c", "cat", "1")]
    assert not long.notes


def test_own_words_win(tmp_path: Path) -> None:
    own = TableSettings(
        positive_words=("X", "2"), negative_words=("",), unobserved_words=("-1", "no"), minus_one="negative"
    )
    path = write(tmp_path, "image,cat,dog\na,x,\nb,-1,2\nc,no,1\n")
    assert labels_of(read_table(path, None, own)) == [
        ("a", "cat", "1"), ("a", "dog", "0"), ("b", "cat", ""), ("b", "dog", "1"), ("c", "cat", ""), ("c", "dog", "1"),
    ]  # fmt: skip


# --- wide ----------------------------------------------------------------------------------------------------------


def test_wide_as_roboflow_writes_it(tmp_path: Path) -> None:
    records = read(tmp_path, "filename, cat, dog\na.jpg, 1, 0\nb.jpg, 0, 1\n")
    assert labels_of(records) == [
        ("a.jpg", "cat", "1"), ("a.jpg", "dog", "0"), ("b.jpg", "cat", "0"), ("b.jpg", "dog", "1"),
    ]  # fmt: skip
    assert records.classes is not None
    assert records.classes.classes == ["cat", "dog"]
    assert "wide" in records.understood


CHEXPERT = """Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema,Fracture
x/a.jpg,Female,68,Frontal,AP,1.0,,
x/b.jpg,Male,0,Lateral,,,-1.0,0.0
x/c.jpg,Male,1,Frontal,PA,,1.0,
"""


def test_wide_as_chexpert_writes_it(tmp_path: Path) -> None:
    records = read(tmp_path, CHEXPERT, minus_one="unobserved")
    assert labels_of(records) == [
        ("x/a.jpg", "No Finding", "1"), ("x/b.jpg", "Edema", ""),
        ("x/b.jpg", "Fracture", "0"), ("x/c.jpg", "Edema", "1"),
    ]  # fmt: skip
    assert records.classes is not None
    assert records.classes.classes == ["No Finding", "Edema", "Fracture"]
    note = next(note for note in records.notes if "not used" in note)
    for text in ("Sex ('Female')", "Age ('68')", "Frontal/Lateral ('Frontal')", "AP/PA ('AP')"):
        assert text in note
    records = read(tmp_path, CHEXPERT, class_columns=["edema"])
    assert labels_of(records) == [("x/b.jpg", "Edema", "-1.0"), ("x/c.jpg", "Edema", "1")]
    with pytest.raises(LabelError, match="'Oedema'"):
        read(tmp_path, CHEXPERT, class_columns=["Oedema"])


@pytest.mark.parametrize(
    ("values", "is_class"),
    [
        (["1", "0", ""], True),
        (["1", "1", "1"], True),
        (["yes", "no", "unknown"], True),
        (["Y", "N", ""], True),
        (["1", "0", "0.7"], True),
        (["1", "0", "?"], True),
        (["-1", "", ""], True),
        (["F", "M", "F"], False),
        (["F", "F", "F"], False),
        (["0", "1", "57"], False),
        (["0", "1", "2"], False),
        (["", "", ""], False),
        (["0.1", "0.7", "1"], False),
        (["AP", "PA", "1"], False),
    ],
)
def test_which_columns_are_classes(tmp_path: Path, values: list[str], is_class: bool) -> None:
    rows = "".join(f"{name},{value},{name == 'a':d}\n" for name, value in zip("abc", values, strict=True))
    records = read(tmp_path, "image,odd,cat\n" + rows)
    assert records.classes is not None
    assert records.classes.classes == (["odd", "cat"] if is_class else ["cat"])
    assert any("odd" in note for note in records.notes) != is_class
    forced = read(tmp_path, "image,odd,cat\n" + rows, class_columns=["odd"])
    assert len(forced.cls) == sum(value != "" for value in values)


def test_index_and_second_image_column_are_no_classes(tmp_path: Path) -> None:
    records = read(tmp_path, ",Index,id,file_name,cat,\n0,0,0,a.jpg,1,\n1,1,1,b.jpg,0,x\n")
    assert labels_of(records) == [("a.jpg", "cat", "1"), ("b.jpg", "cat", "0")]
    assert "'file_name' (not 'id')" in records.understood
    assert any("Unnamed: 0 ('0')" in note and "Unnamed: 5" in note for note in records.notes)
    assert read(tmp_path, "id,file_name,cat\n0,a.jpg,1\n", image_column="ID").images == ["0"]


def test_rows_of_one_image_are_joined(tmp_path: Path) -> None:
    wide = read(tmp_path, "image,cat,dog\na,1,\nb,0,1\na,,0\n")
    assert labels_of(wide) == [("a", "cat", "1"), ("a", "dog", "0"), ("b", "cat", "0"), ("b", "dog", "1")]
    listed = read(tmp_path, "image,labels\na.jpg,cat\na.jpg,dog\nb.jpg,dog\na.jpg,bird|dog\nc.jpg,\n")
    assert listed.images == ["a.jpg", "b.jpg", "c.jpg"]
    assert set(labels_of(listed)) == {
        (f"{i}.jpg", c, "1") for i, c in zip("aaab", ["cat", "dog", "bird", "dog"], strict=True)
    }


# --- long and list -------------------------------------------------------------------------------------------------


def test_long_without_states_is_positive(tmp_path: Path) -> None:
    records = read(tmp_path, "image,class\na.jpg,cat\na.jpg,traffic light\nb.jpg,\n")
    assert labels_of(records) == [("a.jpg", "cat", "1"), ("a.jpg", "traffic light", "1")]
    assert records.images == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "header",
    [
        "ImageID,Source,LabelName,Confidence",
        "Image Index,x,Class,State",
        "FILE_NAME,x,category,value",
        "img-path,x,label,present",
        "image_id,x,class_name,label",
        "image,x,labels,state",
    ],
)
def test_usual_names_of_columns(tmp_path: Path, header: str) -> None:
    records = read(tmp_path, f"{header}\na,verification,cat|dog,1\nb,verification,cat,0\n")
    assert labels_of(records) == [("a", "cat|dog", "1"), ("b", "cat", "0")]
    assert any("'cat|dog'" in note for note in records.notes)
    assert any("verification" in note for note in records.notes)


def test_columns_by_setting(tmp_path: Path) -> None:
    text = "foto,was,wie,teil\na,cat,1,train\nb,dog,0,val\n"
    names = {"image_column": "Foto", "class_column": "was", "split_column": "teil"}
    records = read(tmp_path, text, **names, state_column="wie")
    assert labels_of(records) == [("a", "cat", "1"), ("b", "dog", "0")]
    assert records.splits == ["train", "val"]
    assert [state for *_, state in labels_of(read(tmp_path, text, **names))] == ["1", "1"]
    with pytest.raises(LabelError, match=r"'absent'.* foto, was"):
        read(tmp_path, text, image_column="absent")


LISTS = {
    "|": "a,Atelectasis|Effusion\nb,Effusion\nc,No Finding\n",
    ";": 'a,"red; light;"\nb,green\nc,;\n',
    ",": 'a,"cat, dog"\nb,dog\nc,"cat, traffic light"\n',
    "json": 'a,"[""cat"", ""dog""]"\nb,"[""dog""]"\nc,[]\n',
    "python": "a,\"['cat', 'dog']\"\nb,['dog']\nc,[]\n",
}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("|", [("a", "Atelectasis"), ("a", "Effusion"), ("b", "Effusion"), ("c", "No Finding")]),
        (";", [("a", "light"), ("a", "red"), ("b", "green")]),
        (",", [("a", "cat"), ("a", "dog"), ("b", "dog"), ("c", "cat"), ("c", "traffic light")]),
        ("json", [("a", "cat"), ("a", "dog"), ("b", "dog")]),
        ("python", [("a", "cat"), ("a", "dog"), ("b", "dog")]),
    ],
)
def test_separator_is_detected(tmp_path: Path, kind: str, expected: list[tuple[str, str]]) -> None:
    for header in ("image,labels", "Image Index,Finding Labels", "image,tags"):
        records = read(tmp_path, f"{header}\n{LISTS[kind]}")
        assert labels_of(records) == [(image, cls, "1") for image, cls in expected]
        assert records.images == ["a", "b", "c"]
        assert f"separator {('json' if kind == 'python' else kind)!r}" in records.understood
    if kind != ",":
        assert labels_of(read(tmp_path, f"image,label\n{LISTS[kind]}")) == labels_of(records)


@pytest.mark.parametrize(
    "cells",
    [
        ["haze primary", "clear primary water", "haze"],
        ["traffic light", "stop sign", "car"],
        ["hot dog", "dog"],
        ["cat, dog", "bird"],
        ["tench, Tinca tinca", "goldfish, Carassius auratus"],
        ["a|b", "b;c"],
        ["cat,dog|bird", "cat", "dog|bird"],
        ["[cat", "[cat 'dog]"],
        ["[{}]", "[{}, {}]"],
    ],
)
def test_separator_that_is_not_certain_is_refused(tmp_path: Path, cells: list[str]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("image", "labels"), *((f"{i}.jpg", cell) for i, cell in enumerate(cells))])
    with pytest.raises(LabelError, match=r"table\.separator") as error:
        read(tmp_path, text.getvalue())
    assert repr(max(cells, key=len)) in str(error.value)
    whole = read(tmp_path, text.getvalue(), separator="none")
    assert [cls for _, cls, _ in labels_of(whole)] == cells


def test_separator_by_setting(tmp_path: Path) -> None:
    planet = "image_name,tags\na,haze  primary\nb,clear primary water\nc,haze\n"
    for separator in (" ", "blank"):
        assert len(labels_of(read(tmp_path, planet, separator=separator))) == 6
    assert len(labels_of(read(tmp_path, "image,labels\na,x / y\nb,x\n", separator="/"))) == 3
    records = read(tmp_path, f"image,labels\n{LISTS['|']}", separator=";")
    assert [cls for _, cls, _ in labels_of(records)] == ["Atelectasis|Effusion", "Effusion", "No Finding"]
    assert any("no cell" in note and "Atelectasis|Effusion" in note for note in records.notes)
    assert labels_of(read(tmp_path, "image,class,state\na,x|y,0\n", separator="|")) == [
        ("a", "x", "0"),
        ("a", "y", "0"),
    ]


def test_many_combinations_of_tags_are_blank_separated() -> None:
    tags = [f"t{i}" for i in range(8)]
    cells = [" ".join(tag for i, tag in enumerate(tags) if number >> i & 1) for number in range(1, 60)]
    assert detect_separator(cells) == "blank"
    assert detect_separator([f"big {tag}" for tag in tags]) is None
    assert detect_separator(tags) == "none"


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ('["cat", "big dog"]', ["cat", "big dog"]),
        ("['cat', \"dog's\"]", ["cat", "dog's"]),
        (r"['cat\'s']", ["cat's"]),
        ("['cat' 'dog'\n 'bird']", ["cat", "dog", "bird"]),
        ("[cat, big dog]", ["cat", " big dog"]),
        ('{"choices": ["cat", "dog"]}', ["cat", "dog"]),
        ("[1, 2]", ["1", "2"]),
        ("[]", []),
        ("[ ]", []),
        ("['cat'", None),
        ("['cat''dog']", None),
        ('["cat", ["dog"]]', None),
        ('{"a": 1}', None),
        ("[" * 100_000, None),
    ],
)
def test_lists_as_tools_write_them(text: str, items: list[str] | None) -> None:
    assert parse_list(text) in (items, items or [""])


def test_a_damaged_list_is_a_bad_row(tmp_path: Path) -> None:
    records = read(tmp_path, "image,labels\na,\"['cat', 'dog']\"\nb,\"['cat',, 'dog']\"\nc,\"bird\"\n")
    assert labels_of(records) == [("a", "cat", "1"), ("a", "dog", "1"), ("c", "bird", "1")]
    assert [number for number, _ in records.bad_rows] == [2]
    assert records.images == ["a", "b", "c"]


@pytest.mark.parametrize(
    "text",
    ["image,label\na,0\nb,1\n", "image,class,cat,dog\na,x,1,0\nb,y,0,1\n"],
)
def test_columns_that_fit_two_forms_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(LabelError, match=r"table\.form"):
        read(tmp_path, text)
    cls = text.split(",")[1].strip()[:5]
    wide = read(tmp_path, text, form="wide")
    long = read(tmp_path, text, form="long")
    assert wide.classes is not None
    assert wide.classes.classes == (["label"] if cls == "label" else ["cat", "dog"])
    assert [cls for _, cls, _ in labels_of(long)] == (["0", "1"] if cls == "label" else ["x", "y"])


def test_joined_cells_are_a_list_next_to_columns_of_numbers(tmp_path: Path) -> None:
    nih = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,\n1_000.png,A|B c,0,1,58,\n1_001.png,A,1,1,58,\n"
    )
    records = read(tmp_path, nih)
    assert labels_of(records) == [("1_000.png", "A", "1"), ("1_000.png", "B c", "1"), ("1_001.png", "A", "1")]
    assert any("Follow-up #" in note and "Patient Age ('58')" in note for note in records.notes)


# --- splits --------------------------------------------------------------------------------------------------------


def test_splits(tmp_path: Path) -> None:
    records = read(tmp_path, "image,class,state,Split\na,cat,1,train\nb,cat,0,val2017\na,dog,1,\nc,cat,1,\n")
    assert records.splits == ["train", "val2017", ""]
    with pytest.raises(LabelError, match=r"'a' in '(test|train)' and '(test|train)'"):
        read(tmp_path, "image,class,state,split\na,cat,1,train\nb,cat,0,val\na,dog,1,test\n")
    assert read(tmp_path, "image,class,set\na,cat,Training\n").splits == ["Training"]
    assert read(tmp_path, "image,class,set\na,cat,north\n").splits is None
    assert read(tmp_path, "image,class,fold\na,cat,1\nb,cat,2\n").splits is None


# --- any file ------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a.jpg", "b", "c d.png", 'quo"te', "comma,name", "", "ü.jpg", "se;mi", "line\nend"])
TEXTS = st.sampled_from(["dog", "Dog", 'big "cat"', "a,b", "", "ünï", "0"])
STATES = st.sampled_from(["1", "0", "positive", "Negative", "", "2", "yes", "unknown"])
STATE_OF = {"positive": "1", "negative": "0", "yes": "1", "unknown": ""}


def test_any_long_file_equals_the_reference(tmp_path: Path) -> None:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(NAMES, TEXTS, STATES), min_size=1, max_size=12), st.sampled_from(",;\t"))
    def check(rows: list[tuple[str, str, str]], delimiter: str) -> None:
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter).writerows([("image", "class", "state"), *rows])
        records = read(tmp_path, text.getvalue())
        expected = [(i, c, STATE_OF.get(s.lower(), s)) for i, c, s in rows if i and c]
        assert labels_of(records) == sorted(expected)
        bad = [
            number
            for number, (i, c, s) in enumerate(rows, 1)
            if (not i and (c or s)) or (i and not c and s not in ("", "nan"))
        ]
        assert [number for number, _ in records.bad_rows] == bad
        assert set(records.images) == {i for i, _, _ in rows} - {""}

    check()


def test_any_wide_file_equals_the_reference(tmp_path: Path) -> None:
    cell = st.sampled_from(["1", "0", "", "-1", "yes", "no", "0.5"])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(cell, cell, cell), min_size=1, max_size=8))
    def check(rows: Sequence[tuple[str, ...]]) -> None:
        classes = ["cat", "dog", "emu"]
        lines = ["image," + ",".join(classes), *(",".join([f"{i}.jpg", *row]) for i, row in enumerate(rows))]
        records = read(tmp_path, "\n".join(lines), class_columns=classes, minus_one="negative")
        state_of = {"yes": "1", "no": "0", "-1": "0"}
        expected = [
            (f"{i}.jpg", cls, state_of.get(text, text))
            for i, row in enumerate(rows) for cls, text in zip(classes, row, strict=True) if text
        ]  # fmt: skip
        assert labels_of(records) == sorted(expected)
        assert len(records.images) == len(rows)

    check()


def test_any_bytes_are_read_or_refused(tmp_path: Path) -> None:
    piece = st.sampled_from(
        [b"image", b"labels", b"class", b"state", b",", b";", b"\t", b"\n", b"\r\n", b'"', b"a.jpg", b"cat", b"1", b"0",
         b"-1", b"|", b"[", b"]", b"'", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b"\0", b"PAR1", b"\x1f\x8b", b" ", b"{"]
    )  # fmt: skip

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(piece, max_size=30).map(b"".join) | st.binary(max_size=60),
        st.sampled_from(["a.csv", "a.txt", "a.parquet"]),
    )
    def check(data: bytes, name: str) -> None:
        path = write(tmp_path, data, name)
        detect_table(path)
        try:
            records = read_table(path, None, TableSettings())
        except LabelError:
            return
        assert len(records.cls) == len(records.image)

    check()


@pytest.mark.parametrize(
    "values",
    [
        {"form": "narrow"},
        {"minus_one": "uncertain"},
        {"separator": ""},
        {"class_column": "a", "class_columns": ["b"]},
        {"form": "wide", "labels_column": "a"},
        {"positive_words": ("x",), "negative_words": ("X",)},
    ],
)
def test_settings_that_are_refused(values: dict) -> None:
    with pytest.raises(SettingsError, match=r"table\."):
        TableSettings(**values)
