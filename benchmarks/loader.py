"""Images a second of the loader beside what the field uses, on the same pictures, with 1 and 2 processes or threads.

python benchmarks/loader.py [--images 2000] [--rounds 5] [--workers 1 2]      ($PAML_SHARED holds data/coco18)

(i) research code: photos of 1024 x 768 in files, torch's DataLoader, PIL's transforms, dense float labels of 5,000
classes. All others read the same photos stored once at 448 px to batches of 50 in uint8: files + DataLoader, the
webdataset pipeline and mosaicml-streaming (left out where it is not installed: `pip install paml[benchmark]`), which
decode by PIL as they come, and again with paml's decoder put into them ("turbo"); and paml with threads and with
processes. Bytes alone: webdataset against paml's reader, which checks every image's CRC-32. Each round runs all of
them one after the other; ratios are medians over the rounds' pairs. Rates are over a whole pass, the start of its
processes or threads included, by the clock and by the processor time of all processes; (i) takes a fifth of the
images, since it is slow. Everything is read from the page cache.
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

from paml.data.loader import LabelSource, Loader
from paml.data.plan import join, plan_epoch
from paml.labels import LabelTable, table_from_triples
from paml.shards import Manifest, ShardReader, ShardSettings, write_shards
from paml.shards.images import prepare_image

SIZE, BATCH, CLASSES, DISTINCT = 448, 50, 5000, 96
Source = Callable[[int], Iterator[int]]
"""From a number of workers to the number of images in each batch that comes."""


class ResearchFiles(Dataset):
    """Photos and a dense matrix of labels, as research code holds them."""

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
    """As webdataset (`rgb8`) and mosaicml-streaming (`jpeg`) decode by themselves."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.array(picture.convert("RGB"))


def by_turbo(data: bytes) -> np.ndarray:
    """As paml decodes."""
    return decode_jpeg(data, colorspace="RGB")


Decoder = Callable[[bytes], np.ndarray]


class SmallFiles(Dataset):
    """The pictures at the training size, a file each."""

    def __init__(self, files: list[Path], decode: Decoder) -> None:
        self.files, self.decode = files, decode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.decode(self.files[index].read_bytes()), index


