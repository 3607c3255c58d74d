"""Decode photos of 1024 x 768 to 448 x 448 pixels: paml, PIL, and the transforms of research code.

Run: python benchmarks/decode.py [--photos 96] [--rounds 7] [--size 448]      ($PAML_SHARED has data/coco18)

Research code uses PIL, and resizes, mirrors, converts to a float tensor and normalizes. paml decodes and resizes uint8
into the batch; the device normalizes. Each round runs all of them in turn; ratios are medians over the rounds, in
wall-clock and CPU time. With 2 workers, research code runs in two processes and paml in two threads. The pixels are
compared with PIL's decoder and antialiased bilinear resize.
"""

import argparse
import io
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from photos import mosaics, research_transform
from PIL import Image

from paml.data.decode import decode_into
from paml.shards.images import prepare_image
from paml.shards.settings import ShardSettings


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def in_processes(work: Callable[[], None], count: int) -> None:
    """Run `work` in `count` child processes; in this process if `count` is 1."""
    if count == 1:
        return work()
    children = [multiprocessing.get_context("fork").Process(target=work) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return None


def in_threads(work: Callable[[], None], count: int) -> None:
    """Run `work` in `count` threads."""
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work) for _ in range(count)]:
            done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=448)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size, photos = options.size, mosaics(options.photos)
    small = [prepare_image(photo, ShardSettings(size=size)).data for photo in photos]
    transform = research_transform(size)

    def research() -> None:
        for photo in photos:
            with Image.open(io.BytesIO(photo)) as image:
                transform(image.convert("RGB"))

    def pil() -> None:
        for photo in photos:
            with Image.open(io.BytesIO(photo)) as image:
                np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))

    batches = [np.zeros((len(photos), size, size, 3), np.uint8) for _ in range(2)]  # reused, as in the loader

    def decode_with_paml(images: list[bytes]) -> None:
        batch = batches.pop()
        for image, out in zip(images, batch, strict=True):
            decode_into(image, out)
        batches.append(batch)

    methods: dict[str, Callable[[int], None]] = {
        "research code": lambda count: in_processes(research, count),
        "PIL to uint8": lambda count: in_processes(pil, count),
        "paml": lambda count: in_threads(lambda: decode_with_paml(photos), count),
        f"paml, stored at {size} px": lambda count: in_threads(lambda: decode_with_paml(small), count),
    }
    for count in (1, 2):
        rounds = []
        for number in range(options.rounds + 1):
            measured = {}
            for name, method in methods.items():
                clock, cpu = time.perf_counter(), cpu_seconds()
                method(count)
                measured[name] = (time.perf_counter() - clock, cpu_seconds() - cpu)
            if number:
                rounds.append(measured)
        print(
            f"\n| {count} processes or threads | images/s | per CPU second | speed-up over research code, wall-clock |"
        )
        print("|---|---|---|---|")
        for name in methods:
            done = count * len(photos)
            clock, cpu = (done / statistics.median(measured[name][kind] for measured in rounds) for kind in (0, 1))
            by = [statistics.median(t["research code"][kind] / t[name][kind] for t in rounds) for kind in (0, 1)]
            print(f"| {name} | {clock:,.0f} | {cpu:,.0f} | {by[0]:.2f} (CPU time {by[1]:.2f}) |", flush=True)
    largest, mean = 0, 0.0
    out = np.empty((size, size, 3), np.uint8)
    for photo in photos:
        with Image.open(io.BytesIO(photo)) as image:
            wanted = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR), np.int16)
        decode_into(photo, out)
        difference = np.abs(out - wanted)
        largest, mean = max(largest, int(difference.max())), mean + float(difference.mean()) / len(photos)
    print(f"\ndifference to PIL over {len(photos)} photos: at most {largest} gray levels, {mean:.4f} on average")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
