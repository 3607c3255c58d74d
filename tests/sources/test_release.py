"""Archives of a release: downloaded over bad connections, verified, safely unpacked; and found by name."""

import hashlib
import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from paml import storage
from paml.errors import DataError
from paml.sources.release import (
    BASE,
    SPLITS,
    V3_ARCHIVES,
    Archive,
    fetch_release,
    find_release_files,
)
from paml.storage import StorageError
from tests.sources.server import Server

PATH = "/2017_11/classes_2017_11.tar.gz"


def tar_of(members: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for info in more:
            tar.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


FILES = {
    "2017_11/classes-trainable.txt": b"/m/a\n/m/b\n",
    "2017_11/class-descriptions.csv": np.random.default_rng(0).bytes(200_000),
}
BODY = tar_of({**FILES, "2017_11/README": b"more"})


def known(body: bytes = BODY, **changes: object) -> Archive:
    values = {"bytes": len(body), "md5": hashlib.md5(body).hexdigest(), "files": tuple(FILES), **changes}
    return Archive("classes_2017_11.tar.gz", **values)  # pyright: ignore[reportArgumentType]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def fetch(folder: Path, base: str, archive: Archive | None = None, **options: object) -> str:
    return fetch_release(folder, [archive or known()], base=base, **options)  # pyright: ignore


def test_published_sizes_and_checksums() -> None:
    sums = {name: (archive.name, archive.bytes, archive.md5) for name, archive in V3_ARCHIVES.items()}
    assert sums == {
        "images": ("images_2017_11.tar.gz", 1038133015, "d840296342470becab9db7228bda86cc"),
        "annotations_human": ("annotations_human_2017_11.tar.gz", 144102834, "cdcbb5e9aba900530c85cb370564f599"),
        "classes": ("classes_2017_11.tar.gz", 303055, "3937f6dddf777ca912c816d5f6ffe06f"),
    }


def test_archive_is_downloaded_and_unpacked_once(web: Server, tmp_path: Path) -> None:
    web.put(PATH, BODY)
    lines: list[str] = []
    assert fetch(tmp_path, web.url, log=lines.append) == str(tmp_path / "2017_11")
    assert contents(tmp_path) == FILES
    assert lines == [f"fetching classes_2017_11.tar.gz (0.2 MB) from {web.url}"]
    fetch(tmp_path, web.url)
    assert web.asked == {PATH: 1}
    (tmp_path / "2017_11/classes-trainable.txt").write_bytes(b"/m/a\n")
    fetch(tmp_path, web.url)
    assert contents(tmp_path) == FILES
    assert web.asked == {PATH: 2}


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_resumes(
    web: Server, tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paml.sources.release.wait_seconds", lambda *_: 0.0)
    web.put(PATH, BODY, ("cut", 70_000), 503, ("cut", 60_000), "reset", "ignore range", ranges=ranges)
    fetch(tmp_path, web.url)
    assert contents(tmp_path) == FILES
    asked = [headers.get("Range") for _, _, headers in web.seen]
    starts = [int(re.findall(r"\d+", span)[0]) if span else 0 for span in asked]
    assert starts[0] == 0
    assert starts[1] == starts[2] > 0
    assert starts[3] > starts[2] if ranges else starts[3] == 60_000


def test_next_call_resumes(web: Server, tmp_path: Path, monkeypatch) -> None:
    web.put(PATH, BODY, ("cut", 90_000), *["reset"] * 5)
    monkeypatch.setattr("paml.sources.release.wait_seconds", lambda *_: 0.0)
    with pytest.raises(StorageError, match=r"bytes were downloaded, 5 more tries"):
        fetch(tmp_path, web.url)
    part = tmp_path / "classes_2017_11.tar.gz.part"
    have = part.stat().st_size
    assert 0 < have <= 90_000
    fetch(tmp_path, web.url)
    assert web.seen[-1][2]["Range"] == f"bytes={have}-"
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize("kind", ["web", "folder", "bucket"])
@pytest.mark.parametrize("wrong", ["changed", "short", "long"])
def test_wrong_bytes_are_not_unpacked(kind: str, wrong: str, tmp_path: Path, request) -> None:
    body = {"changed": BODY[:-1] + bytes([BODY[-1] ^ 1]), "short": BODY[:-9], "long": BODY + b"x"}[wrong]
    base = str(tmp_path / "base")
    if kind == "web":
        server = request.getfixturevalue("web")
        server.put(PATH, body)
        base = server.url
    elif kind == "bucket":
        base = request.getfixturevalue("s3") + "/oi"
    if kind != "web":
        storage.write_bytes(f"{base}/classes_2017_11.tar.gz", body)
    expected = re.escape(f"expected {len(BODY):,} bytes with MD5 {hashlib.md5(BODY).hexdigest()}, got {len(body):,} ")
    with pytest.raises(DataError, match=f"is not classes_2017_11.tar.gz of the release: {expected}"):
        fetch(tmp_path / "out", base)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("below", ["", "2017_11/"])
def test_archives_in_a_folder_and_a_bucket(below: str, tmp_path: Path, s3: str) -> None:
    for number, base in enumerate([str(tmp_path / "base"), s3 + "/oi"]):
        storage.write_bytes(f"{base}/{below}classes_2017_11.tar.gz", BODY)
        out = tmp_path / f"out{number}"
        out.mkdir()
        (out / "classes_2017_11.tar.gz.part").write_bytes(BODY[:1000])
        fetch(out, base)
        assert contents(out) == FILES
    with pytest.raises(DataError, match=r"has neither 2017_11/classes_2017_11.tar.gz nor classes_2017_11.tar.gz"):
        fetch(tmp_path / "other", str(tmp_path / "nowhere"))


def test_existing_archive_is_used_if_it_is_complete(web: Server, tmp_path: Path) -> None:
    archive = tmp_path / "classes_2017_11.tar.gz"
    archive.write_bytes(BODY[:500])
    with pytest.raises(DataError, match=r"got 500 bytes with MD5 \w{32}"):
        fetch(tmp_path, web.url)
    archive.write_bytes(BODY)
    fetch(tmp_path, web.url)
    assert contents(tmp_path) == FILES
    assert not web.asked


def test_address_without_the_file(web: Server, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=rf"{web.url}{PATH} answered 404"):
        fetch(tmp_path, web.url)
    assert web.asked == {PATH: 1}


def test_only_expected_files_are_unpacked(tmp_path: Path) -> None:
    link = tarfile.TarInfo("2017_11/classes-trainable.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    evil = {"../evil.txt": b"x", "/abs.txt": b"x", "2017_11/../../up.txt": b"x", "./2017_11/more.txt": b"x"}
    members = {**evil, **{f"./{name}": data for name, data in FILES.items()}}
    body = tar_of(members, link)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "classes_2017_11.tar.gz").write_bytes(body)
    fetch(tmp_path / "out", str(tmp_path / "base"), known(body))
    assert contents(tmp_path / "out") == FILES
    assert not (tmp_path / "out/2017_11/classes-trainable.txt").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}

    body = tar_of({"2017_11/class-descriptions.csv": b"x"}, link)
    (tmp_path / "base" / "classes_2017_11.tar.gz").write_bytes(body)
    with pytest.raises(DataError, match=r"has no 2017_11/classes-trainable.txt"):
        fetch(tmp_path / "other", str(tmp_path / "base"), known(body))


def test_invalid_requests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="s3://bucket/out"):
        fetch_release("s3://bucket/out", [known()])


