"""Storage: same guarantees on a local disk and in S3 (moto's server), and clear errors."""

import contextlib
import errno
import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from paml import storage
from paml.storage import StorageError
from paml.storage import s3 as s3_module

NOBODY = 65534


@pytest.fixture
def s3(s3: str) -> str:
    """A folder in a bucket."""
    return f"{s3}/runs"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path) -> str:
    return str(tmp_path / "runs") if request.param == "local" else request.getfixturevalue("s3")


def test_write_read_list_delete(root: str) -> None:
    assert storage.list_files(root) == []
    path = storage.join(root, "a", "b.bin")
    assert not storage.exists(path)
    storage.write_bytes(path, b"0123456789")
    storage.write_bytes(storage.join(root, "z"), b"")
    assert storage.exists(path)
    assert not storage.exists(storage.join(root, "a"))
    assert storage.read_bytes(path) == b"0123456789"
    assert storage.read_range(path, 3, 4) == b"3456"
    assert storage.size_of(path) == 10
    assert storage.list_files(root) == ["a/b.bin", "z"]
    storage.write_bytes(path, b"new")
    assert storage.read_bytes(path) == b"new"
    storage.delete(path)
    storage.delete(path)
    assert storage.list_files(root) == ["z"]
    storage.delete_folder(root)
    storage.delete_folder(root)
    assert storage.list_files(root) == []


def test_missing_file_raises_file_not_found(root: str) -> None:
    missing = storage.join(root, "missing")
    for read in (storage.read_bytes, storage.size_of, storage.open_input, storage.sha256_of):
        with pytest.raises(FileNotFoundError):
            read(missing)
    with pytest.raises(FileNotFoundError):
        storage.copy(missing, missing + ".copy")


def test_range_beyond_the_end_is_an_error(root: str) -> None:
    path = storage.join(root, "short")
    storage.write_bytes(path, b"0123")
    with pytest.raises(StorageError, match="requested 10 bytes at 2, got 2"):
        storage.read_range(path, 2, 10)
    with pytest.raises(StorageError, match="10 bytes at -1"):
        storage.read_range(path, -1, 10)
    assert storage.read_range(path, 4, 0) == b""


def test_if_absent_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: str) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = str(tmp_path / "plan.json")
    storage.write_bytes(path, b"first", if_absent=True)
    with pytest.raises(FileExistsError):
        storage.write_bytes(path, b"second", if_absent=True)
    assert storage.read_bytes(path) == b"first"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_if_absent_lets_exactly_one_of_many_writers_succeed(root: str) -> None:
    path = storage.join(root, "COMMIT")
    outcomes: list[int | None] = []

    def write(writer: int) -> None:
        try:
            storage.write_bytes(path, b"%d" % writer, if_absent=True)
            outcomes.append(writer)
        except FileExistsError:
            outcomes.append(None)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [writer for writer in outcomes if writer is not None]
    assert len(outcomes) == 8
    assert len(winners) == 1
    assert storage.read_bytes(path) == b"%d" % winners[0]
    assert storage.list_files(root) == ["COMMIT"]


def test_replacing_keeps_the_old_file_if_the_block_fails(root: str) -> None:
    path = storage.join(root, "table")
    storage.write_bytes(path, b"old")

    def write_half() -> None:
        with storage.replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert storage.read_bytes(path) == b"old"
    assert storage.list_files(root) == ["table"]
    with storage.replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(b"whole")
    assert storage.read_bytes(path) == b"whole"


