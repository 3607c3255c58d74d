"""Files as `datasets` writes them, made with pyarrow: features in the schema, images in them or next to them."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml import storage
from paml.errors import DataError, SettingsError
from paml.sources.hf import HFSettings, detect_hf, read_hf
from paml.sources.hf_files import open_file
from paml.sources.parts import read_parts
from paml.sources.records import Records
from paml.sources.table import detect_table
from tests.sources.test_full_sets import labels_of

P, N = "1", "0"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["dog", "cat", "traffic light"]
CLASS_LABEL = {"names": NAMES, "_type": "ClassLabel"}


def images(count: int, path: str | None = None) -> pa.Array:
    """Images whose bytes are their number; path: a format of their paths."""
    rows = [{"bytes": b"%d" % n, "path": path and path.format(n)} for n in range(count)]
    return pa.array(rows, IMAGE)


def table(columns: Mapping[str, Any], features: Mapping[str, Any] | None = None) -> pa.Table:
    """A table with the features of its columns; by default of the image alone."""
    features = {"image": {"_type": "Image"}, **(features or {})}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(dict(columns)).replace_schema_metadata(metadata)


def save_arrow(path: Path, content: pa.Table, batch: int = 1000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content, batch)


def save_disk(folder: Path, content: pa.Table, files: int = 1, split: str | None = None) -> None:
    """As `Dataset.save_to_disk`."""
    names = [f"data-{n:05d}-of-{files:05d}.arrow" for n in range(files)]
    rows = -(-len(content) // files)
    for number, name in enumerate(names):
        save_arrow(folder / name, content.slice(number * rows, rows))
    state = {"_data_files": [{"filename": name} for name in names], "_split": split, "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def read(path: Path, **options: Any) -> Records:
    """The records; embedded images have exactly the keys that are listed."""
    assert detect_hf(str(path))
    records = read_hf(str(path), None, HFSettings(**options))
    if records.parts is not None:
        assert [key for key, _ in read_parts(records.parts)] == list(records.images)
        assert max(len(pickle.dumps(part)) for part in records.parts) < 2000
        assert len({part.name for part in records.parts}) == len(records.parts)
    return records


def read_parquet(
    folder: Path, columns: Mapping[str, Any], features: Mapping[str, Any] | None = None, **options: Any
) -> Records:
    pq.write_table(table(columns, features), folder / "birds.parquet")
    return read(folder / "birds.parquet", **options)


def states(records: Records) -> list[dict[str, str]]:
    return list(labels_of(records).values())


@pytest.mark.parametrize(
    "feature",
    [
        {"feature": CLASS_LABEL, "_type": "List"},
        {"feature": CLASS_LABEL, "_type": "LargeList"},
        {"feature": CLASS_LABEL, "length": -1, "_type": "Sequence"},
        {"feature": {**CLASS_LABEL, "num_classes": 3, "id": None}, "length": -1, "id": None, "_type": "Sequence"},
        [CLASS_LABEL],
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int64())])
def test_lists_of_class_labels(tmp_path: Path, feature: Any, kind: pa.DataType) -> None:
    labels = pa.array([[0, 2], [], None, [1, -1], [7]], kind)
    records = read_parquet(
        tmp_path, {"image": images(5, "x/{}.jpg"), "labels": labels, "width": [1] * 5}, {"labels": feature}
    )
    assert labels_of(records) == {
        "x/0": {"dog": P, "traffic light": P}, "x/1": {}, "x/2": {}, "x/3": {"cat": P}, "x/4": {"7": P},
    }  # fmt: skip
    assert records.classes is not None
    assert records.classes.classes == NAMES
    assert records.row is not None
    assert records.row.tolist() == [1, 1, 4, 5]
    assert not records.complete
    assert dict(read_parts(records.parts or ())) == {f"x/{n}": b"%d" % n for n in range(5)}
    assert [word in " ".join(records.notes) for word in ("width", "2 images have no labels", "1 class numbers")] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("labels", "features", "expected"),
    [
        (pa.array([0, -1, None]), {"labels": CLASS_LABEL}, [{"dog": P}, {}, {}]),
        (pa.array([10, 9, 9]), None, [{"10": P}, {"9": P}, {"9": P}]),
        (pa.array([3.0, 4.0, None]), None, [{"3": P}, {"4": P}, {}]),
        (["dog", "traffic", ""], None, [{"dog": P}, {"traffic": P}, {}]),
        (["dog|traffic light", "dog", None], None, [{"dog": P, "traffic light": P}, {"dog": P}, {}]),
        ([["traffic light", "a, b"], [None], None], None, [{"traffic light": P, "a, b": P}, {}, {}]),
        (pa.array(["dog", "cat", "dog"]).dictionary_encode(), None, [{"dog": P}, {"cat": P}, {"dog": P}]),
        ([[5, 3], [3], []], None, [{"5": P, "3": P}, {"3": P}, {}]),
        ([[1, 0, 0], [0, 0, -1], None], None, [{"0": P, "1": N, "2": N}, {"0": N, "1": N, "2": "-1"}, {}]),
        ([[True, False], [True, True], None], None, [{"0": P, "1": N}, {"0": P, "1": P}, {}]),
    ],
)  # fmt: skip
def test_kinds_of_label_columns(tmp_path: Path, labels: Any, features: Any, expected: list[dict[str, str]]) -> None:
    assert states(read_parquet(tmp_path, {"image": images(3), "labels": labels}, features)) == expected


def test_a_column_per_class(tmp_path: Path) -> None:
    columns = {
        "image": images(3), "dog": [True, False, None], "cat": pa.array([1, 0, -1], pa.int8()), "owl": [1.0, None, 0.0],
        "age": [3, 40, 1], "caption": ["a", "b", "c"],
    }  # fmt: skip
    records = read_parquet(tmp_path, columns)
    assert states(records) == [{"dog": P, "cat": P, "owl": P}, {"dog": N, "cat": N}, {"cat": "-1", "owl": N}]
    assert records.classes is not None
    assert records.classes.classes == ["dog", "cat", "owl"]
    assert any("age" in note and "caption" in note for note in records.notes)
    assert any("hf.minus_one" in note for note in records.notes)
    assert states(read_parquet(tmp_path, columns, minus_one="unobserved"))[2] == {"cat": "", "owl": N}
    with pytest.raises(SettingsError, match=r"hf\.minus_one is 'maybe'"):
        HFSettings(minus_one="maybe")


def test_absent_classes_in_a_column(tmp_path: Path) -> None:
    columns = {"image": images(2), "present": [["dog"], []], "absent": [["cat"], ["dog"]]}
    records = read_parquet(tmp_path, columns, labels_column="present", negatives_column="absent")
    assert states(records) == [{"dog": P, "cat": N}, {"dog": N}]
    with pytest.raises(DataError, match="'present' and 'absent'"):
        read_parquet(tmp_path, columns)


@pytest.mark.parametrize(
    ("columns", "features", "message"),
    [
        (
            {"fine": [0], "coarse": [1]},
            {"fine": CLASS_LABEL, "coarse": CLASS_LABEL},
            "'fine' and 'coarse'.*labels_column",
        ),
        ({"mask": images(1), "label": ["a"]}, {}, "'image' and 'mask'.*image_column"),
        ({"caption": ["a dog"]}, {}, r"no column of labels among.*caption \(string\)"),
        ({"labels": [[0.5, 1.0]]}, {}, "0.5"),
        ({"label": ["a dog, on grass"]}, {}, "'a dog, on grass'.*hf.separator"),
        ({"objects": [{"category": [1]}]}, {}, "no column of labels"),
    ],
)
def test_what_is_not_certain_is_refused(tmp_path: Path, columns: Any, features: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_parquet(tmp_path, {"image": images(1), **columns}, features)
    assert str(tmp_path / "birds.parquet") in str(caught.value)


def test_columns_by_setting(tmp_path: Path) -> None:
    columns = {"image": images(2), "photo": images(2, "p{}.png"), "a": [["x"], ["y"]], "b": [["z"], []]}
    records = read_parquet(tmp_path, columns, image_column="photo", labels_column="b")
    assert labels_of(records) == {"p0": {"z": P}, "p1": {}}
    for setting in ("image_column", "labels_column", "negatives_column"):
        with pytest.raises(DataError, match="'nothing'"):
            read_parquet(tmp_path, columns, None, **{setting: "nothing"})
    texts = {"image": images(2), "label": ["a dog, on grass", "cat"]}
    assert states(read_parquet(tmp_path, texts, separator="none")) == [{"a dog, on grass": P}, {"cat": P}]


@pytest.mark.parametrize("layout", ["data/{split}-00000-of-00001", "default/{split}/0000", "{split}"])
def test_splits_of_parquet_files(tmp_path: Path, layout: str) -> None:
    for split, count in (("train", 3), ("validation", 2)):
        path = tmp_path / f"{layout.format(split=split)}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table({"image": images(count, "{}.jpg"), "label": ["a"] * count}), path)
    records = read_hf(str(tmp_path), None, HFSettings())
    assert records.splits == ["train"] * 3 + ["validation"] * 2
    assert records.part_splits == ["train", "validation"]
    assert len(set(records.images)) == 5
    assert [key for key, _ in read_parts(records.parts or ())] == list(records.images)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_bytes_without_paths(tmp_path: Path, kind: pa.DataType) -> None:
    records = read_parquet(tmp_path, {"image": pa.array([b"0", None, b"2"], kind), "label": ["a", "b", "a"]})
    assert list(records.images) == ["birds-0000000", "birds-0000001", "birds-0000002"]
    first, second, third = (payload for _, payload in read_parts(records.parts or ()))
    assert (first, third) == (b"0", b"2")
    assert isinstance(second, DataError)
    assert "row 1" in str(second)


def test_saved_folders(tmp_path: Path) -> None:
    content = table({"image": images(5), "label": [0, 1, 2, 0, -1]}, {"label": CLASS_LABEL})
    save_disk(tmp_path / "all" / "train", content, files=2)
    save_disk(tmp_path / "all" / "extra", content.slice(0, 2))
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "extra"]}')
    save_arrow(tmp_path / "all" / "train" / "cache-12.arrow", content)
    records = read(tmp_path / "all")
    assert records.splits == ["train"] * 5 + ["extra"] * 2
    assert [labels for labels in states(records) if labels] == [{name: P} for name in [*NAMES, "dog", "dog", "cat"]]
    assert [payload for _, payload in read_parts(records.parts or ())] == [b"0", b"1", b"2", b"3", b"4", b"0", b"1"]
    save_disk(tmp_path / "one", content, split="test")
    assert read(tmp_path / "one").splits == ["test"] * 5
    state = {"_data_files": [{"filename": "../one/data-00000-of-00001.arrow"}]}
    (tmp_path / "all" / "train" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"\.\./one"):
        read(tmp_path / "all")
    (tmp_path / "all" / "train" / "state.json").write_text('{"_data_files": [], "_indices_files": [{"filename": "i"}]}')
    with pytest.raises(DataError, match="flatten_indices"):
        read(tmp_path / "all")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 5), st.integers(1, 7), st.booleans())
def test_parts_read_every_image_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], batch: int, per_part: int, arrow: bool
) -> None:
    """Whatever the pieces of the file and of the parts, an image keeps its key."""
    path = tmp_path_factory.getbasetemp() / ("x.arrow" if arrow else "x.parquet")
    content = table({"image": images(sum(sizes) + 1), "label": [str(n) for n in range(sum(sizes) + 1)]})
    if arrow:
        save_arrow(path, content, batch)
    else:
        pq.write_table(content, path, row_group_size=batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paml.sources.hf_files._PART_IMAGES", per_part)
        patch.setattr("paml.sources.hf_files._BATCH_IMAGES", 2)
        records = read(path)
    parts = records.parts or []
    assert sum(part.images or 0 for part in parts) == len(content)
    assert all(part.images == len(list(part)) for part in parts)
    payload_of = dict(read_parts(parts[::-1]))
    assert {key: str(int(payload)) for key, payload in payload_of.items()} == {  # pyright: ignore[reportArgumentType]
        key: cls for key, labels in labels_of(records).items() for cls in labels
    }


def test_lists_of_one_length(tmp_path: Path) -> None:
    """pyarrow cannot read them with null from Parquet."""
    labels = pa.array([[1, 0, 0], None, [0, 1, 1]], pa.list_(pa.int8(), 3))
    save_disk(tmp_path, table({"image": images(3), "labels": labels}))
    assert states(read(tmp_path)) == [{"0": P, "1": N, "2": N}, {}, {"0": N, "1": P, "2": P}]


@pytest.mark.parametrize("name", ["x.arrow", "x.parquet"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    """A damaged image page costs its part, and is reported; a damaged file is refused."""
    path, content = tmp_path / name, table({"image": images(40), "label": ["a"] * 40})
    if name == "x.arrow":
        save_arrow(path, content, 10)
    else:
        pq.write_table(content, path, row_group_size=10, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    records = read(path)
    if name == "x.arrow":
        start = open_file(str(path)).places[2] + 8  # the description of the third batch, after its size
    else:
        start = whole.index(b"20\2\0\0\x0021") - 4  # the size of image 20
    path.write_bytes(whole[:start] + b"\xff" * 4 + whole[start + 4 :])
    *payloads, (key, damage) = read_parts(records.parts or ())
    assert payloads == [(f"x-{n:07d}", b"%d" % n) for n in range(20)]
    assert (key, type(damage)) == (str(path), DataError)
    for cut in (0, 4, len(whole) // 2, len(whole) - 8):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=name):
            read_hf(str(path), None, HFSettings())
    path.write_bytes(b"")
    assert detect_hf(str(path)) is None


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        file = path.parent / row["file_name"]
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")


def test_image_folder_with_metadata(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "train" / "metadata.jsonl",
        [{"file_name": "a/1.jpg", "labels": ["dog", "cat"]}, {"file_name": "2.jpg", "labels": []}],
    )
    write_lines(tmp_path / "test" / "metadata.jsonl", [{"file_name": "2.jpg", "labels": ["dog"]}])
    records = read(tmp_path)
    assert labels_of(records) == {"test/2.jpg": {"dog": P}, "train/a/1.jpg": {"dog": P, "cat": P}, "train/2.jpg": {}}
    assert records.splits == ["test", "train", "train"]
    assert (records.folder, records.files) == (str(tmp_path), list(records.images))
    assert records.parts is None
    one = read(tmp_path / "train" / "metadata.jsonl")
    assert (one.folder, one.files) == (str(tmp_path / "train"), ["a/1.jpg", "2.jpg"])


def test_image_folder_with_csv(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,dog,cat\n1.jpg,1,0\n2.jpg,,1\n../3.jpg,0,0\n")
    (tmp_path / "1.jpg").write_bytes(b"x")
    records = read(tmp_path)
    assert labels_of(records) == {"1.jpg": {"dog": P, "cat": N}, "2.jpg": {"cat": P}, "../3.jpg": {"dog": N, "cat": N}}
    assert records.files == ["1.jpg", "2.jpg", ""]


def test_paths_next_to_the_file(tmp_path: Path) -> None:
    """Rows of one image are joined; an absolute path is used only below the file's folder."""
    rows = [
        {"bytes": None, "path": path} for path in (f"{tmp_path}/i/1.jpg", "i/2.jpg", None, "i/2.jpg", "/etc/passwd")
    ]
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "1.jpg").write_bytes(b"x")
    records = read_parquet(tmp_path, {"image": pa.array(rows, IMAGE), "label": ["a", "b", "c", "d", "e"]})
    assert states(records) == [{"a": P}, {"b": P, "d": P}, {"e": P}]
    assert records.files == ["i/1.jpg", "i/2.jpg", "etc/passwd"]
    assert [number for number, _ in records.bad_rows] == [3]
    (tmp_path / "i" / "1.jpg").unlink()
    records = read(tmp_path / "birds.parquet")
    assert (records.folder, records.files) == (None, None)
    assert any("set images" in note for note in records.notes)