def write_all(root: Path, images: int) -> None:
    """The photos as files, and at the training size as files, shards with labels, and MDS shards."""
    photos = mosaics(DISTINCT)
    small = [prepare_image(photo, size=SIZE, resize="squash", quality=90, max_pixels=1 << 27).data for photo in photos]
    keys = [f"{number:016x}" for number in range(images)]
    for name, kept in (("large", photos), ("small", small)):
        (root / name).mkdir()
        for number, key in enumerate(keys):
            (root / name / f"{key}.jpg").write_bytes(kept[number % DISTINCT])
    source = ((key, small[number % DISTINCT]) for number, key in enumerate(keys))
    settings = ShardSettings(resize="original", samples_per_shard=max(1, images // 4))
    write_shards(source, root / "shards", settings, expected_count=images)
    image = np.repeat(np.arange(images), 3)
    cls = (np.arange(len(image)) * 7919) % CLASSES
    mids = [f"/m/{number:05d}" for number in range(CLASSES)]
    table_from_triples(keys, mids, mids, image, cls, (np.arange(len(image)) % 2).astype(np.int8), str(root / "labels"))
    mean = [sum(map(len, kept)) / len(kept) / 1e3 for kept in (photos, small)]
    print(f"{images} images, {DISTINCT} distinct: {mean[0]:.0f} KB at 1024 x 768, {mean[1]:.0f} KB at {SIZE} px")


def write_mds(root: Path, images: int) -> bool:
    """The same bytes for mosaicml-streaming; False where it is not installed."""
    try:
        from streaming import MDSWriter
    except ImportError as error:
        print(f"mosaicml-streaming is left out: {error}")
        return False
    files = sorted((root / "small").glob("*.jpg"))
    size = sum(file.stat().st_size for file in files) // 4 + (1 << 20)
    with MDSWriter(out=str(root / "mds"), columns={"jpg": "bytes", "cls": "int"}, size_limit=size) as out:
        for number, file in enumerate(files[:images]):
            out.write({"jpg": file.read_bytes(), "cls": number})
    return True


def of_loader(loader: DataLoader) -> Iterator[int]:
    for batch in loader:
        yield len(batch[0])


def sources(root: Path, images: int, mds: bool) -> dict[str, Source]:
    """All that is compared."""
    import webdataset as wds

    large, small = (sorted((root / name).glob("*.jpg")) for name in ("large", "small"))
    tars = sorted(str(tar) for tar in (root / "shards").glob("*.tar"))
    manifest, table = Manifest.open(root / "shards"), LabelTable.open(str(root / "labels"))
    samples = join(manifest, table)
    plan = plan_epoch(samples, batch_size=BATCH, epoch=1, seed=0, window=1024)

    def research(workers: int) -> Iterator[int]:
        few = ResearchFiles(large[: max(2 * BATCH * workers, images // 5)])
        return of_loader(DataLoader(few, batch_size=BATCH, shuffle=True, num_workers=workers))

    def files(decode: Decoder, workers: int) -> Iterator[int]:
        return of_loader(DataLoader(SmallFiles(small, decode), batch_size=BATCH, shuffle=True, num_workers=workers))

    def webdataset(decode: Decoder, workers: int) -> Iterator[int]:
        pipeline = wds.WebDataset(tars, shardshuffle=False).shuffle(200).to_tuple("jpg", "__key__")  # pyright: ignore
        pipeline = pipeline.map_tuple(decode, lambda key: key).batched(BATCH)
        return of_loader(wds.WebLoader(pipeline, batch_size=None, num_workers=workers))  # pyright: ignore

    def webdataset_bytes(workers: int) -> Iterator[int]:
        pipeline = wds.WebDataset(tars, shardshuffle=False).to_tuple("jpg", "__key__").batched(BATCH)  # pyright: ignore
        return of_loader(wds.WebLoader(pipeline, batch_size=None, num_workers=workers))  # pyright: ignore

    def streaming(decode: Decoder, workers: int) -> Iterator[int]:
        from streaming import StreamingDataset

        class Decoded(StreamingDataset):
            def __getitem__(self, at: Any) -> Any:
                sample = super().__getitem__(at)
                return decode(sample["jpg"]), sample["cls"]

        data = Decoded(local=str(root / "mds"), shuffle=False, batch_size=BATCH)
        return of_loader(DataLoader(data, batch_size=BATCH, num_workers=workers))

    def paml(**chosen: int) -> Iterator[int]:
        loader = Loader(
            reader=ShardReader(manifest),
            samples=samples,
            labels=LabelSource(table),
            plan=plan,
            slots=(0, BATCH),
            image_size=SIZE,
            flip=0.5,
            **chosen,
        )
        for batch in loader:
            yield len(batch)

    def paml_bytes(workers: int) -> Iterator[int]:
        reader = ShardReader(manifest)

        def some(step: int) -> list[bytes]:
            return [reader.read(index) for index in samples.index[plan.batch(step, (0, BATCH))[1]].tolist()]

        with ThreadPoolExecutor(workers) as pool:
            for batch in pool.map(some, range(plan.steps)):
                yield len(batch)

    found: dict[str, Source] = {
        "research": research,
        "files + DataLoader": partial(files, by_pil),
        "webdataset": partial(webdataset, by_pil),
        "streaming": partial(streaming, by_pil),
        "files + DataLoader, turbo": partial(files, by_turbo),
        "webdataset, turbo": partial(webdataset, by_turbo),
        "streaming, turbo": partial(streaming, by_turbo),
        "paml, threads": lambda workers: paml(threads=workers),
        "paml, processes": lambda workers: paml(processes=workers),
        "webdataset, bytes": webdataset_bytes,
        "paml, bytes": paml_bytes,
    }
    return {name: source for name, source in found.items() if mds or not name.startswith("streaming")}


def processor_seconds() -> float:
    """Of this process and of all its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def rates(source: Source, workers: int) -> tuple[float, float]:
    """(images a second by the clock, images a processor second)."""
    begun, processor = time.perf_counter(), processor_seconds()
    count = sum(source(workers))
    return count / (time.perf_counter() - begun), count / (processor_seconds() - processor)


PAIRS = (
    ("paml, threads", "research", 14.0),
    ("paml, threads", "files + DataLoader", 2.1),
    ("paml, threads", "webdataset", 2.1),
    ("paml, threads", "streaming", 2.1),
    ("paml, threads", "files + DataLoader, turbo", None),
    ("paml, threads", "webdataset, turbo", None),
    ("paml, threads", "streaming, turbo", None),
    ("paml, bytes", "webdataset, bytes", 4.0),
    ("paml, threads", "paml, processes", None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", help="some of the names in the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_all(root, options.images)
        found = sources(root, options.images, write_mds(root, options.images))
        if options.only:
            found = {name: source for name, source in found.items() if name in options.only}
        for workers in options.workers:
            rounds = []
            for number in range(options.rounds + 1):
                taken = {name: rates(source, workers) for name, source in found.items()}
                if number:  # the first one warms the page cache and the imports
                    rounds.append(taken)
                print(".", end="", file=sys.stderr, flush=True)
            print(f"\n| {workers} processes or threads | images/s | images per processor second |\n|---|---|---|")
            for name in found:
                clock, processor = (statistics.median(taken[name][kind] for taken in rounds) for kind in (0, 1))
                print(f"| {name} | {clock:,.0f} | {processor:,.0f} |")
            print("\n| ratio | by the clock | by processor time | to reach |\n|---|---|---|---|")
            for ours, theirs, bar in PAIRS:
                if ours not in found or theirs not in found:
                    continue
                by = [statistics.median(t[ours][kind] / t[theirs][kind] for t in rounds) for kind in (0, 1)]
                print(f"| {ours} / {theirs} | {by[0]:.2f} | {by[1]:.2f} | {bar or ''} |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
