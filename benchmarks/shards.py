"""How near the shard writer comes to the bare work of decoding, resizing and encoding, on this machine.

Run: python benchmarks/shards.py [--images 400] [--rounds 5]

Interleaved rounds of the same work on the same number of threads: (bare) a thread pool that decodes, resizes and
encodes images from memory and throws the result away; (folder, tar) `write_shards` from files, spill files,
sorting, tar files, SHA-256 and manifest included. Prints medians and the median of the paired ratios.
"""

import argparse
import io
import os
import resource
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from paml.shards import Manifest, ShardReader, ShardSettings, verify_shards, write_shards
from paml.shards.images import prepare_image
from paml.sources.folder import iter_folder
from paml.sources.tars import iter_tars


def photo(seed: int) -> bytes:
    """A 1024x768 JPEG file of about the size of a photo: smooth shapes with grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1024, 768), 3)
    pixels = np.asarray(coarse, np.float32) + rng.normal(0, 9, (768, 1024, 1)).astype(np.float32)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def both_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor seconds: the second hardly changes when other jobs share the cores."""
    started = time.process_time()
    wall = seconds(work)
    return wall, time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    photos = [photo(seed) for seed in range(32)]
    settings = ShardSettings(size=options.size, samples_per_shard=100)
    names = [f"{i:016x}" for i in range(options.images)]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "images").mkdir()
        with tarfile.open(root / "images.tar", "w") as tar:
            for i, name in enumerate(names):
                (root / "images" / f"{name}.jpg").write_bytes(photos[i % len(photos)])
                tar.add(root / "images" / f"{name}.jpg", f"{name}.jpg")

        def bare() -> None:
            def one(i: int) -> int:
                data = photos[i % len(photos)]
                image = prepare_image(data, size=options.size, resize="squash", quality=90, max_pixels=1 << 27)
                return len(image.data)

            with ThreadPoolExecutor(options.workers) as pool:
                list(pool.map(one, range(options.images)))

        def write(source: str) -> None:
            pairs = iter_folder(root / "images") if source == "folder" else iter_tars(root / "images.tar")
            out = root / "out"
            shutil.rmtree(out, ignore_errors=True)
            write_shards(pairs, out, settings, expected_count=options.images, workers=options.workers)

        works = {"bare": bare, "folder": lambda: write("folder"), "tar": lambda: write("tar")}
        for work in works.values():
            work()
        rounds = [{name: both_seconds(work) for name, work in works.items()} for _ in range(options.rounds)]
        for name in works:
            rate = options.images / statistics.median(taken[name][0] for taken in rounds)
            wall, processor = (statistics.median(t["bare"][kind] / t[name][kind] for t in rounds) for kind in (0, 1))
            print(
                f"{name:>8}: {rate:7.1f} images/s with {options.workers} threads; "
                f"share of the bare rate: {wall:.1%} by the clock, {processor:.1%} by processor time"
            )
        manifest = Manifest.open(root / "out")
        reader = ShardReader(manifest)
        order = np.random.default_rng(0).permutation(manifest.num_samples)
        taken = min(seconds(lambda: [reader.read(i) for i in order]) for _ in range(5))
        bytes_ = int(manifest.size.sum())
        print(f"    read: {len(order) / taken:7.0f} images/s in random order, {bytes_ / taken / 1e9:.2f} GB/s")
        taken = min(seconds(lambda: verify_shards(root / "out")) for _ in range(3))
        total = sum(shard.bytes for shard in manifest.shards)
        print(f"  verify: {total / taken / 1e9:.2f} GB/s")
        before = sum(map(len, photos)) / len(photos) / 1e3
        print(f"    size: {bytes_ / manifest.num_samples / 1e3:.1f} KB an image, {before:.0f} KB before")
        print(f"    peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB resident")


if __name__ == "__main__":
    main()
