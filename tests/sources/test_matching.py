"""Images that labels name, matched to files: by path, then by key; nothing is guessed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paml.errors import DataError
from paml.sources.matching import check_distinct, explain_missing, label_key, match_files, normalize_name

NAMES = st.text("ab1é.", min_size=1, max_size=5).filter(lambda text: not text.startswith("."))


def keys_of(names: list[str], rule: str = "name") -> list[str]:
    return [label_key(name, rule) for name in names]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("written", "key", "path_key"),
    [
        ("a.jpg", "a", "a"),
        ("x/a.jpg", "a", "x/a"),
        ("./x/a.JPG", "a", "x/a"),
        ("images\\x\\a.jpg", "a", "images/x/a"),
        ("/x/a", "a", "x/a"),
        ("v1.2", "v1.2", "v1.2"),
        ("e\u0301.png", "\u00e9", "\u00e9"),
    ],
)
def test_keys(written: str, key: str, path_key: str) -> None:
    assert (label_key(written, "name"), label_key(written, "path")) == (key, path_key)


@given(st.text(max_size=12))
def test_normal_names_stay(name: str) -> None:
    assert normalize_name(normalize_name(name)) == normalize_name(name)


@given(st.lists(NAMES, unique_by=lambda name: normalize_name(name), max_size=6), st.sampled_from(["name", "path"]))
def test_every_file_is_found_by_its_path(stems: list[str], rule: str) -> None:
    """In its folder or from further above, whatever other folders have."""
    files = [f"{number}/{stem}.jpg" for number, stem in enumerate(stems)]
    for prefix in ("", "./", "data/images/"):
        names = [prefix + file for file in files]
        paths = [str(number) for number in range(len(files))]
        matching = match_files(names, paths, files, rule)  # pyright: ignore[reportArgumentType]
        assert matching.files == dict(zip(paths, files, strict=True))
        assert matching.missing == []


def test_the_named_file_is_used_and_the_other_one_reported() -> None:
    files = ["JPEGImages/1.jpg", "SegmentationClass/1.png"]
    matching = match_files(["JPEGImages/1.jpg"], ["1"], files, "name")
    assert matching.files == {"1": "JPEGImages/1.jpg"}
    assert matching.shadowed == [("SegmentationClass/1.png", "JPEGImages/1.jpg")]
    with pytest.raises(DataError, match=r"2 files have the key '1'.*JPEGImages/1.jpg, SegmentationClass/1.png"):
        match_files(["1"], ["1"], files, "name")


def test_the_longer_path_decides() -> None:
    matching = match_files(["b/1.jpg"], ["1"], ["1.jpg", "set2/b/1.jpg"], "name")
    assert matching.files == {"1": "set2/b/1.jpg"}
    with pytest.raises(DataError, match="2 files have the key '1'"):
        match_files(["c/1.jpg"], ["1"], ["1.jpg", "set2/b/1.jpg"], "name")


def test_two_images_with_one_file_are_refused() -> None:
    names = ["cats/1.jpg", "dogs/1.jpg"]
    with pytest.raises(DataError, match=r"'cats/1.jpg' and 'dogs/1.jpg' both match the file '1.jpg'"):
        match_files(names, keys_of(names, "path"), ["1.jpg"], "path")


def test_names_with_one_key() -> None:
    check_distinct(["a.jpg", "x/b.png"], ["a", "b"], "own.csv", "name")
    with pytest.raises(DataError, match=r"'a.jpg' and 'a'.*in one way"):  # one image, whose labels would be apart
        check_distinct(["a.jpg", "a"], ["a", "a"], "own.csv", "name")
    with pytest.raises(DataError, match=r"'x/a.jpg' and 'y/a.jpg'.*set keys to 'path'"):
        check_distinct(["x/a.jpg", "y/a.jpg"], ["a", "a"], "own.csv", "name")
    for rule in ("name", "path"):  # the path would not help
        with pytest.raises(DataError, match=r"'a.jpg' and 'a.png'.*key 'a': rename one"):
            check_distinct(["a.jpg", "a.png"], ["a", "a"], "own.csv", rule)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("names", "files", "cause"),
    [
        (["1.0", "2.0"], ["1", "2"], "'.0'"),
        (["1", "2"], ["0001", "0002"], "zeros"),
        (["AB", "CD"], ["ab", "cd"], "lower case"),
        (["a ", "b"], ["a", " b"], "blanks"),
        (["x/a", "x/b"], ["a", "b"], "folders"),
    ],
)
def test_the_likely_cause_is_named(names: list[str], files: list[str], cause: str) -> None:
    text = explain_missing(names, names, files)
    assert cause in text
    assert repr(names[0]) in text
    assert any(repr(file) in text for file in files)
    assert cause not in explain_missing(names, names, ["zz"])
    assert explain_missing(names, names, names) == ""
