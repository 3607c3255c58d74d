"""Storage over an S3 server whose requests fail: same results, bounded waits, and the bad object named."""

import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paml import storage
from paml.storage import StorageError, s3, s3_requests
from tests.helpers.fault_proxy import KINDS, FaultyS3

DATA = random.Random(1).randbytes(300_000)

Operation = Callable[[str, Path], object]


def read_whole(path: str, _: Path) -> object:
    return hashlib.sha256(storage.read_bytes(path)).hexdigest()


def read_part(path: str, _: Path) -> object:
    return hashlib.sha256(storage.read_range(path, 1234, 150_000)).hexdigest()


def copy(path: str, folder: Path) -> object:
    storage.copy(path, str(folder / "copy"))
    return hashlib.sha256((folder / "copy").read_bytes()).hexdigest()


def stream(path: str, _: Path) -> object:
    return storage.sha256_of(path)


def write(path: str, _: Path) -> object:
    storage.write_bytes(path + ".new", DATA[:1000])
    return storage.read_bytes(path + ".new")


def write_if_absent(path: str, _: Path) -> object:
    storage.write_bytes(path + ".once", DATA[:1000], if_absent=True)
    return storage.read_bytes(path + ".once")


def upload(path: str, folder: Path) -> object:
    (folder / "large").write_bytes(DATA * 40)
    storage.copy(str(folder / "large"), path + ".large")
    return storage.sha256_of(path + ".large")


def listing(path: str, _: Path) -> object:
    return storage.list_files(os.path.dirname(path))


def delete(path: str, _: Path) -> object:
    storage.delete(path)
    return storage.exists(path)


def delete_folder(path: str, _: Path) -> object:
    storage.delete_folder(os.path.dirname(path))
    return storage.list_files(os.path.dirname(path))


