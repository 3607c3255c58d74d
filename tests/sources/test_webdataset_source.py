"""Labels inside tar files: what members hold, which belong to an image, and that images have the labels' keys."""

import io
import json
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml import storage
from paml.errors import DataError, SettingsError
from paml.sources.parts import read_parts
from paml.sources.records import Records
from paml.sources.tars import tar_parts
from paml.sources.webdataset import WebDatasetSettings, detect_webdataset, read_webdataset
from tests.sources.test_full_sets import labels_of


def tar(members: Iterable[tuple[str, Any]], mode: str = "w") -> bytes:
    """A tar file. members: (name, bytes, text, or a value to write as JSON)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=tarfile.PAX_FORMAT) as file:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in members:
            text = content if isinstance(content, bytes | str) else json.dumps(content)
            data = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def samples(ending: str, contents: Iterable[Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Samples 0000, 0001, ... of an image, whose bytes are its key, and a member with labels."""
    return [
        member
        for number, content in enumerate(contents)
        for member in (
            (f"{prefix}{number:04d}.jpg", f"{number:04d}"),
            (f"{prefix}{number:04d}.{ending}", content),
        )
    ]


def read(path: Path, **options: Any) -> Records:
    """The records of a file or folder; its parts have exactly the images, in their order."""
    records = read_webdataset(str(path), None, WebDatasetSettings(**options))
    parts = records.parts
    assert parts is not None
    assert max(len(pickle.dumps(part)) for part in parts) < 2000
    assert len({part.name for part in parts}) == len(parts)
    keys = [key for key, payload in read_parts(parts) if not isinstance(payload, Exception)]
    assert keys == list(records.images)
    return records


def read_one(folder: Path, members: Iterable[tuple[str, Any]], **options: Any) -> Records:
    (folder / "a.tar").write_bytes(tar(members))
    return read(folder / "a.tar", **options)


P, N, U = "1", "0", ""


@pytest.mark.parametrize(
    ("ending", "contents", "labels"),
    [
        ("cls", ["3", " 10\n", "0"], [{"3": P}, {"10": P}, {"0": P}]),
        ("cls", ["3 10", "0,3", "[0, 2]"], [{"3": P, "10": P}, {"0": P, "3": P}, {"0": P, "2": P}]),
        ("cls", ["dog", "cat", ""], [{"dog": P}, {"cat": P}, {}]),
        ("cls", ["traffic light\ndog", "traffic light"], [{"traffic light": P, "dog": P}, {"traffic light": P}]),
        ("cls", ["dog|traffic light", "dog"], [{"dog": P, "traffic light": P}, {"dog": P}]),
        ("cls", ["-1", "4"], [{}, {"4": P}]),
        ("cls", ["0 1 1", "-1 1 0"], [{"0": N, "1": P, "2": P}, {"0": "-1", "1": P, "2": N}]),
        ("txt", ["dog\ncat\n", "cat\n", "\ufeffbird"], [{"dog": P, "cat": P}, {"cat": P}, {"bird": P}]),
        ("json", [{"labels": ["dog", "cat"]}, {"labels": []}, {"labels": None}], [{"dog": P, "cat": P}, {}, {}]),
        ("json", [{"tags": ["dog"], "id": 7}, {"label": 3}, {"class": "cat"}], [{"dog": P}, {"3": P}, {"cat": P}]),
        ("json", [["dog"], 4, [5, 6.0]], [{"dog": P}, {"4": P}, {"5": P, "6": P}]),
        ("json", [{"positive": ["dog"], "negative": ["cat", 3], "width": 5}], [{"dog": P, "cat": N, "3": N}]),
        ("json", [{"labels": {"positive": ["a"], "negative": [], "unobserved": ["b"]}}], [{"a": P, "b": U}]),
        (
            "json",
            [{"labels": {"a": 1, "b": 0, "c": -1, "d": None, "e": True, "f": "no", "g": 0.7}}],
            [{"a": P, "b": N, "c": "-1", "d": U, "e": P, "f": N, "g": "0.7"}],
        ),
        ("json", [{"dog": 1, "cat": 0}, {"dog": 0}], [{"dog": P, "cat": N}, {"dog": N}]),
        ("json", [{"labels": [True, False]}, {"labels": [False, False]}], [{"0": P, "1": N}, {"0": N, "1": N}]),
    ],
)  # fmt: skip
def test_what_members_hold(tmp_path: Path, ending: str, contents: list[Any], labels: list[dict[str, str]]) -> None:
    records = read_one(tmp_path, samples(ending, contents))
    assert list(labels_of(records).values()) == labels
    assert list(records.images) == [f"{number:04d}" for number in range(len(contents))]
    assert not records.complete
    assert not records.bad_rows
    assert detect_webdataset(str(tmp_path / "a.tar"))
    unlabeled = sum(not each for each in labels)
    assert any(note.startswith(f"{unlabeled} images have no labels") for note in records.notes) == (
        unlabeled > 0 and {"labels": []} not in contents and "-1" not in contents
    )