def test_upload_and_copies(root: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAML_CACHE", str(tmp_path / "cache"))
    data = os.urandom(300_000)
    (tmp_path / "in").write_bytes(data)
    path = storage.join(root, "up", "file")
    storage.copy(str(tmp_path / "in"), path)
    with pytest.raises(FileExistsError):
        storage.copy(str(tmp_path / "in"), path, if_absent=True)
    storage.copy(path, str(tmp_path / "out" / "file"))
    assert (tmp_path / "out" / "file").read_bytes() == data
    with storage.open_input(path) as file:
        file.seek(100_000)
        assert file.read(5) == data[100_000:100_005]
    first = storage.local_copy(path)
    with open(first, "rb") as file:
        assert file.read() == data
    storage.write_bytes(path, b"changed")
    with open(storage.local_copy(path), "rb") as file:
        assert file.read() == b"changed"


def test_multipart_upload_is_complete(s3: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "PART_BYTES", 5 << 20)
    data = os.urandom((11 << 20) + 17)
    (tmp_path / "large").write_bytes(data)
    storage.copy(str(tmp_path / "large"), s3 + "/large")
    assert storage.read_bytes(s3 + "/large") == data


def test_listing_and_deleting_more_than_a_page(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "PAGE_KEYS", 10)
    for number in range(35):
        storage.write_bytes(f"{s3}/many/{number:04d}", b"")
    storage.write_bytes(f"{s3}/many-more/kept", b"")
    assert storage.list_files(f"{s3}/many") == [f"{number:04d}" for number in range(35)]
    storage.delete_folder(f"{s3}/many")
    assert storage.list_files(s3) == ["many-more/kept"]


def test_missing_bucket_is_named(s3: str) -> None:
    with pytest.raises(StorageError, match=r"absent-bucket.*no such bucket"):
        storage.write_bytes("s3://absent-bucket/key", b"x")
    with pytest.raises(StorageError, match=r"'s3://absent-bucket/run' is not writable"):
        storage.ensure_writable("s3://absent-bucket/run")
    with pytest.raises(StorageError, match="s3://bucket/key"):
        storage.exists("s3://")
    with pytest.raises(StorageError, match="whole bucket"):
        storage.delete_folder(s3.rsplit("/", 1)[0])


def test_public_bucket_is_read_without_keys(s3: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    bucket, _, key = s3.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])
    client.put_object(Bucket=bucket, Key=key + "/public", Body=b"open", ACL="public-read")
    storage.write_bytes(s3 + "/private", b"closed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert storage.read_bytes(s3 + "/public") == b"open"
    with storage.open_input(s3 + "/public") as file:
        assert file.read() == b"open"
    with pytest.raises(StorageError, match="permission denied"):
        storage.read_bytes(s3 + "/private")


def test_unreachable_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("PAML_S3_ATTEMPTS", "1")
    with pytest.raises(
        StorageError,
        match=r"'s3://bucket/key': 1 attempt failed .*AWS_ENDPOINT_URL",
    ):
        storage.read_bytes("s3://bucket/key")


def test_join() -> None:
    assert storage.join("s3://b/run/", "x", "y/z") == "s3://b/run/x/y/z"
    assert storage.join("/data", "x") == "/data/x"
    assert storage.join("s3://b", "") == "s3://b"
    with pytest.raises(StorageError, match="/etc/passwd"):
        storage.join("/data", "/etc/passwd")


@contextlib.contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Run as an ordinary user: root ignores permissions."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_permission_denied(tmp_path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "file").write_bytes(b"x")
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() == folder.owner() and str(parent).startswith(str(tmp_path.parents[2])):
            parent.chmod(0o755)
    folder.chmod(0o500)
    try:
        with as_ordinary_user():
            with pytest.raises(StorageError, match=r"closed.* is not writable: permission denied") as e:
                storage.ensure_writable(str(folder))
            assert e.value.errno == errno.EACCES
            with pytest.raises(StorageError, match="permission denied"):
                storage.write_bytes(str(folder / "new"), b"x")
    finally:
        folder.chmod(0o700)
    assert storage.list_files(str(folder)) == ["file"]


def test_invalid_names(tmp_path) -> None:
    with pytest.raises(StorageError, match="too long"):
        storage.write_bytes(str(tmp_path / ("n" * 300)), b"x")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match="is a file"):
        storage.ensure_writable(str(tmp_path / "file" / "sub"))
    with pytest.raises(StorageError, match="is a folder"):
        storage.write_bytes(str(tmp_path), b"x")
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[str]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0777", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield str(folder)
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_reported_and_leaves_no_partial_file(small_disk: str) -> None:
    storage.ensure_writable(small_disk)
    with pytest.raises(StorageError, match=r"the disk is full") as error:
        storage.write_bytes(small_disk + "/large", bytes(200_000))
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(small_disk) == []
    storage.write_bytes(small_disk + "/fill", bytes(64 << 10))
    with pytest.raises(StorageError, match=r"is not writable: the disk is full"):
        storage.ensure_writable(small_disk)


def test_read_only_disk_is_reported(small_disk: str) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match="read-only") as error:
        storage.ensure_writable(small_disk)
    assert error.value.errno == errno.EROFS


def test_file_size_limit_is_reported(tmp_path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match="larger than"):
            storage.write_bytes(str(tmp_path / "large"), bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_sha256_of(tmp_path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    digest, size = storage.sha256_of(str(tmp_path / "f"))
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert size == 3


def test_label_table_in_s3(s3: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paml.labels import build_label_table

    monkeypatch.setenv("PAML_CACHE", str(tmp_path / "cache"))
    rows = b"ImageID,Source,LabelName,Confidence\n00000000000000aa,v,/m/a,1\n00000000000000ab,v,/m/b,0\n"
    storage.write_bytes(s3 + "/in/annotations-human.csv", rows)
    storage.write_bytes(s3 + "/in/classes-trainable.txt", b"/m/a\n/m/b\n")
    report = build_label_table(s3 + "/in/annotations-human.csv", s3 + "/in/classes-trainable.txt", s3 + "/out/t.arrow")
    assert storage.list_files(s3 + "/out") == ["t.arrow", "t.rejects.parquet"]
    table = report.table
    assert table.keys() == ["00000000000000aa", "00000000000000ab"]
    assert table.lookup([1]).cls.tolist() == [1]
    assert table.metadata["sources"][0]["bytes"] == len(rows)
