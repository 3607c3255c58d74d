"""Images per second of the loader and of other loaders on the same images, with 1 and 2 processes or threads.

Run: python benchmarks/loader.py [--images 2000] [--rounds 5] [--workers 1 2]      ($PAML_SHARED has data/coco18)

Research code reads photos of 1024 x 768 from files with torch's DataLoader, PIL transforms and dense float labels of
5,000 classes; it gets a fifth of the images, because it is slow. All others read the same photos, stored at 448 px, to
uint8 batches of 50: files + DataLoader, webdataset and mosaicml-streaming (if it is installed: `pip install
paml[benchmark]`), with their PIL decoder and with paml's ("turbo"); and paml. "Bytes" reads without decoding:
webdataset, and paml with its CRC-32 check. Each round runs all of them in turn; ratios are medians over the rounds.
Rates include the start of processes or threads, in wall-clock and in CPU time of all processes. All data are in the
page cache.
"""

import argparse
import io
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photos import mosaics, research_transform
from PIL import Image
from simplejpeg import decode_jpeg
from torch.utils.data import DataLoader, Dataset

from paml.data.augment import Augmentation
from paml.data.loader import LabelSource, Loader, LoaderOptions
from paml.data.plan import join, plan_epoch
from paml.labels import LabelTable, table_from_triples
from paml.shards import Manifest, ShardReader, ShardSettings, write_shards
from paml.shards.images import prepare_image

SIZE, BATCH, CLASSES, DISTINCT = 448, 50, 5000, 96
Source = Callable[[int], Iterator[int]]
"""From a number of workers to the number of images of each batch."""


class ResearchFiles(Dataset):
    """Photos and a dense label matrix, as in research code."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.transform = files, research_transform(SIZE)
        self.labels = np.zeros((len(files), CLASSES), np.float32)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.files[index]) as photo:
            pixels = self.transform(photo.convert("RGB"))
        return pixels, torch.from_numpy(self.labels[index])


def by_pil(data: bytes) -> np.ndarray:
    """The decoder of webdataset (`rgb8`) and mosaicml-streaming (`jpeg`)."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def by_turbo(data: bytes) -> np.ndarray:
    """The decoder of paml."""
    return decode_jpeg(data, colorspace="RGB")


Decoder = Callable[[bytes], np.ndarray]


class SmallFiles(Dataset):
    """Images at the training size, one file each."""

    def __init__(self, files: list[Path], decode: Decoder) -> None:
        self.files, self.decode = files, decode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.decode(self.files[index].read_bytes()), index