def test_minus_one_is_what_the_setting_says(tmp_path: Path) -> None:
    members = samples("json", [{"labels": {"a": 1, "b": -1}}])
    for word, state in (("negative", N), ("unobserved", U), ("positive", P)):
        assert labels_of(read_one(tmp_path, members, minus_one=word)) == {"0000": {"a": P, "b": state}}
    with pytest.raises(SettingsError, match="minus_one is 'maybe'"):
        WebDatasetSettings(minus_one="maybe")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "dog\ntench, Tinca tinca\ncat\n"),
        ("classnames.json", '["dog", "tench, Tinca tinca", "cat"]'),
        ("classes.json", '{"2": "cat", "0": "dog", "1": "tench, Tinca tinca"}'),
        ("classes.json", '{"cat": 2, "dog": 0, "tench, Tinca tinca": 1}'),
    ],
)
def test_names_of_class_numbers(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    records = read_one(tmp_path, samples("cls", ["1", "0 2", "7"]))
    assert records.classes is not None
    assert records.classes.classes == ["dog", "tench, Tinca tinca", "cat"]
    assert list(labels_of(records).values()) == [{"tench, Tinca tinca": P}, {"dog": P, "cat": P}, {"7": P}]
    assert any(name in note for note in records.notes)


def test_equal_names_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("crane\ndog\ncrane\n")
    records = read_one(tmp_path, samples("cls", ["2", "0"]))
    assert records.classes is not None
    assert (records.classes.classes, records.classes.names) == (["0", "1", "2"], ["crane", "dog", "crane"])
    assert list(labels_of(records).values()) == [{"2": P}, {"0": P}]


def test_class_numbers_without_names_are_in_their_order(tmp_path: Path) -> None:
    records = read_one(tmp_path, samples("cls", ["10", "9", "100"]))
    assert records.classes is not None
    assert records.classes.classes == ["9", "10", "100"]
    assert any("classes.txt" in note for note in records.notes)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_splits_and_repeated_keys(tmp_path: Path, mode: str) -> None:
    suffix = ".tar" + mode[1:].replace(":", ".")
    for name in ("train-000000", "train-000001", "val-000000"):
        (tmp_path / (name + suffix)).write_bytes(tar(samples("cls", [name, "all"]), mode))
    assert detect_webdataset(str(tmp_path))
    records = read(tmp_path)
    assert records.splits == ["train"] * 4 + ["val"] * 2
    assert records.part_splits == ["train", "train", "val"]
    assert labels_of(records, "val") == {"val-000000/0000": {"val-000000": P}, "val-000000/0001": {"all": P}}
    assert any("'0000'" in note for note in records.notes)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/0.tar", "valid/0.tar"], ["train", "valid"]),
        (["birds-train-0.tar", "birds_test_1.tar"], ["train", "test"]),
        (["train000.tar", "val2017-0.tar"], ["train", "val"]),
        (["test_a-0.tar", "test_b-0.tar"], ["test_a", "test_b"]),
        (["extra-0.tar", "train-0.tar"], ["extra", "train"]),
        (["0.tar", "shard-1.tar"], None),
    ],
)
def test_splits_by_folder_or_name(tmp_path: Path, names: list[str], splits: list[str] | None) -> None:
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar([(f"{number}.jpg", "x"), (f"{number}.cls", "1")]))
    assert read(tmp_path).splits == splits
    assert detect_webdataset(str(tmp_path))


