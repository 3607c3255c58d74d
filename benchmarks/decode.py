"""Photos of 1024 x 768 to 448 x 448 pixels: paml's decoder beside PIL and the transforms of research code.

python benchmarks/decode.py [--photos 96] [--rounds 7] [--size 448]      ($PAML_SHARED holds data/coco18)

Research code opens by PIL, converts, resizes, mirrors, makes a float tensor and normalises it; paml decodes into the
batch and resizes uint8 there (normalising is left to the device). Each round runs all ways one after the other;
ratios are medians over the rounds' pairs, by the clock and by processor time. With 2, research code runs in two
processes and paml in two threads. Pixels are compared with PIL's own decode and antialiased bilinear resize.
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


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def in_processes(work: Callable[[], None], count: int) -> None:
    """The same work `count` times at once, in children; here where it is once."""
    if count == 1:
        return work()
    children = [multiprocessing.get_context("fork").Process(target=work) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return None


def in_threads(work: Callable[[], None], count: int) -> None:
    """The same work `count` times at once, in threads."""
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
    small = [prepare_image(photo, size=size, resize="squash", quality=90, max_pixels=1 << 27).data for photo in photos]
    transform = research_transform(size)

    def research() -> None:
        for photo in photos:
            with Image.open(io.BytesIO(photo)) as picture:
                transform(picture.convert("RGB"))

    def pil() -> None:
        for photo in photos:
            with Image.open(io.BytesIO(photo)) as picture:
                np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))

    batches = [np.zeros((len(photos), size, size, 3), np.uint8) for _ in range(2)]  # used again, as the loader does

    def ours(pictures: list[bytes]) -> None:
        batch = batches.pop()
        for picture, out in zip(pictures, batch, strict=True):
            decode_into(picture, out)
        batches.append(batch)

    ways: dict[str, Callable[[int], None]] = {
        "research code": lambda count: in_processes(research, count),
        "PIL to uint8": lambda count: in_processes(pil, count),
        "paml": lambda count: in_threads(lambda: ours(photos), count),
        f"paml, stored at {size} px": lambda count: in_threads(lambda: ours(small), count),
    }
    for count in (1, 2):
        rounds = []
        for number in range(options.rounds + 1):
            taken = {}
            for name, way in ways.items():
                clock, processor = time.perf_counter(), processor_seconds()
                way(count)
                taken[name] = (time.perf_counter() - clock, processor_seconds() - processor)
            if number:
                rounds.append(taken)
        print(
            f"\n| {count} processes or threads | images/s | per processor second | times research code, by the clock |"
        )
        print("|---|---|---|---|")
        for name in ways:
            done = count * len(photos)
            clock, processor = (done / statistics.median(taken[name][kind] for taken in rounds) for kind in (0, 1))
            by = [statistics.median(t["research code"][kind] / t[name][kind] for t in rounds) for kind in (0, 1)]
            print(
                f"| {name} | {clock:,.0f} | {processor:,.0f} | {by[0]:.2f} (processor time {by[1]:.2f}) |", flush=True
            )
    most, mean = 0, 0.0
    out = np.empty((size, size, 3), np.uint8)
    for photo in photos:
        with Image.open(io.BytesIO(photo)) as picture:
            wanted = np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR), np.int16)
        decode_into(photo, out)
        difference = np.abs(out - wanted)
        most, mean = max(most, int(difference.max())), mean + float(difference.mean()) / len(photos)
    print(f"\nagainst PIL's pixels over {len(photos)} photos: at most {most} grey levels, {mean:.4f} on average")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