def write_all(root: Path, images: int) -> None:
    """Write the photos as files, and at the training size as files and as shards with labels."""
    photos = mosaics(DISTINCT)
    small = [prepare_image(photo, ShardSettings(size=SIZE)).data for photo in photos]
    keys = [f"{number:016x}" for number in range(images)]
    for name, images_of in (("large", photos), ("small", small)):
        (root / name).mkdir()
        for number, key in enumerate(keys):
            (root / name / f"{key}.jpg").write_bytes(images_of[number % DISTINCT])
    source = ((key, small[number % DISTINCT]) for number, key in enumerate(keys))
    settings = ShardSettings(resize="original", samples_per_shard=max(1, images // 4))
    write_shards(source, root / "shards", settings, expected_count=images)
    image = np.repeat(np.arange(images), 3)
    cls = (np.arange(len(image)) * 7919) % CLASSES
    mids = [f"/m/{number:05d}" for number in range(CLASSES)]
    table_from_triples(keys, mids, mids, image, cls, (np.arange(len(image)) % 2).astype(np.int8), str(root / "labels"))
    mean = [sum(map(len, data)) / len(data) / 1e3 for data in (photos, small)]
    print(f"{images} images, {DISTINCT} distinct: {mean[0]:.0f} KB at 1024 x 768, {mean[1]:.0f} KB at {SIZE} px")


def write_mds(root: Path, images: int) -> bool:
    """Write the same bytes for mosaicml-streaming. Returns whether it is installed."""
    try:
        from streaming import MDSWriter
    except ImportError as error:
        print(f"mosaicml-streaming is skipped: {error}")
        return False
    files = sorted((root / "small").glob("*.jpg"))
    size = sum(file.stat().st_size for file in files) // 4 + (1 << 20)
    with MDSWriter(out=str(root / "mds"), columns={"jpg": "bytes", "cls": "int"}, size_limit=size) as out:
        for number, file in enumerate(files[:images]):
            out.write({"jpg": file.read_bytes(), "cls": number})
    return True


def batch_sizes(loader: DataLoader) -> Iterator[int]:
    for batch in loader:
        yield len(batch[0])


def sources(root: Path, images: int, mds: bool) -> dict[str, Source]:
    """The compared loaders by name."""
    import webdataset as wds

    large, small = (sorted((root / name).glob("*.jpg")) for name in ("large", "small"))
    tars = sorted(str(tar) for tar in (root / "shards").glob("*.tar"))
    manifest, table = Manifest.open(root / "shards"), LabelTable.open(str(root / "labels"))
    samples = join(manifest, table)
    plan = plan_epoch(samples, batch_size=BATCH, epoch=1, seed=0, window=1024)

    def research(workers: int) -> Iterator[int]:
        few = ResearchFiles(large[: max(2 * BATCH * workers, images // 5)])
        return batch_sizes(DataLoader(few, batch_size=BATCH, shuffle=True, num_workers=workers))

    def files(decode: Decoder, workers: int) -> Iterator[int]:
        return batch_sizes(DataLoader(SmallFiles(small, decode), batch_size=BATCH, shuffle=True, num_workers=workers))

    def webdataset(decode: Decoder, workers: int) -> Iterator[int]:
        pipeline = wds.WebDataset(tars, shardshuffle=False).shuffle(200).to_tuple("jpg", "__key__")  # pyright: ignore
        pipeline = pipeline.map_tuple(decode, lambda key: key).batched(BATCH)
        return batch_sizes(wds.WebLoader(pipeline, batch_size=None, num_workers=workers))  # pyright: ignore

    def webdataset_bytes(workers: int) -> Iterator[int]:
        pipeline = wds.WebDataset(tars, shardshuffle=False).to_tuple("jpg", "__key__").batched(BATCH)  # pyright: ignore
        return batch_sizes(wds.WebLoader(pipeline, batch_size=None, num_workers=workers))  # pyright: ignore

    def streaming(decode: Decoder, workers: int) -> Iterator[int]:
        from streaming import StreamingDataset

        class Decoded(StreamingDataset):
            def __getitem__(self, index: Any) -> Any:
                sample = super().__getitem__(index)
                return decode(sample["jpg"]), sample["cls"]

        data = Decoded(local=str(root / "mds"), shuffle=False, batch_size=BATCH)
        return batch_sizes(DataLoader(data, batch_size=BATCH, num_workers=workers))

    def paml(workers: int) -> Iterator[int]:
        loader = Loader(
            ShardReader(manifest),
            samples,
            LabelSource(table),
            plan,
            LoaderOptions(threads=workers),
            augmentation=Augmentation(flip_prob=0.5),
        )
        for batch in loader:
            yield len(batch)

    def paml_bytes(workers: int) -> Iterator[int]:
        reader = ShardReader(manifest)

        def read(step: int) -> list[bytes]:
            return [reader.read(index) for index in samples.index[plan.batch(step, (0, BATCH))[1]].tolist()]

        with ThreadPoolExecutor(workers) as pool:
            for batch in pool.map(read, range(plan.steps)):
                yield len(batch)

    loaders: dict[str, Source] = {
        "research": research,
        "files + DataLoader": partial(files, by_pil),
        "webdataset": partial(webdataset, by_pil),
        "streaming": partial(streaming, by_pil),
        "files + DataLoader, turbo": partial(files, by_turbo),
        "webdataset, turbo": partial(webdataset, by_turbo),
        "streaming, turbo": partial(streaming, by_turbo),
        "paml": paml,
        "webdataset, bytes": webdataset_bytes,
        "paml, bytes": paml_bytes,
    }
    return {name: source for name, source in loaders.items() if mds or not name.startswith("streaming")}


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def rates(source: Source, workers: int) -> tuple[float, float]:
    """(images per second, images per CPU second)."""
    start, cpu_start = time.perf_counter(), cpu_seconds()
    count = sum(source(workers))
    return count / (time.perf_counter() - start), count / (cpu_seconds() - cpu_start)


PAIRS = (  # (numerator, denominator, target ratio)
    ("paml", "research", 14.0),
    ("paml", "files + DataLoader", 2.1),
    ("paml", "webdataset", 2.1),
    ("paml", "streaming", 2.1),
    ("paml", "files + DataLoader, turbo", None),
    ("paml", "webdataset, turbo", None),
    ("paml", "streaming, turbo", None),
    ("paml, bytes", "webdataset, bytes", 4.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", help="names in the table to run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_all(root, options.images)
        loaders = sources(root, options.images, write_mds(root, options.images))
        if options.only:
            loaders = {name: source for name, source in loaders.items() if name in options.only}
        for workers in options.workers:
            rounds = []
            for number in range(options.rounds + 1):
                measured = {name: rates(source, workers) for name, source in loaders.items()}
                if number:  # the first round warms the page cache and the imports
                    rounds.append(measured)
                print(".", end="", file=sys.stderr, flush=True)
            print(f"\n| {workers} processes or threads | images/s | images per CPU second |\n|---|---|---|")
            for name in loaders:
                clock, cpu = (statistics.median(measured[name][kind] for measured in rounds) for kind in (0, 1))
                print(f"| {name} | {clock:,.0f} | {cpu:,.0f} |")
            print("\n| ratio | wall-clock | CPU time | target |\n|---|---|---|---|")
            for numerator, denominator, target in PAIRS:
                if numerator not in loaders or denominator not in loaders:
                    continue
                wall, cpu = (
                    statistics.median(t[numerator][kind] / t[denominator][kind] for t in rounds) for kind in (0, 1)
                )
                print(f"| {numerator} / {denominator} | {wall:.2f} | {cpu:.2f} | {target or ''} |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