def test_names_are_normalized(tmp_path: Path) -> None:
    members = [
        ("./a/1.JPG", "x"),
        ("./a/1.CLS", "dog"),
        ("b\\2.png", "x"),
        ("b/2.cls", "cat"),
        ("/c.jpg", "x"),
        ("c.cls", "dog"),
    ]
    members += [
        ("e\u0301.jpg", "x"),
        ("\u00e9.cls", "cat"),
        ("v1.0/7.jpg", "x"),
        ("v1.0/7.cls", "dog"),
        ("._a.jpg", "junk"),
    ]
    records = read_one(tmp_path, members)
    assert labels_of(records) == {
        "a/1": {"dog": P}, "b/2": {"cat": P}, "c": {"dog": P}, "\u00e9": {"cat": P}, "v1.0/7": {"dog": P},
    }  # fmt: skip
    assert not records.bad_rows


def test_other_images_of_a_sample(tmp_path: Path) -> None:
    members = [
        (f"{n}.{ending}", content)
        for n in range(3)
        for ending, content in (("jpg", "x"), ("seg.png", "mask"), ("cls", "1"))
    ]
    records = read_one(tmp_path, members)
    assert list(records.images) == ["0", "1", "2"]
    assert any("seg.png (3)" in note for note in records.notes)
    assert dict(read_parts(records.parts or ())) == dict.fromkeys("012", b"x")
    two = [(f"{n}.{ending}", "x") for n in range(3) for ending in ("left.jpg", "right.jpg", "cls")]
    with pytest.raises(DataError, match=r"3 samples.*left.jpg, right.jpg.*webdataset.image"):
        read_one(tmp_path, two)
    assert list(read_one(tmp_path, two, image=".left.JPG").images) == ["0", "1", "2"]


def test_names_with_dots(tmp_path: Path) -> None:
    """WebDataset's rule would make one sample of all; a key then ends at the last dot, and that is said."""
    members = [(f"n014.{n}.{ending}", f"{n}") for n in range(3) for ending in ("jpg", "cls")]
    records = read_one(tmp_path, [*members, ("plain.jpg", "x"), ("plain.cls", "5")])
    assert labels_of(records) == {"n014.0": {"0": P}, "n014.1": {"1": P}, "n014.2": {"2": P}, "plain": {"5": P}}
    assert any("last dot" in note for note in records.notes)
    assert detect_webdataset(str(tmp_path / "a.tar"))


def test_members_need_not_be_adjacent(tmp_path: Path) -> None:
    members = samples("cls", ["1", "2", "3"])
    assert labels_of(read_one(tmp_path, sorted(members, key=lambda member: member[0][-3:]))) == {
        "0000": {"1": P}, "0001": {"2": P}, "0002": {"3": P},
    }  # fmt: skip


def test_incomplete_samples_are_counted(tmp_path: Path) -> None:
    members = [
        *samples("cls", ["dog", "cat"]),
        ("lonely.cls", "dog"),
        ("bare.jpg", "x"),
        ("raw.npy", "x"),
        ("raw.cls", "dog"),
    ]
    members += [
        ("0000.cls", "cat"),
        ("empty.json", "{"),
        ("empty.png", "x"),
        ("bin.cls", b"\xff\xfe\xfd"),
        ("bin.gif", "x"),
    ]
    records = read_one(tmp_path, members)
    assert labels_of(records) == {"0000": {"dog": P}, "0001": {"cat": P}, "bare": {}, "empty": {}, "bin": {}}
    reasons = " ".join(reason for _, reason in records.bad_rows)
    assert len(records.bad_rows) == 5
    for name in ("'lonely'", "'raw'", "'0000.cls'", "'empty.json'", "'bin.cls'"):
        assert name in reasons
    assert any(note.startswith("3 images have no labels") for note in records.notes)
    assert any("npy (1)" in note for note in records.notes)


def test_damaged_tar_keeps_what_is_before_the_damage(tmp_path: Path) -> None:
    whole = tar(samples("cls", [str(n) for n in range(10)]))
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    records = read(tmp_path)
    assert 2 <= len(records.images) < 10
    assert [str(tmp_path / "a.tar") in reason for _, reason in records.bad_rows] == [True]