def test_split_column(tmp_path: Path) -> None:
    columns = {"file_name": ["1.jpg", "2.jpg", "1.jpg"], "label": ["a", "b", "c"], "split": ["train", "test", "train"]}
    records = read_parquet(tmp_path, columns)
    assert records.splits == ["train", "test"]
    with pytest.raises(DataError, match=r"'1.jpg' in train and test"):
        read_parquet(tmp_path, columns | {"split": ["train", "test", "test"]})


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    pq.write_table(table({"image": images(1), "label": [0]}, {"label": CLASS_LABEL}), tmp_path / "train.parquet")
    pq.write_table(table({"image": images(1), "label": [0]}), tmp_path / "val.parquet")
    with pytest.raises(DataError, match="different names"):
        read(tmp_path)
    pq.write_table(table({"image": images(1), "kind": [0]}), tmp_path / "val.parquet")
    with pytest.raises(DataError, match=r"val.parquet.*'label'"):
        read(tmp_path)


def test_detection(tmp_path: Path) -> None:
    plain = pa.table({"image": ["a.jpg"], "label": ["dog"]})
    pq.write_table(plain, tmp_path / "plain.parquet")
    pq.write_table(table({"image": images(1), "label": ["a"]}).replace_schema_metadata({}), tmp_path / "bytes.parquet")
    pq.write_table(table({"image": ["a.jpg"], "label": ["dog"]}), tmp_path / "features.parquet")
    for name, is_hf in (("plain", False), ("bytes", True), ("features", True)):
        path = str(tmp_path / f"{name}.parquet")
        assert (detect_hf(path) is not None, detect_table(path) is not None) == (is_hf, not is_hf)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jpg").write_bytes(b"x")
    for path in (tmp_path / "other", tmp_path / "nowhere", tmp_path / "other" / "a.jpg"):
        assert detect_hf(str(path)) is None
        with pytest.raises(DataError, match=path.name):
            read_hf(str(path), None, HFSettings())


def test_files_in_s3(s3: str, tmp_path: Path) -> None:
    content = table({"image": images(9), "label": [0, 1, 2] * 3}, {"label": CLASS_LABEL})
    save_disk(tmp_path / "saved", content)
    pq.write_table(content, tmp_path / "train.parquet", row_group_size=4)
    for path in (*(tmp_path / "saved").iterdir(), tmp_path / "train.parquet"):
        folder = "saved" if path.parent.name == "saved" else "parquet"
        storage.write_bytes(f"{s3}/{folder}/{path.name}", path.read_bytes())
    for folder in ("saved", "parquet"):
        assert detect_hf(f"{s3}/{folder}")
        records = read_hf(f"{s3}/{folder}", None, HFSettings())
        assert states(records) == [{name: P} for name in NAMES] * 3
        assert [payload for _, payload in read_parts(records.parts or ())] == [b"%d" % n for n in range(9)]
