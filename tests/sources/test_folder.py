from pathlib import Path

import pytest

from paml.errors import DataError
from paml.sources.folder import folder_parts, key_of
from paml.sources.parts import read_parts


def test_images_of_a_folder_in_a_fixed_order(tmp_path: Path) -> None:
    names = ["b.jpg", "a.JPEG", "sub/deep/c.png", "sub/d.e.webp", ".hidden.jpg", ".partial/f.jpg", "notes.txt", "noend"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    found = list(read_parts(folder_parts(tmp_path)))
    assert [key for key, _ in found] == ["a", "b", "d.e", "c"]
    assert [Path(str(path)).relative_to(tmp_path).as_posix() for _, path in found] == [
        "a.JPEG",
        "b.jpg",
        "sub/d.e.webp",
        "sub/deep/c.png",
    ]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        list(read_parts(folder_parts(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("name", "key"), [("train_0/000002b66c9c498e.jpg", "000002b66c9c498e"), ("a.b.jpg", "a.b"), ("x", "x")]
)
def test_key_of(name: str, key: str) -> None:
    assert key_of(name) == key
