"""The shard cache: one download per node, its size limit, and failures of processes, disks and objects."""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from paml import storage
from paml.errors import SettingsError
from paml.shards import CorruptSampleError, Manifest, ShardReader, ShardSettings, write_shards
from paml.shards.cache import ShardCache
from paml.shards.reader import ShardPrefetcher
from tests.shards.images import flip_byte, source

ROOT = Path(__file__).resolve().parents[2]
COUNT, PER_SHARD = 60, 10


@pytest.fixture(scope="module")
def server() -> Iterator:
    pytest.importorskip("moto.server")
    from tests.helpers.fault_proxy import faulty_s3

    with faulty_s3(fraction=0.0) as s3:
        s3.make_bucket("images")
        yield s3


@pytest.fixture
def s3(server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PAML_CACHE", str(tmp_path / "manifests"))
    plan = server.proxy.plan
    before = dict(vars(plan))
    server.proxy.seen.clear()
    yield server
    vars(plan).update(before)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About six shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(source(COUNT), folder, ShardSettings(resize="original", samples_per_shard=PER_SHARD))
    return folder


@pytest.fixture
def remote(s3, written: Path, tmp_path: Path) -> Manifest:
    """The same shards in a bucket, separate for each test."""
    folder = f"s3://images/{tmp_path.name}"
    for file in written.iterdir():
        if file.suffix in (".tar", ".arrow"):
            storage.copy(str(file), f"{folder}/{file.name}")
    s3.proxy.seen.clear()
    return Manifest.open(folder)


@pytest.fixture
def images() -> dict[str, bytes]:
    return dict(source(COUNT))


def largest(manifest: Manifest) -> int:
    return max(shard.bytes for shard in manifest.shards)


def first_of(manifest: Manifest, shard: int) -> int:
    return manifest.rows_of_shard(shard).start


def gets(s3) -> Counter:
    """GET requests by shard."""
    return Counter(
        seen.path.split("?")[0].split("/")[-1] for seen in s3.proxy.seen if seen.method == "GET" and ".tar" in seen.path
    )


def reads_correctly(reader: ShardReader, images: dict[str, bytes], order: list[int]) -> bool:
    return all(reader.read(index) == images[reader.manifest.key(index)] for index in order)


READ_ALL = """
import dataclasses, hashlib, json, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from paml.shards import Manifest, ShardReader
from paml.shards.cache import ShardCache
folder, cache, limit, seed, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
manifest = Manifest.open(folder)
reader = ShardReader(manifest, ShardCache(cache, limit or None), max_open=2)
order = []
for rng in (np.random.default_rng([seed, n]) for n in range(rounds)):
    if rounds == 1:  # random order of images
        order += rng.permutation(len(manifest)).tolist()
    else:  # shard by shard, so that few are open at a time
        rows = [manifest.rows_of_shard(shard) for shard in rng.permutation(len(manifest.shards)).tolist()]
        order += [index for each in rows for index in range(each.start, each.stop)]
with ThreadPoolExecutor(4) as pool:
    digests = list(pool.map(lambda index: (int(index), hashlib.sha256(reader.read(index)).hexdigest()), order))
print(json.dumps([dataclasses.asdict(reader.cache.traffic), digests]))
"""


def start_reading(manifest: Manifest, cache: Path, limit: int = 0, seed: int = 0, rounds: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-c", READ_ALL, manifest.folder, str(cache), *map(str, (limit, seed, rounds))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)


def finished(manifest: Manifest, process: subprocess.Popen) -> dict[str, int]:
    """The process's traffic. Asserts that it read the right bytes."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    wanted = {key: hashlib.sha256(data).hexdigest() for key, data in source(COUNT)}
    traffic, digests = json.loads(out)
    assert all(digest == wanted[manifest.key(index)] for index, digest in digests)
    return traffic


def test_one_download_for_all_processes_and_threads(s3, remote: Manifest, tmp_path: Path) -> None:
    processes = [start_reading(remote, tmp_path / "cache", seed=seed) for seed in range(3)]
    traffic = [finished(remote, process) for process in processes]
    assert gets(s3) == {shard.name.split("/")[-1]: 1 for shard in remote.shards}
    assert sum(counts["misses"] for counts in traffic) == len(remote.shards)
    assert sum(counts["bytes_fetched"] for counts in traffic) == sum(shard.bytes for shard in remote.shards)
    assert sum(counts["hits"] for counts in traffic) >= 2 * len(remote.shards)
    assert not sum(counts["ranges"] for counts in traffic)
    assert ShardCache(tmp_path / "cache").used_bytes() == sum(shard.bytes for shard in remote.shards)


def test_least_recently_used_shard_is_evicted_and_the_limit_holds(s3, remote: Manifest, tmp_path: Path) -> None:
    sizes = [shard.bytes for shard in remote.shards]
    limit = max(sum(sizes[:3]), sizes[0] + sizes[2] + sizes[3])
    reader = ShardReader(remote, ShardCache(tmp_path / "cache", limit))

    def use(shard: int) -> None:
        reader.read(first_of(remote, shard))
        reader.release([shard])
        assert reader.cache.used_bytes() <= limit
        time.sleep(0.01)  # file times determine the order of use

    for shard in (0, 1, 2, 0, 3):
        use(shard)
    cached = {path.name.removesuffix(".tar") for path in (tmp_path / "cache" / "shards").glob("*.tar")}
    assert cached == {remote.shards[shard].sha256 for shard in (0, 2, 3)}
    before = reader.cache.traffic.misses
    use(0)
    assert reader.cache.traffic.misses == before
    use(1)
    assert reader.cache.traffic.misses == before + 1


def test_open_shards_are_not_evicted_and_others_bypass_the_cache(
    s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = ShardReader(remote, ShardCache(tmp_path / "cache", largest(remote)))
    reader.read(0)
    with caplog.at_level(logging.WARNING):
        assert reads_correctly(reader, images, list(range(COUNT)))
    rows = remote.rows_of_shard(0)
    assert reader.cache.traffic.ranges == COUNT - (rows.stop - rows.start)
    assert reader.cache.traffic.misses == 1
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "no space" in messages[0]
    assert "data.cache_gb" in messages[0]


def test_reader_that_releases_shards_works_with_a_small_cache(
    s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path
) -> None:
    """Also if a prefetched shard has no space or takes that of the shard needed now."""
    reader = ShardReader(remote, ShardCache(tmp_path / "cache", largest(remote)))
    shards = list(range(len(remote.shards)))
    prefetcher = ShardPrefetcher(reader, shards, shards, ahead=2)
    for shard in shards:
        prefetcher.advance_to(shard)
        rows = remote.rows_of_shard(shard)
        assert reads_correctly(reader, images, list(range(rows.start, rows.stop)))
        reader.release([other for other in shards if other != shard + 1])
    prefetcher.close()
    assert reader.cache.used_bytes() <= largest(remote)


def test_deleted_cache_is_filled_again(s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path) -> None:
    reader = ShardReader(remote, str(tmp_path / "cache"))
    reader.read(0)
    shutil.rmtree(tmp_path / "cache")
    assert reads_correctly(reader, images, list(range(COUNT)))


def test_cache_of_zero_bytes_is_bypassed(s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path) -> None:
    reader = ShardReader(remote, ShardCache(tmp_path / "cache", 0))
    assert reads_correctly(reader, images, list(range(0, COUNT, 7)))
    assert reader.cache.traffic.misses == 0
    with pytest.raises(SettingsError, match="-1 bytes"):
        ShardCache(tmp_path, -1)


@pytest.mark.slow
def test_eviction_under_readers_of_several_processes(s3, remote: Manifest, tmp_path: Path) -> None:
    """Two processes of four threads with two open shards each, and space for three: constant eviction."""
    limit = 3 * largest(remote)
    cache, stop, over = ShardCache(tmp_path / "cache", limit), threading.Event(), []

    def locked_size() -> int:
        """A listing is not a snapshot; under the lock no file changes, and a renamed file counts once."""
        with cache._lock("space.lock"):
            sizes = {}
            for file in (tmp_path / "cache" / "shards").iterdir():
                if file.suffix in (".tar", ".part"):
                    with contextlib.suppress(FileNotFoundError):
                        sizes[file.stat().st_ino] = file.stat().st_size
            return sum(sizes.values())

    def watch() -> None:
        while not stop.wait(0.005):
            if (tmp_path / "cache" / "shards").exists() and cache.used_bytes() > limit and locked_size() > limit:
                over.append(locked_size())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        processes = [start_reading(remote, tmp_path / "cache", limit, seed, rounds=8) for seed in range(2)]
        traffic = [finished(remote, process) for process in processes]
    finally:
        stop.set()
        watcher.join()
    assert not over
    fit = int((np.cumsum(sorted(shard.bytes for shard in remote.shards)) <= limit).sum())
    assert sum(counts["misses"] for counts in traffic) > fit  # some were evicted


def test_partial_file_of_a_killed_download_is_deleted(
    s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path
) -> None:
    plan = s3.proxy.plan
    plan.fraction, plan.kinds, plan.match, plan.slow_seconds, plan.methods = 1.0, ("slow_body",), ".tar", 60.0, ("GET",)
    process = start_reading(remote, tmp_path / "cache")
    folder = tmp_path / "cache" / "shards"
    deadline = time.monotonic() + 120
    while not list(folder.glob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(folder.glob("*.part"))
    plan.fraction = 0.0
    reader = ShardReader(remote, ShardCache(tmp_path / "cache", 10 * largest(remote)))
    assert reads_correctly(reader, images, list(range(COUNT)))
    assert reader.cache.traffic.misses == len(remote.shards)
    assert not list(folder.glob("*.part"))


FULL_DISK = """
import json, resource, sys
from paml.shards import Manifest, ShardReader
from paml.shards.cache import ShardCache
manifest = Manifest.open(sys.argv[1])
if int(sys.argv[3]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
reader = ShardReader(manifest, ShardCache(sys.argv[2], 1 << 40))
for index in range(len(manifest)):
    reader.read(index)
    for shard in range(int(manifest.shard[index])):
        reader.release([shard])
print(json.dumps([reader.cache.traffic.misses, reader.cache.traffic.ranges]))
"""


def read_on_full_disk(manifest: Manifest, cache: Path, file_bytes: int = 0) -> tuple[list[int], str]:
    command = [sys.executable, "-c", FULL_DISK, manifest.folder, str(cache), str(file_bytes)]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_no_file_can_be_written(s3, remote: Manifest, tmp_path: Path) -> None:
    (misses, ranges), stderr = read_on_full_disk(remote, tmp_path / "cache", 4096)
    assert (misses, ranges) == (0, COUNT)
    assert stderr.count("no space") == 1
    assert "File too large" in stderr


@pytest.fixture
def small_disk(tmp_path: Path, remote: Manifest) -> Iterator[Path]:
    """A file system with space for two and a half shards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = int(2.5 * largest(remote))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_evicts(s3, remote: Manifest, small_disk: Path) -> None:
    (misses, ranges), stderr = read_on_full_disk(remote, small_disk)
    assert (misses, ranges) == (len(remote.shards), 0)
    assert not stderr


def test_disk_full_of_other_files_is_bypassed(s3, remote: Manifest, small_disk: Path) -> None:
    with open(small_disk / "other", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    (misses, ranges), stderr = read_on_full_disk(remote, small_disk)
    assert (misses, ranges) == (0, COUNT)
    assert "No space left on device" in stderr


def test_a_cached_shard_that_is_damaged_is_a_miss(s3, remote: Manifest, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"))
    shard = cache.open(remote, 0)
    assert shard is not None
    Path(shard.path).write_bytes(b"damaged")
    assert cache.open(remote, 0, recheck=True) is not None
    assert (cache.traffic.hits, cache.traffic.misses) == (0, 2)
    assert cache.open(remote, 0, recheck=True) is not None
    assert (cache.traffic.hits, cache.traffic.misses) == (1, 2)


def test_damaged_object_is_fetched_twice_and_its_intact_images_are_read(
    s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = first_of(remote, 1) + 2
    url = remote.shard_path(1)
    data = bytearray(storage.read_bytes(url))
    data[int(remote.offset[bad]) + 9] ^= 1
    storage.write_bytes(url, bytes(data))
    s3.proxy.seen.clear()
    for _ in range(2):  # a second reader of the node reads the cached copy
        reader, lost = ShardReader(remote, str(tmp_path / "cache")), []
        for index in range(COUNT):
            try:
                assert reader.read(index) == images[remote.key(index)]
            except CorruptSampleError as error:
                lost.append(error.key)
        assert lost == [remote.key(bad)]
    assert gets(s3)[url.split("/")[-1]] == 2
    assert sum(
        url in record.getMessage() and "damaged in the bucket" in record.getMessage() for record in caplog.records
    )


@pytest.mark.parametrize("size", [0, 700, 0.5])
def test_truncated_object_loses_only_the_missing_images(
    size: float, s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path
) -> None:
    url = remote.shard_path(1)
    data = storage.read_bytes(url)
    cut = int(size * len(data)) if isinstance(size, float) else int(size)
    storage.write_bytes(url, data[:cut])
    intact = remote.offset + remote.size <= cut
    for limit in (None, 0):
        reader, lost, reasons = ShardReader(remote, ShardCache(tmp_path / f"cache-{limit}", limit)), [], []
        for index in range(COUNT):
            try:
                assert reader.read(index) == images[remote.key(index)]
            except CorruptSampleError as error:
                reasons.append(error.reason)
                lost.append(index)
        assert lost == [index for index in range(COUNT) if remote.shard[index] == 1 and not intact[index]]
        assert all("truncated" in reason for reason in reasons)


def test_missing_object_is_named(s3, remote: Manifest, tmp_path: Path) -> None:
    storage.delete(remote.shard_path(1))
    for limit in (None, 0):
        reader = ShardReader(remote, ShardCache(tmp_path / "cache", limit))
        with pytest.raises(storage.StorageError, match=rf"{remote.shard_path(1)} .*does not exist"):
            reader.read(first_of(remote, 1))


def test_damaged_cached_file_is_fetched_again(
    s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert reads_correctly(ShardReader(remote, str(tmp_path / "cache")), images, list(range(COUNT)))
    files = sorted((tmp_path / "cache" / "shards").glob("*.tar"))
    for file in files:
        size = file.stat().st_size
        for offset in range(600, size, 997):
            flip_byte(file, offset)
    reader = ShardReader(remote, str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as pool:
        order = [int(index) for index in np.random.default_rng(0).permutation(COUNT)]
        for index, data in zip(order, pool.map(reader.read, order), strict=True):
            assert data == images[remote.key(index)]
    assert reader.cache.traffic.misses == len(remote.shards)
    assert any("again" in record.getMessage() for record in caplog.records)


def test_shards_are_prefetched_in_order_of_use_up_to_the_limit(s3, remote: Manifest, tmp_path: Path) -> None:
    reader = ShardReader(remote, str(tmp_path / "cache"))
    order = [3, 0, 2, 1][: len(remote.shards)]
    prefetcher = ShardPrefetcher(reader, order, [0, 5, 9, 12], ahead=2)

    def is_cached(wanted: list[int]) -> bool:
        names = {path.name.removesuffix(".tar") for path in (tmp_path / "cache" / "shards").glob("*.tar")}
        return names == {remote.shards[shard].sha256 for shard in wanted}

    def becomes_cached(wanted: list[int]) -> bool:
        deadline = time.monotonic() + 60
        while not is_cached(wanted) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        return is_cached(wanted)

    assert becomes_cached(order[:3])  # one in use, two ahead
    prefetcher.advance_to(4)
    assert becomes_cached(order[:3])
    prefetcher.advance_to(5)
    assert becomes_cached(order)
    before = reader.cache.traffic.misses
    reader.read(first_of(remote, order[0]))
    assert reader.cache.traffic.misses == before
    prefetcher.close()


def test_close_does_not_wait_for_a_slow_shard(s3, remote: Manifest, tmp_path: Path) -> None:
    plan = s3.proxy.plan
    plan.fraction, plan.kinds, plan.match, plan.slow_seconds = 1.0, ("slow_body",), ".tar", 1.0
    reader = ShardReader(remote, str(tmp_path / "cache"))
    prefetcher = ShardPrefetcher(reader, list(range(len(remote.shards))), [0] * len(remote.shards), ahead=4)
    time.sleep(0.2)
    start = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - start < 60
    assert not list((tmp_path / "cache" / "shards").glob("*.part"))


def test_unusable_folder_is_named(s3, remote: Manifest, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(storage.StorageError, match=r"file/shards .*data.cache_dir"):
        ShardReader(remote, str(tmp_path / "file")).read(0)


def test_cache_pickles_as_its_settings(tmp_path: Path) -> None:
    cache = pickle.loads(pickle.dumps(ShardCache(tmp_path, 12)))
    assert (cache.folder, cache.limit_bytes) == (str(tmp_path), 12)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
