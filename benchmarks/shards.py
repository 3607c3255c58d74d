"""The speed of the shard writer relative to decoding, resizing and encoding alone.

Run: python benchmarks/shards.py [--images 400] [--rounds 5] [--ray]
     PAML_SHARED=../shared python benchmarks/shards.py --s3 [--ray] [--rounds 3]

Interleaved rounds on the same number of cores: (bare) a thread pool that decodes, resizes and encodes images in memory
and discards the result; (folder, tar) `write_parts` from files, with spills, sorting, tar files, SHA-256 and manifest;
(ray) the folder with Ray tasks, on a running Ray. Prints medians and the median of the paired ratios; the target is
90 % of the bare rate.

--s3: the 9,000 photos of coco18 (320 px), as objects of a bucket, to shards of 160 px in the bucket, on a moto server
in another process. Also compares the CPU time of all processes.
"""

import argparse
import contextlib
import io
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from paml import storage
from paml.distributed.local_head import free_ports
from paml.shards import Manifest, ShardReader, ShardSettings, verify_shards, write_parts
from paml.shards.images import prepare_image
from paml.sources.folder import folder_parts
from paml.sources.parts import Part
from paml.sources.tars import tar_parts
from paml.tasks import LocalTaskRunner, TaskRunner


def photo(seed: int) -> bytes:
    """A 1024x768 JPEG of about the size of a photo: smooth shapes with noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1024, 768), 3)
    pixels = np.asarray(coarse, np.float32) + rng.normal(0, 9, (768, 1024, 1)).astype(np.float32)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_seconds() -> float:
    """CPU time of this process and its running children, such as those of Ray."""
    total = time.process_time()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not (process.cmdline() and "moto" in " ".join(process.cmdline())):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def both_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(wall-clock seconds, CPU seconds); the latter depend less on other load."""
    start = cpu_seconds()
    wall = seconds(work)
    return wall, cpu_seconds() - start


def bare(images: Sequence[bytes], count: int, size: int, workers: int) -> None:
    """Decode, resize and encode only."""

    def one(i: int) -> int:
        data = images[i % len(images)]
        return len(prepare_image(data, ShardSettings(size=size)).data)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(count)))


@contextlib.contextmanager
def ray_tasks(workers: int) -> Iterator[TaskRunner]:
    """Ray with this number of CPUs, stopped at the end."""
    os.environ.update({"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"})
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    from paml.distributed.ray_tasks import RayTaskRunner

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield RayTaskRunner(cpus_per_task=1)
    finally:
        ray.shutdown()


def silent(unit: str, done: int, total: int) -> None:
    """No progress."""


def compare(works: dict[str, Callable[[], None]], images: int, rounds: int, workers: int) -> None:
    """Print the rate of each, also as a fraction of the bare rate."""
    for work in works.values():
        work()
    measured = [{name: both_seconds(work) for name, work in works.items()} for _ in range(rounds)]
    for name in works:
        rate = images / statistics.median(each[name][0] for each in measured)
        wall, cpu = (statistics.median(each["bare"][kind] / each[name][kind] for each in measured) for kind in (0, 1))
        print(
            f"{name:>8}: {rate:7.1f} images/s on {workers} cores; "
            f"{wall:.1%} of the bare rate in wall-clock time, {cpu:.1%} in CPU time",
            flush=True,
        )


