"""The shard cache: one download a node, its bound, and what is left when processes, disks and objects fail."""

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
from paml.shards import CorruptSample, Manifest, ShardReader, ShardSettings, write_shards
from paml.shards.cache import ShardCache
from paml.shards.reader import FetchAhead
from tests.shards.images import flip_byte, source

ROOT = Path(__file__).resolve().parents[2]
COUNT, PER_SHARD = 60, 10


@pytest.fixture(scope="module")
def server() -> Iterator:
    pytest.importorskip("moto.server")
    from tests.helpers.fault_proxy import faulty_s3

    with faulty_s3(share=0.0) as s3:
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
    """Six shards or so."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(source(COUNT), folder, ShardSettings(resize="original", samples_per_shard=PER_SHARD))
    return folder


@pytest.fixture
def remote(s3, written: Path, tmp_path: Path) -> Manifest:
    """The same in a bucket, each test's own."""
    folder = f"s3://images/{tmp_path.name}"
    for file in written.iterdir():
        if file.suffix in (".tar", ".arrow"):
            storage.upload(str(file), f"{folder}/{file.name}")
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


def all_right(reader: ShardReader, images: dict[str, bytes], order: list[int]) -> bool:
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
for draw in (np.random.default_rng([seed, n]) for n in range(rounds)):
    if rounds == 1:  # any image after any other
        order += draw.permutation(len(manifest)).tolist()
    else:  # shard after shard, so that few are open at a time
        rows = [manifest.rows_of_shard(shard) for shard in draw.permutation(len(manifest.shards)).tolist()]
        order += [index for each in rows for index in range(each.start, each.stop)]
with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(lambda index: (int(index), hashlib.sha256(reader.read(index)).hexdigest()), order))
print(json.dumps([dataclasses.asdict(reader.cache.traffic), found]))
"""


def start_reading(manifest: Manifest, cache: Path, limit: int = 0, seed: int = 0, rounds: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-c", READ_ALL, manifest.folder, str(cache), *map(str, (limit, seed, rounds))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)


def finished(manifest: Manifest, process: subprocess.Popen) -> dict[str, int]:
    """The process's traffic; its bytes must be those of the sources."""
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    wanted = {key: hashlib.sha256(data).hexdigest() for key, data in source(COUNT)}
    traffic, found = json.loads(out)
    assert all(digest == wanted[manifest.key(index)] for index, digest in found)
    return traffic


def test_one_download_however_many_processes_and_threads_ask(s3, remote: Manifest, tmp_path: Path) -> None:
    processes = [start_reading(remote, tmp_path / "cache", seed=seed) for seed in range(3)]
    traffic = [finished(remote, process) for process in processes]
    assert gets(s3) == {shard.name.split("/")[-1]: 1 for shard in remote.shards}
    assert sum(own["misses"] for own in traffic) == len(remote.shards)
    assert sum(own["bytes_fetched"] for own in traffic) == sum(shard.bytes for shard in remote.shards)
    assert sum(own["hits"] for own in traffic) >= 2 * len(remote.shards)
    assert not sum(own["ranges"] for own in traffic)
    assert ShardCache(tmp_path / "cache").held_bytes() == sum(shard.bytes for shard in remote.shards)


def test_the_least_recently_used_goes_and_the_bound_holds(s3, remote: Manifest, tmp_path: Path) -> None:
    sizes = [shard.bytes for shard in remote.shards]
    limit = max(sum(sizes[:3]), sizes[0] + sizes[2] + sizes[3])
    reader = ShardReader(remote, ShardCache(tmp_path / "cache", limit))

    def use(shard: int) -> None:
        reader.read(first_of(remote, shard))
        reader.release([shard])
        assert reader.cache.held_bytes() <= limit
        time.sleep(0.01)  # the order of use is told by file times

    for shard in (0, 1, 2, 0, 3):
        use(shard)
    kept = {path.name.removesuffix(".tar") for path in (tmp_path / "cache" / "shards").glob("*.tar")}
    assert kept == {remote.shards[shard].sha256 for shard in (0, 2, 3)}
    before = reader.cache.traffic.misses
    use(0)
    assert reader.cache.traffic.misses == before
    use(1)
    assert reader.cache.traffic.misses == before + 1