OPERATIONS: dict[Operation, str] = {
    read_whole: "GET",
    read_part: "GET",
    copy: "GET",
    stream: "GET",
    write: "PUT",
    write_if_absent: "PUT",
    upload: "PUT",
    listing: "GET",
    delete: "DELETE",
    delete_folder: "POST",
}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_each_operation_survives_each_kind_of_fault(
    operation: Operation, faulty: FaultyS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    monkeypatch.setenv("PAML_S3_READ_SECONDS", "0.3")
    storage.write_bytes(f"{bucket}/intact/file", DATA)
    expected = operation(f"{bucket}/intact/file", tmp_path)
    for kind in KINDS:
        path = f"{bucket}/{kind}/file"
        storage.write_bytes(path, DATA)
        faulty.proxy.script(OPERATIONS[operation], kind)
        assert operation(path, tmp_path) == expected, kind
    assert faulty.proxy.counts == dict.fromkeys(KINDS, 1)


def test_results_are_right_while_a_fifth_of_all_requests_fail(
    faulty: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAML_S3_READ_SECONDS", "3")  # 16 threads on a busy machine
    faulty.proxy.plan.fraction = 0.2
    faulty.proxy.plan.max_in_a_row = None

    def use(number: int) -> None:
        data, path = DATA[number : number + 20_000 + number], f"{bucket}/many/{number:03d}"
        storage.write_bytes(path, data)
        assert storage.read_bytes(path) == data
        assert storage.read_range(path, number, 10_000) == data[number : number + 10_000]
        assert storage.size_of(path) == len(data)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(use, range(60)))
    assert storage.list_files(f"{bucket}/many") == [f"{number:03d}" for number in range(60)]
    assert faulty.proxy.requests > 300
    assert 0.15 * faulty.proxy.requests < faulty.proxy.broken < 0.25 * faulty.proxy.requests
    assert set(faulty.proxy.counts) == set(KINDS)


def test_read_continues_after_a_broken_body(faulty: FaultyS3, bucket: str) -> None:
    storage.write_bytes(f"{bucket}/file", DATA)
    faulty.proxy.seen.clear()
    faulty.proxy.script("GET", "cut_body", "reset_body", "stalled_body", None)
    assert storage.read_range(f"{bucket}/file", 100, 200_000) == DATA[100:200_100]
    starts = [int(str(seen.range).removeprefix("bytes=").split("-")[0]) for seen in faulty.proxy.seen]
    assert starts[:2] == [100, 100_100]
    assert starts == sorted(starts)
    faulty.proxy.script("GET", "cut_body", None)
    assert storage.read_bytes(f"{bucket}/file") == DATA
    assert faulty.proxy.seen[-1].range == "bytes=150000-"


def test_object_replaced_between_two_attempts_is_not_mixed(
    faulty: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = f"{bucket}/file", bytes(reversed(DATA))
    storage.write_bytes(path, DATA)
    waits: list[int] = []

    def replace(limits: s3_requests.S3Limits, number: int) -> float:
        if not waits:
            waits.append(number)
            storage.write_bytes(path, other)
        return 0.0

    monkeypatch.setattr(s3_requests, "_wait", replace)
    monkeypatch.setattr(s3, "_FIRST_BLOCK", 100_000)
    faulty.proxy.script("GET", "cut_body")
    assert storage.read_bytes(path) == other
    with storage.open_input(path) as file:
        assert file.read(10) == other[:10]
        storage.write_bytes(path, DATA)
        file.seek(250_000)
        with pytest.raises(StorageError, match="was replaced"):
            file.read(10)


@pytest.mark.parametrize("kind", ["lost_answer", "reset_headers"])
def test_writer_whose_response_was_lost_knows_that_it_won(faulty: FaultyS3, bucket: str, kind: str) -> None:
    faulty.proxy.script("PUT", kind)
    storage.write_bytes(f"{bucket}/COMMIT", b"mine", if_absent=True)
    with pytest.raises(FileExistsError):
        storage.write_bytes(f"{bucket}/COMMIT", b"mine", if_absent=True)
    # the same bytes from another writer do not count
    faulty.proxy.script("PUT", "reset", None)
    with pytest.raises(FileExistsError):
        storage.write_bytes(f"{bucket}/COMMIT", b"mine", if_absent=True)
    assert storage.read_bytes(f"{bucket}/COMMIT") == b"mine"


def test_one_of_many_writers_wins_despite_lost_responses(
    faulty: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.proxy.plan.fraction, faulty.proxy.plan.methods = 0.6, ("PUT", "HEAD")
    monkeypatch.setenv("PAML_S3_ATTEMPTS", "30")
    faulty.proxy.plan.kinds = ("lost_answer", "reset", "reset_headers", "slow_down")
    winners: list[list[int]] = [[] for _ in range(6)]

    def write_all(writer: int) -> None:
        for number, won in enumerate(winners):
            try:
                storage.write_bytes(f"{bucket}/{number}", b"%d" % writer, if_absent=True)
            except FileExistsError:
                continue
            won.append(writer)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write_all, range(6)))
    assert [len(won) for won in winners] == [1] * len(winners)
    assert [storage.read_bytes(f"{bucket}/{number}") for number in range(6)] == [b"%d" % won[0] for won in winners]
    assert faulty.proxy.counts["lost_answer"] > 5


def test_large_upload_whose_last_response_was_lost_is_complete(
    faulty: FaultyS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    (tmp_path / "large").write_bytes(DATA * 40)
    for if_absent in (False, True):
        path = f"{bucket}/large-{if_absent}"
        faulty.proxy.script("POST", None, "lost_answer")
        storage.copy(str(tmp_path / "large"), path, if_absent=if_absent)
        assert storage.read_bytes(path) == DATA * 40
    with pytest.raises(FileExistsError):
        storage.copy(str(tmp_path / "large"), f"{bucket}/large-True", if_absent=True)
    storage.copy(f"{bucket}/large-True", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == DATA * 40


def test_object_that_keeps_failing_is_named_with_attempts_and_reason(
    faulty: FaultyS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{bucket}/good", DATA)
    storage.write_bytes(f"{bucket}/bad", DATA)
    faulty.proxy.plan.fraction, faulty.proxy.plan.match, faulty.proxy.plan.max_in_a_row = 1.0, "/bad", None
    monkeypatch.setenv("PAML_S3_ATTEMPTS", "3")
    reasons = {
        "slow_down": "SlowDown",
        "cut_body": r"the body ended after [\d,]+ of [\d,]+ bytes",
        "reset": "Connection",
    }
    for kind, reason in reasons.items():
        faulty.proxy.plan.kinds = (kind,)
        start = faulty.proxy.requests
        with pytest.raises(
            StorageError,
            match=rf"'{bucket}/bad': 3 attempts failed in \d\.\d s, .*{reason}.*AWS_ENDPOINT_URL.*PAML_S3_ATTEMPTS",
        ):
            storage.read_bytes(f"{bucket}/bad")
        assert faulty.proxy.requests - start == 3
    with pytest.raises(StorageError, match="cannot read"):
        storage.copy(f"{bucket}/bad", str(tmp_path / "copy"))
    assert os.listdir(tmp_path) == []
    assert storage.read_bytes(f"{bucket}/good") == DATA


@pytest.mark.parametrize("kind", ["silence", "stalled_body", pytest.param("slow_body", marks=pytest.mark.slow)])
def test_no_request_waits_long_after_its_deadline(
    faulty: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    storage.write_bytes(f"{bucket}/file", DATA)
    plan = faulty.proxy.plan
    plan.fraction, plan.kinds, plan.max_in_a_row, plan.slow_seconds, plan.silence_seconds = 1.0, (kind,), None, 60, 60
    monkeypatch.setenv("PAML_S3_ATTEMPTS", "1000")
    monkeypatch.setenv("PAML_S3_READ_SECONDS", "0.4" if kind != "slow_body" else "5")
    monkeypatch.setenv("PAML_S3_DEADLINE_SECONDS", "1")
    start = time.monotonic()
    with pytest.raises(StorageError, match="failed in"):
        storage.read_bytes(f"{bucket}/file")
    # far below the 60 s that the server waits, and not a tight bound, so that a loaded machine passes
    assert time.monotonic() - start < 30


def test_slow_and_unreliable_objects_are_logged_once(
    faulty: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("slow", "flaky", "good"):
        storage.write_bytes(f"{bucket}/{name}", DATA)
    monkeypatch.setenv("PAML_S3_SLOW_SECONDS", "1.5")
    faulty.proxy.plan.slow_seconds = 1.7
    with caplog.at_level(logging.WARNING, "paml.storage.s3_requests"):
        for slow in ("slow_body", None, None):
            faulty.proxy.script("GET", slow, None, "slow_down", "reset", "cut_body")
            for name in ("slow", "good", "flaky"):
                assert storage.read_bytes(f"{bucket}/{name}") == DATA
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 2
    assert logged[0].startswith(f"{bucket}/slow is slow")
    assert f"{bucket}/flaky" in logged[1]
    assert "4 attempts" in logged[1]
    assert "150,000 of 300,000 bytes" in logged[1]


def test_permanent_errors_are_not_retried(faulty: FaultyS3, bucket: str) -> None:
    start = faulty.proxy.requests
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{bucket}/missing")
    with pytest.raises(StorageError, match="no such bucket"):
        storage.read_bytes("s3://no-such-bucket-anywhere/key")
    assert faulty.proxy.requests - start == 2


def test_waits_are_random_and_bounded_and_do_not_use_the_seeded_generator() -> None:
    limits = s3_requests.S3Limits(wait_seconds=0.5, max_wait_seconds=3.0)
    random.seed(7)
    state = random.getstate()
    for number, longest in ((1, 0.5), (2, 1.0), (3, 2.0), (4, 3.0), (60, 3.0)):
        waits = [s3_requests._wait(limits, number) for _ in range(400)]
        assert 0 <= min(waits) < 0.1 * longest
        assert 0.9 * longest < max(waits) <= longest
    assert random.getstate() == state


def test_limits_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAML_S3_ATTEMPTS", "4")
    monkeypatch.setenv("PAML_S3_READ_SECONDS", "2.5")
    assert (s3_requests.S3Limits.from_environment().attempts, s3_requests.S3Limits.from_environment().read_seconds) == (
        4,
        2.5,
    )
    monkeypatch.setenv("PAML_S3_ATTEMPTS", "many")
    with pytest.raises(StorageError, match="PAML_S3_ATTEMPTS is 'many'"):
        s3_requests.S3Limits.from_environment()
    monkeypatch.setenv("PAML_S3_ATTEMPTS", "0")
    with pytest.raises(StorageError, match="PAML_S3_ATTEMPTS is 0"):
        s3_requests.S3Limits.from_environment()


def test_stream_reads_growing_blocks_and_seeks(faulty: FaultyS3, bucket: str) -> None:
    data = DATA * 20
    storage.write_bytes(f"{bucket}/stream", data)
    faulty.proxy.seen.clear()
    with storage.open_input(f"{bucket}/stream") as file:
        read = b""
        while block := file.read(10_000):
            read += block
        assert read == data
        assert len(faulty.proxy.seen) < 8
        file.seek(-5, os.SEEK_END)
        assert file.read() == data[-5:]
        file.seek(12)
        assert file.read(4) == data[12:16]
        assert file.read(4) == data[16:20]
        assert file.size() == len(data)
    storage.write_bytes(f"{bucket}/empty", b"")
    with storage.open_input(f"{bucket}/empty") as file:
        assert file.read() == b""


def test_threads_and_a_forked_process_read(faulty: FaultyS3, bucket: str) -> None:
    storage.write_bytes(f"{bucket}/file", DATA)
    outcomes: list[bool] = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(storage.read_bytes(f"{bucket}/file") == DATA)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 8
    if (child := os.fork()) == 0:
        os._exit(0 if storage.read_bytes(f"{bucket}/file") == DATA else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