# Names of the label and class files on the download pages of the releases.
PUBLISHED = {
    ("v3", "train"): ("2017_11/train/annotations-human.csv", "2017_11/classes-trainable.txt"),
    ("v4", "validation"): (
        "2018_04/validation/validation-annotations-human-imagelabels.csv",
        "2018_04/classes-trainable.txt",
    ),
    ("v5", "test"): ("v5/test-annotations-human-imagelabels.csv", "v5/classes-trainable.txt"),
    ("v6", "train"): ("v6/oidv6-train-annotations-human-imagelabels.csv", "v6/oidv6-classes-trainable.txt"),
    ("v6", "test"): ("v5/test-annotations-human-imagelabels.csv", "v6/oidv6-classes-trainable.txt"),
    ("v7", "train"): ("v7/oidv7-train-annotations-human-imagelabels.csv", "v7/oidv7-classes-trainable.txt"),
    ("v7", "validation"): ("v7/oidv7-val-annotations-human-imagelabels.csv", "v7/oidv7-classes-trainable.txt"),
}


@pytest.mark.parametrize(("release", "files"), PUBLISHED.items())
@pytest.mark.parametrize("layout", ["server", "flat", "split"])
def test_files_with_their_published_names(release, files, layout: str, tmp_path: Path) -> None:
    version, split = release
    for path in files:
        target = tmp_path / path
        if layout == "flat" and version != "v3":
            target = tmp_path / target.name
        if layout == "split":
            target = tmp_path / (split if "annotations" in path else "") / target.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("")
    found = find_release_files(str(tmp_path), split)
    assert Path(found.classes) == target
    assert Path(found.annotations).name == Path(files[0]).name
    assert (found.descriptions, found.images) == (None, None)


def test_image_lists_and_descriptions(tmp_path: Path, s3: str) -> None:
    names = ["2017_11/class-descriptions.csv", "2017_11/classes-trainable.txt"]
    names += [f"2017_11/{split}/{name}.csv" for split in SPLITS for name in ("annotations-human", "images")]
    for name in names:
        storage.write_bytes(f"{s3}/{name}", b"x")
    for root in (s3, s3 + "/2017_11"):
        found = find_release_files(root, "validation")
        assert found.images == f"{s3}/2017_11/validation/images.csv"
        assert found.descriptions == f"{s3}/2017_11/class-descriptions.csv"


def test_missing_file_is_named_with_its_address(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no annotations of 'train': .* 2017_11/train/annot"):
        find_release_files(str(tmp_path), "train")
    (tmp_path / "oidv7-train-annotations-human-imagelabels.csv").write_text("")
    origin = f"{BASE}/v7/oidv7-classes-trainable.txt"
    with pytest.raises(DataError, match=f"no oidv7-classes-trainable.txt for 'train'.*download {origin}"):
        find_release_files(str(tmp_path), "train")
    (tmp_path / "oidv7-classes-trainable.txt").write_text("")
    with pytest.raises(DataError, match=f"no oidv7-val-ann.*download {BASE}/v7/oidv7-val-annotations-human-imagel"):
        find_release_files(str(tmp_path), "validation")
    (tmp_path / "v3" / "train").mkdir(parents=True)
    (tmp_path / "v3" / "train" / "annotations-human.csv").write_text("")
    with pytest.raises(DataError, match=f"download {BASE}/2017_11/classes_2017_11.tar.gz"):
        find_release_files(str(tmp_path / "v3"), "train")


def test_several_releases_in_one_folder(tmp_path: Path) -> None:
    for path in PUBLISHED["v4", "validation"] + PUBLISHED["v7", "validation"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    with pytest.raises(DataError, match=r"several releases \(v4, v7\) for 'validation'"):
        find_release_files(str(tmp_path), "validation")
    with pytest.raises(DataError, match="'val'"):
        find_release_files(str(tmp_path), "val")