def test_what_is_being_read_stays_and_the_rest_comes_past_the_cache(
    s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = ShardReader(remote, ShardCache(tmp_path / "cache", largest(remote)))
    reader.read(0)
    with caplog.at_level(logging.WARNING):
        assert all_right(reader, images, list(range(COUNT)))
    own = remote.rows_of_shard(0)
    assert reader.cache.traffic.ranges == COUNT - (own.stop - own.start)
    assert reader.cache.traffic.misses == 1
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "has no room for" in told[0]
    assert "raise data.cache_gb" in told[0]


def test_a_reader_that_lets_go_of_shards_reads_all_through_a_small_cache(
    s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path
) -> None:
    """Also where what is fetched ahead finds no room or takes it from what is needed now."""
    reader = ShardReader(remote, ShardCache(tmp_path / "cache", largest(remote)))
    shards = list(range(len(remote.shards)))
    ahead = FetchAhead(reader, shards, shards, ahead=2)
    for shard in shards:
        ahead.reached(shard)
        rows = remote.rows_of_shard(shard)
        assert all_right(reader, images, list(range(rows.start, rows.stop)))
        reader.release([other for other in shards if other != shard + 1])
    ahead.close()
    assert reader.cache.held_bytes() <= largest(remote)


def test_a_cache_cleared_by_hand_is_filled_again(
    s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path
) -> None:
    reader = ShardReader(remote, str(tmp_path / "cache"))
    reader.read(0)
    shutil.rmtree(tmp_path / "cache")
    assert all_right(reader, images, list(range(COUNT)))


def test_a_cache_of_no_bytes_is_a_way_past_it(s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path) -> None:
    reader = ShardReader(remote, ShardCache(tmp_path / "cache", 0))
    assert all_right(reader, images, list(range(0, COUNT, 7)))
    assert reader.cache.traffic.misses == 0
    with pytest.raises(SettingsError, match="must be at least 0"):
        ShardCache(tmp_path, -1)


@pytest.mark.slow
def test_eviction_under_readers_of_several_processes(s3, remote: Manifest, tmp_path: Path) -> None:
    """Two processes of four threads, two shards open each, room for three: the files go and come all the time."""
    limit = 3 * largest(remote)
    cache, stop, over = ShardCache(tmp_path / "cache", limit), threading.Event(), []

    def really_held() -> int:
        """A listing is no snapshot: under the lock nothing comes or goes, and a file just renamed counts once."""
        with cache._lock("room.lock"):
            found = {}
            for file in (tmp_path / "cache" / "shards").iterdir():
                if file.suffix in (".tar", ".part"):
                    with contextlib.suppress(FileNotFoundError):
                        found[file.stat().st_ino] = file.stat().st_size
            return sum(found.values())

    def watch() -> None:
        while not stop.wait(0.005):
            if (tmp_path / "cache" / "shards").exists() and cache.held_bytes() > limit and really_held() > limit:
                over.append(really_held())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        processes = [start_reading(remote, tmp_path / "cache", limit, seed, rounds=8) for seed in range(2)]
        traffic = [finished(remote, process) for process in processes]
    finally:
        stop.set()
        watching.join()
    assert not over
    fit = int((np.cumsum(sorted(shard.bytes for shard in remote.shards)) <= limit).sum())
    assert sum(own["misses"] for own in traffic) > fit  # so some made room; how many, the readers' order decides


def test_a_killed_download_leaves_nothing_behind(
    s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path
) -> None:
    plan = s3.proxy.plan
    plan.share, plan.kinds, plan.match, plan.slow_seconds, plan.methods = 1.0, ("slow_body",), ".tar", 60.0, ("GET",)
    process = start_reading(remote, tmp_path / "cache")
    folder = tmp_path / "cache" / "shards"
    end = time.monotonic() + 30
    while not list(folder.glob("*.part")):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(folder.glob("*.part"))
    plan.share = 0.0
    reader = ShardReader(remote, ShardCache(tmp_path / "cache", 10 * largest(remote)))
    assert all_right(reader, images, list(range(COUNT)))
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


def read_on_a_full_disk(manifest: Manifest, cache: Path, file_bytes: int = 0) -> tuple[list[int], str]:
    command = [sys.executable, "-c", FULL_DISK, manifest.folder, str(cache), str(file_bytes)]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_no_file_can_be_written(s3, remote: Manifest, tmp_path: Path) -> None:
    (misses, ranges), told = read_on_a_full_disk(remote, tmp_path / "cache", 4096)
    assert (misses, ranges) == (0, COUNT)
    assert told.count("has no room for") == 1
    assert "File too large" in told


@pytest.fixture
def small_disk(tmp_path: Path, remote: Manifest) -> Iterator[Path]:
    """A file system with room for two shards and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = int(2.5 * largest(remote))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_evicts_and_goes_on(s3, remote: Manifest, small_disk: Path) -> None:
    (misses, ranges), told = read_on_a_full_disk(remote, small_disk)
    assert (misses, ranges) == (len(remote.shards), 0)
    assert not told


def test_a_disk_full_of_other_things_is_passed_by(s3, remote: Manifest, small_disk: Path) -> None:
    with open(small_disk / "other", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    (misses, ranges), told = read_on_a_full_disk(remote, small_disk)
    assert (misses, ranges) == (0, COUNT)
    assert "No space left on device" in told


def test_a_damaged_object_is_fetched_twice_then_used_image_by_image(
    s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = first_of(remote, 1) + 2
    url = remote.shard_path(1)
    data = bytearray(storage.read_bytes(url))
    data[int(remote.offset[bad]) + 9] ^= 1
    storage.write_bytes(url, bytes(data))
    s3.proxy.seen.clear()
    for _ in range(2):  # a second reader of the node takes the remains from the cache
        reader, lost = ShardReader(remote, str(tmp_path / "cache")), []
        for index in range(COUNT):
            try:
                assert reader.read(index) == images[remote.key(index)]
            except CorruptSample as sample:
                lost.append(sample.key)
        assert lost == [remote.key(bad)]
    assert gets(s3)[url.split("/")[-1]] == 2
    assert sum(
        url in record.getMessage() and "damaged in the bucket" in record.getMessage() for record in caplog.records
    )


@pytest.mark.parametrize("keep", [0, 700, 0.5])
def test_a_cut_object_loses_what_is_cut_off(
    keep: float, s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path
) -> None:
    url = remote.shard_path(1)
    data = storage.read_bytes(url)
    cut = int(keep * len(data)) if isinstance(keep, float) else int(keep)
    storage.write_bytes(url, data[:cut])
    whole = remote.offset + remote.size <= cut
    for limit in (None, 0):
        reader, lost, reasons = ShardReader(remote, ShardCache(tmp_path / f"cache-{limit}", limit)), [], []
        for index in range(COUNT):
            try:
                assert reader.read(index) == images[remote.key(index)]
            except CorruptSample as sample:
                reasons.append(sample.reason)
                lost.append(index)
        assert lost == [index for index in range(COUNT) if remote.shard[index] == 1 and not whole[index]]
        assert all("the tar file ends at byte" in reason for reason in reasons)


def test_a_missing_object_is_named(s3, remote: Manifest, tmp_path: Path) -> None:
    storage.delete(remote.shard_path(1))
    for limit in (None, 0):
        reader = ShardReader(remote, ShardCache(tmp_path / "cache", limit))
        with pytest.raises(storage.StorageError, match=rf"{remote.shard_path(1)} of the manifest is gone: put it back"):
            reader.read(first_of(remote, 1))


def test_damage_in_the_cache_itself_is_healed(
    s3, remote: Manifest, images: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert all_right(ShardReader(remote, str(tmp_path / "cache")), images, list(range(COUNT)))
    files = sorted((tmp_path / "cache" / "shards").glob("*.tar"))
    for file in files:
        size = file.stat().st_size
        for at in range(600, size, 997):
            flip_byte(file, at)
    reader = ShardReader(remote, str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as pool:
        order = [int(index) for index in np.random.default_rng(0).permutation(COUNT)]
        for index, data in zip(order, pool.map(reader.read, order), strict=True):
            assert data == images[remote.key(index)]
    assert reader.cache.traffic.misses == len(remote.shards)
    assert any("is fetched again" in record.getMessage() for record in caplog.records)


def test_shards_are_fetched_ahead_in_the_order_of_need_and_no_further(s3, remote: Manifest, tmp_path: Path) -> None:
    reader = ShardReader(remote, str(tmp_path / "cache"))
    order = [3, 0, 2, 1][: len(remote.shards)]
    ahead = FetchAhead(reader, order, [0, 5, 9, 12], ahead=2)

    def held(wanted: list[int]) -> bool:
        names = {path.name.removesuffix(".tar") for path in (tmp_path / "cache" / "shards").glob("*.tar")}
        return names == {remote.shards[shard].sha256 for shard in wanted}

    def comes(wanted: list[int]) -> bool:
        end = time.monotonic() + 20
        while not held(wanted) and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.2)
        return held(wanted)

    assert comes(order[:3])  # the first is needed now, two lie ahead
    ahead.reached(4)
    assert comes(order[:3])
    ahead.reached(5)
    assert comes(order)
    before = reader.cache.traffic.misses
    reader.read(first_of(remote, order[0]))
    assert reader.cache.traffic.misses == before
    ahead.close()


def test_leaving_early_does_not_wait_for_a_slow_shard(s3, remote: Manifest, tmp_path: Path) -> None:
    plan = s3.proxy.plan
    plan.share, plan.kinds, plan.match, plan.slow_seconds = 1.0, ("slow_body",), ".tar", 1.0
    reader = ShardReader(remote, str(tmp_path / "cache"))
    ahead = FetchAhead(reader, list(range(len(remote.shards))), [0] * len(remote.shards), ahead=4)
    time.sleep(0.2)
    begun = time.monotonic()
    ahead.close()
    assert time.monotonic() - begun < 10
    assert not list((tmp_path / "cache" / "shards").glob("*.part"))


def test_a_slow_object_is_named(
    s3, remote: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paml.shards.cache._SLOW_SECONDS", 0.2)
    plan = s3.proxy.plan
    plan.share, plan.kinds, plan.match, plan.slow_seconds, plan.methods = 1.0, ("slow_body",), ".tar", 0.6, ("GET",)
    ShardReader(remote, str(tmp_path / "cache")).read(0)
    named = remote.shard_path(int(remote.shard[0]))
    assert any(f"slow object: {named} took" in record.getMessage() for record in caplog.records)


def test_a_folder_that_cannot_be_used_is_named(s3, remote: Manifest, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        storage.StorageError, match=r"the cache folder .*file/shards cannot be used: .* set data.cache_dir"
    ):
        ShardReader(remote, str(tmp_path / "file")).read(0)


def test_a_cache_travels_as_its_settings(tmp_path: Path) -> None:
    cache = pickle.loads(pickle.dumps(ShardCache(tmp_path, 12)))
    assert (cache.folder, cache.limit_bytes) == (str(tmp_path), 12)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