def from_disk(options: argparse.Namespace) -> None:
    """Photos on the local disk to shards on the local disk."""
    photos = [photo(seed) for seed in range(32)]
    settings = ShardSettings(size=options.size, samples_per_shard=max(100, options.images // 10))
    names = [f"{i:016x}" for i in range(options.images)]
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        root = Path(temporary)
        (root / "images").mkdir()
        with tarfile.open(root / "images.tar", "w") as tar:
            for i, name in enumerate(names):
                (root / "images" / f"{name}.jpg").write_bytes(photos[i % len(photos)])
                tar.add(root / "images" / f"{name}.jpg", f"{name}.jpg")
        local = LocalTaskRunner(options.workers)

        def write(parts: list[Part], tasks: TaskRunner) -> None:
            out = root / "out"
            shutil.rmtree(out, ignore_errors=True)
            write_parts(parts, out, settings, expected_count=options.images, tasks=tasks, progress=silent)

        def folder() -> list[Part]:
            return folder_parts(root / "images", max(1, options.images // 8))

        works = {
            "bare": lambda: bare(photos, options.images, options.size, options.workers),
            "folder": lambda: write(folder(), local),
            "tar": lambda: write(tar_parts(root / "images.tar"), local),
        }
        if options.ray:
            on_ray = stack.enter_context(ray_tasks(options.workers))
            works["ray"] = lambda: write(folder(), on_ray)
        compare(works, options.images, options.rounds, options.workers)
        manifest = Manifest.open(root / "out")
        reader = ShardReader(manifest)
        order = np.random.default_rng(0).permutation(manifest.num_samples)
        elapsed = min(seconds(lambda: [reader.read(i) for i in order]) for _ in range(5))
        bytes_ = int(manifest.size.sum())
        print(f"    read: {len(order) / elapsed:7.0f} images/s in random order, {bytes_ / elapsed / 1e9:.2f} GB/s")
        elapsed = min(seconds(lambda: verify_shards(root / "out")) for _ in range(3))
        total = sum(shard.bytes for shard in manifest.shards)
        print(f"  verify: {total / elapsed / 1e9:.2f} GB/s")
        before = sum(map(len, photos)) / len(photos) / 1e3
        print(f"    size: {bytes_ / manifest.num_samples / 1e3:.1f} KB per image, {before:.0f} KB before")
        print(f"    peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB resident")


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """A moto server in another process; yields a bucket."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    os.environ.update(
        {
            "AWS_ENDPOINT_URL_S3": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1,localhost",
        }
    )
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(urllib.request.Request(f"{url}/photos", method="PUT"), timeout=2)
                break
            time.sleep(0.1)
        yield "s3://photos"
    finally:
        server.terminate()
        server.wait(10)


def from_s3(options: argparse.Namespace) -> None:
    """The photos of coco18 from a bucket into a bucket."""
    shared = Path(os.environ.get("PAML_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    files = sorted((shared / "data" / "coco18" / "images").rglob("*.jpg"))
    if options.images:
        files = files[: options.images]
    if not files:
        sys.exit(f"no photos in {shared}/data/coco18/images: set PAML_SHARED")
    photos = [path.read_bytes() for path in files]
    settings = ShardSettings(size=160, samples_per_shard=500)
    with s3_server() as bucket, contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(16) as pool:
            list(
                pool.map(
                    lambda i: storage.write_bytes(f"{bucket}/images/{files[i].name}", photos[i]), range(len(files))
                )
            )
        print(f"{len(files):,} photos, {sum(map(len, photos)) / 1e6:.0f} MB, in a bucket", flush=True)

        def write(tasks: TaskRunner) -> None:
            storage.delete_folder(f"{bucket}/out")
            parts = folder_parts(f"{bucket}/images", 1000)
            report = write_parts(parts, f"{bucket}/out", settings, tasks=tasks, progress=silent)
            if report.written != len(files):
                raise RuntimeError(f"{report} of {len(files)} photos")

        local = LocalTaskRunner(options.workers)
        works = {
            "bare": lambda: bare(photos, len(photos), settings.size, options.workers),
            "threads": lambda: write(local),
        }
        if options.ray:
            on_ray = stack.enter_context(ray_tasks(options.workers))
            works["ray"] = lambda: write(on_ray)
        compare(works, len(files), options.rounds, options.workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=None, help="default 400; with --s3 all photos")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ray", action="store_true", help="also with Ray tasks")
    parser.add_argument("--s3", action="store_true", help="the photos of coco18, from a bucket into a bucket")
    options = parser.parse_args()
    if options.s3:
        from_s3(options)
    else:
        options.images = options.images or 400
        from_disk(options)


if __name__ == "__main__":
    main()
