"""Properties of the parts of every source: picklable, repeatable, and missing images are reported."""

import io
import itertools
import json
import os
import pickle
import threading
import time
from pathlib import Path

import pytest

from paml import storage
from paml.errors import DataError, SettingsError
from paml.sources import fetch
from paml.sources.fetch import read_concurrently
from paml.sources.folder import bucket_parts, folder_parts
from paml.sources.parts import Part, read_parts
from paml.sources.tars import TarDamage, tar_parts
from paml.storage import StorageError
from tests.helpers.fault_proxy import faulty_s3
from tests.sources.server import Server
from tests.sources.test_tars import make_tar


def key(number: int) -> str:
    return f"{number:016x}"


def body(number: int) -> bytes:
    return f"image {number} ".encode() * (number % 7 + 1)


def contents(parts: list[Part]) -> list[tuple[str, bytes]]:
    """The images of all parts; paths are read."""
    found = []
    for name, payload in read_parts(parts):
        assert not isinstance(payload, Exception)
        found.append((name, payload if isinstance(payload, bytes) else storage.read_bytes(os.fspath(payload))))
    return found


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "images") if request.param == "local" else request.getfixturevalue("s3") + "/images"


def fill(root: str, count: int, split: str = "train") -> None:
    for number in range(count):
        storage.write_bytes(storage.join(root, split, f"{key(number)}.jpg"), body(number))


def check_parts(parts: list[Part], again: list[Part], count: int) -> None:
    """Check what holds for all parts of readable images."""
    expected = [(key(number), body(number)) for number in range(count)]
    assert contents(parts) == expected
    assert contents(parts) == expected
    assert contents(pickle.loads(pickle.dumps(again))) == expected
    assert [part.name for part in parts] == [part.name for part in again]
    assert len({part.name for part in parts}) == len(parts)
    assert sum(len(pickle.dumps(part)) for part in parts) < 1000 * len(parts) + 100 * count


def test_parts_of_a_folder(root: str) -> None:
    fill(root, 25)
    storage.write_bytes(storage.join(root, "notes.txt"), b"words")
    parts = folder_parts(root, per_part=10)
    assert [part.images for part in parts] == [10, 10, 5]
    assert sum(part.bytes or 0 for part in parts) == sum(len(body(number)) for number in range(25))
    check_parts(parts, folder_parts(root, per_part=10), 25)
    assert [key for key, _ in read_parts(folder_parts(root))] == [key for key, _ in contents(parts)]
    storage.write_bytes(storage.join(root, "train", f"{key(24)}.jpg"), b"another size")
    changed = [part.name for part in folder_parts(root, per_part=10)]
    assert [name in {part.name for part in parts} for name in changed] == [True, True, False]


@pytest.mark.parametrize("per_part", [0, -3])
def test_size_of_a_part_is_positive(tmp_path: Path, per_part: int) -> None:
    fill(str(tmp_path), 1)
    with pytest.raises(SettingsError, match=f"per_part is {per_part}"):
        folder_parts(tmp_path, per_part)
    with pytest.raises(SettingsError, match=f"per_part is {per_part}"):
        bucket_parts(str(tmp_path), [key(0)], "train", per_part)


def test_path_keys_distinguish_equal_names(root: str) -> None:
    for name in ("a/1.jpg", "b/1.jpg"):
        storage.write_bytes(storage.join(root, name), b"x")
    assert [key for key, _ in read_parts(folder_parts(root))] == ["1", "1"]
    assert [key for key, _ in read_parts(folder_parts(root, keys="path"))] == ["a/1", "b/1"]


def test_file_deleted_after_listing(s3: str, tmp_path: Path) -> None:
    fill(s3 + "/images", 3)
    parts = folder_parts(s3 + "/images")
    storage.delete(f"{s3}/images/train/{key(1)}.jpg")
    found = dict(read_parts(parts))
    assert isinstance(found[key(1)], FileNotFoundError)
    assert found[key(2)] == body(2)


@pytest.mark.parametrize("kind", ["empty", "absent"])
def test_folder_without_images(kind: str, tmp_path: Path, s3: str) -> None:
    if kind == "empty":
        (tmp_path / kind).mkdir()
    with pytest.raises(DataError, match=f"{kind} (has no image|is not a folder)"):
        folder_parts(tmp_path / kind)
    with pytest.raises(DataError, match=f"{s3}/{kind} has no image"):
        folder_parts(f"{s3}/{kind}")
    with pytest.raises(StorageError, match="no such bucket"):
        folder_parts("s3://nowhere/images")


def test_parts_of_wanted_keys(root: str) -> None:
    fill(root, 25)
    wanted = [key(number) for number in reversed(range(25))]
    parts = bucket_parts(root, [*wanted, key(3)], "train", per_part=10)
    assert [part.images for part in parts] == [10, 10, 5]
    check_parts(parts, bucket_parts(root, iter(wanted), "train", per_part=10), 25)
    other = bucket_parts(root, wanted, "test", per_part=10)
    assert not {part.name for part in parts} & {part.name for part in other}


def test_missing_keys_are_yielded_with_the_reason(root: str) -> None:
    fill(root, 5)
    storage.write_bytes(storage.join(root, "train", "other.png"), b"png")
    found = dict(read_parts(bucket_parts(root, [key(number) for number in range(8)], "train")))
    assert list(found) == [key(number) for number in range(8)]
    for number in range(8):
        payload = found[key(number)]
        if number < 5:
            assert payload == body(number)
        else:
            assert isinstance(payload, FileNotFoundError)
            assert f"{root}/train/{key(number)}.jpg" in str(payload)