def test_captions_next_to_labels(tmp_path: Path) -> None:
    """Metadata and captions are not labels, and a caption is not taken for a class."""
    members = [("0.jpg", "x"), ("0.json", {"caption": "a dog, on grass", "width": 640}), ("0.txt", "a dog\non grass")]
    with pytest.raises(DataError, match=r"caption \(1\).*webdataset.field"):
        read_one(tmp_path, members)
    records = read_one(tmp_path, [*members, ("0.cls", "a|b")])
    assert labels_of(records) == {"0": {"a": P, "b": P}}
    with pytest.raises(DataError, match="a dog, on grass"):
        read_one(tmp_path, samples("txt", ["a dog, on grass", "two cats on a sofa"]))
    assert len(read_one(tmp_path, samples("txt", ["a, b", "c"]), separator="none").cls.unique()) == 2


def test_two_members_with_labels(tmp_path: Path) -> None:
    members = [("0.jpg", "x"), ("0.cls", "3"), ("0.json", {"label": 3})]
    assert labels_of(read_one(tmp_path, members)) == {"0": {"3": P}}
    members[2] = ("0.json", {"labels": [3, 5], "meta": ["a"]})
    with pytest.raises(DataError, match=r"'0'.*webdataset.labels"):
        read_one(tmp_path, members)
    assert labels_of(read_one(tmp_path, members, labels="cls")) == {"0": {"3": P}}
    assert labels_of(read_one(tmp_path, members, labels=".json")) == {"0": {"3": P, "5": P}}
    assert labels_of(read_one(tmp_path, members, field="meta")) == {"0": {"a": P}}


def test_own_endings_and_fields(tmp_path: Path) -> None:
    members = [
        ("0.jpg", "x"),
        ("0.meta.json", {"kinds": ["a"], "labels": ["b"]}),
        ("1.jpg", "x"),
        ("1.meta.json", {"x": 1}),
    ]
    records = read_one(tmp_path, members, labels="meta.json", field="kinds")
    assert labels_of(records) == {"0": {"a": P}, "1": {}}
    assert any("x (1)" in note for note in records.notes)
    assert labels_of(read_one(tmp_path, [("0.jpg", "x"), ("0.tag", "a;b")], labels="tag")) == {"0": {"a": P, "b": P}}


def test_tars_without_labels_are_another_source(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar([("a.jpg", "x"), ("b.jpg", "x"), ("README.txt", "about")]))
    assert detect_webdataset(str(tmp_path)) is None
    with pytest.raises(DataError, match=r"a.tar.*image 'a' and the labels 'README'"):
        read(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"words" * 500)
    assert detect_webdataset(str(tmp_path)) is None
    with pytest.raises(DataError, match=r"a\.tar is not a tar file"):
        read(tmp_path)
    assert detect_webdataset(str(tmp_path / "nowhere")) is None
    with pytest.raises(DataError, match="nowhere"):
        read(tmp_path / "nowhere")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["labels", "positive", "a", "b"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(_JSON | st.binary(max_size=8) | st.text(max_size=12), min_size=1, max_size=4),
    st.sampled_from(["json", "cls"]),
)
def test_any_content_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, contents: list[Any], ending: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    members = [("first.jpg", "x"), ("first.cls", "sure")]
    texts = [content if isinstance(content, bytes) else json.dumps(content) for content in contents]
    records = read_one(folder, [*members, *samples(ending, texts)], separator="none")
    assert list(records.images) == ["first", *(f"{number:04d}" for number in range(len(contents)))]
    assert labels_of(records)["first"] == {"sure": P}


def test_key_rule_of_plain_tars(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar([("./cats/1.jpg", "c"), ("dogs\\1.v2.jpg", "d"), ("notes.txt", "x")]))
    by_path, by_name = tar_parts(tmp_path, "path"), tar_parts(tmp_path)
    assert list(read_parts(by_path)) == [("cats/1", b"c"), ("dogs/1.v2", b"d")]
    assert [key for key, _ in read_parts(by_name)] == ["1", "1.v2"]
    assert by_path[0].name != by_name[0].name


def test_tars_in_s3(s3: str) -> None:
    for name in ("train-0.tar", "val-0.tar"):
        storage.write_bytes(f"{s3}/set/{name}", tar(samples("cls", ["1", "0"], f"{name[0]}/")))
    storage.write_bytes(f"{s3}/set/classes.txt", b"dog\ncat\n")
    assert detect_webdataset(f"{s3}/set")
    records = read_webdataset(f"{s3}/set", None, WebDatasetSettings())
    assert labels_of(records, "val") == {"v/0000": {"cat": P}, "v/0001": {"dog": P}}
    assert [key for key, _ in read_parts(records.parts or ())] == list(records.images)