def test_missing_bucket_is_an_error_not_a_missing_image(s3: str) -> None:
    (part,) = bucket_parts("s3://nowhere/images", [key(1)], "train")
    with pytest.raises(StorageError, match="no such bucket"):
        list(part)


@pytest.mark.parametrize("access", ["anonymous", "signed", "role"])
def test_bucket_credentials(access: str, web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are signed with the credentials of the environment or the machine's role, if there are any."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", web.url)
    if access == "signed":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-mine")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    if access == "role":
        keys = {
            "AccessKeyId": "key-of-role",
            "SecretAccessKey": "s",
            "Token": "t",
            "Expiration": "2100-01-01T00:00:00Z",
        }
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", web.put("/role", json.dumps(keys).encode()))
    web.put(f"/open-images/train/{key(1)}.jpg", body(1))
    assert list(read_parts(bucket_parts("s3://open-images", [key(1)], "train"))) == [(key(1), body(1))]
    headers = web.seen[-1][2]
    assert web.seen[-1][1].startswith("/open-images/train/")
    if access == "anonymous":
        assert "Authorization" not in headers
    else:
        assert {"signed": "key-of-mine", "role": "key-of-role"}[access] in headers["Authorization"]
        assert ("X-Amz-Security-Token" in headers) == (access == "role")


def test_reading_from_a_server_that_often_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("internal_error", "slow_down", "reset", "reset_body", "lost_answer")
    with faulty_s3(fraction=0.0, seed=5, kinds=kinds, max_in_a_row=None) as faulty:
        for name, value in faulty.environment.items():
            monkeypatch.setenv(name, value)
        root = faulty.make_bucket("images")
        fill(root, 40)
        faulty.proxy.plan.fraction = 0.2
        found = dict(read_parts(bucket_parts(root, [key(number) for number in range(45)], "train")))
        assert faulty.proxy.broken > 5
    assert {name: payload for name, payload in found.items() if isinstance(payload, bytes)} == {
        key(number): body(number) for number in range(40)
    }
    assert sum(isinstance(payload, FileNotFoundError) for payload in found.values()) == 5


def test_unreadable_object_fails_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "wait_seconds", lambda *_: 0.0)
    (tmp_path / "train" / f"{key(1)}.jpg").mkdir(parents=True)
    (part,) = bucket_parts(str(tmp_path), [key(1)], "train")
    with pytest.raises(StorageError, match=rf"'.*{key(1)}.jpg'"):
        list(part)


def test_read_concurrently_order_and_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()
    running = most = started = 0

    def read(number: int) -> int:
        nonlocal running, most, started
        with lock:
            running, started = running + 1, started + 1
            most = max(most, running)
        time.sleep(0.002 * (number % 3))
        with lock:
            running -= 1
        return number * number

    results = read_concurrently(itertools.count(), read, threads=3)
    assert [next(results) for _ in range(20)] == [(number, number * number) for number in range(20)]
    time.sleep(0.05)
    assert most <= 3
    assert started <= 20 + 6
    results.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert list(read_concurrently([], read)) == []


def test_read_concurrently_raises_in_order() -> None:
    def read(number: int) -> int:
        if number == 2:
            raise StorageError(0, "no answer")
        return number

    results = read_concurrently(range(9), read, threads=4)
    assert [next(results), next(results)] == [(0, 0), (1, 1)]
    with pytest.raises(StorageError, match="no answer"):
        next(results)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_parts_of_tar_files(root: str, mode: str) -> None:
    suffix = ".tar.gz" if "gz" in mode else ".tar"
    for number in range(3):
        members = [(f"train_{number}/{key(i)}.jpg", body(i)) for i in range(5 * number, 5 * number + 5)]
        storage.write_bytes(storage.join(root, f"train_{number}{suffix}"), make_tar(members, mode))
    parts = tar_parts(root)
    assert [part.images for part in parts] == [None] * 3
    names = [storage.join(root, f"train_{number}{suffix}") for number in range(3)]
    assert [part.bytes for part in parts] == [storage.size_of(name) for name in names]
    check_parts(parts, tar_parts(names), 15)
    whole = storage.read_bytes(names[1])
    storage.write_bytes(names[1], whole[: len(whole) // 2])
    cut = tar_parts(names)
    assert [a.name == b.name for a, b in zip(parts, cut, strict=True)] == [True, False, True]
    *_, (path, damage) = cut[1]
    assert path == names[1]
    assert isinstance(damage, TarDamage)


@pytest.mark.parametrize("after", [0, 3])
def test_storage_error_within_a_tar_is_not_damage(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network error must not end up among the rejects as if the file were truncated."""
    members = [(f"{key(i)}.jpg", os.urandom(1 << 20)) for i in range(6)]
    (tmp_path / "a.tar.gz").write_bytes(make_tar(members, "w:gz"))
    (part,) = tar_parts(tmp_path)
    reads = 0

    class Breaking(io.FileIO):
        def readinto(self, buffer) -> int:
            nonlocal reads
            reads += 1
            if reads > after:
                raise OSError(5, "the connection broke")
            return super().readinto(buffer)

    monkeypatch.setattr("paml.sources.tars.open_tar", lambda path: io.BufferedReader(Breaking(path), 1 << 20))
    with pytest.raises(StorageError, match=r"a.tar.gz.*the connection broke"):
        list(part)
