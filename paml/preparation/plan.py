"""Estimate a preparation from a sample of its source: images, bytes, hours and cost. Writes nothing."""

import contextlib
import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence

from paml import storage
from paml.preparation.dataset import open_dataset
from paml.preparation.images import find_images
from paml.preparation.openimages import needs_release
from paml.preparation.prepare import write_tables
from paml.preparation.settings import PrepareSettings
from paml.progress import format_duration
from paml.shards.images import UndecodableError, prepare_image
from paml.shards.settings import ShardSettings
from paml.sources.parts import Part

_SAMPLED_PARTS, _SAMPLED_IMAGES = 4, 128
_TAR_BYTES_PER_IMAGE = 768


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """The estimate of one split."""

    requested: int
    """Images that would be requested."""
    images: float
    """Images in the shards, extrapolated from the sample."""
    bytes_in: float
    bytes_out: float
    hours: float
    sampled: int
    """Images of the sample."""
    usable: int
    """Of the sampled images: the others are missing or cannot be read."""


def plan(settings: PrepareSettings, *, cpus: int, log: Callable[[str], None] = print) -> list[SplitPlan]:
    """Log a table of what `prepare` would take, and what it would cost. Raises as `prepare`.

    cpus: CPUs to assume unless the settings name a number of nodes.
    """
    prices = settings.prices
    cpus = cpus if prices.nodes is None else prices.nodes * prices.cpus_per_node
    plans: dict[str, SplitPlan] = {}
    with tempfile.TemporaryDirectory(prefix="paml-plan-") as folder:
        if needs_release(settings):
            settings = dataclasses.replace(settings, source="openimages", labels=os.path.join(folder, "2017_11"))
        dataset = open_dataset(settings, log)
        tables, _ = write_tables(dataset, settings, folder, lambda line: None)
        for split, table in tables.items():
            images = find_images(dataset, settings, split, table, log)
            plans[split] = _plan_split(images.parts, images.count, settings.shards, cpus)
    log(f"plan for {settings.out}; nothing was written")
    log(f"{'split':<12} {'requested':>11} {'images':>11} {'GB in':>9} {'GB out':>9} {'time':>14}")
    for split, p in plans.items():
        log(_format_row(split, p.requested, p.images, p.bytes_in, p.bytes_out, p.hours))
    requested, images, bytes_in, bytes_out, hours, sampled, usable = (
        sum(column) for column in zip(*map(dataclasses.astuple, plans.values()), strict=True)
    )
    log(_format_row("all", requested, images, bytes_in, bytes_out, hours))
    log(f"from a sample of {sampled} images ({usable} usable), for {cpus} CPUs")
    nodes = prices.nodes or max(1, -(-cpus // prices.cpus_per_node))
    egress = bytes_in / 1e9 * prices.egress_per_gb if storage.is_remote(settings.images or "") else 0.0
    log(f"{hours * nodes * prices.node_hour + egress:,.2f} US dollars by the settings in `prices`, without storage")
    return list(plans.values())


def _format_row(split: str, requested: int, images: float, bytes_in: float, bytes_out: float, hours: float) -> str:
    sizes = f"{requested:>11,} {images:>11,.0f} {bytes_in / 1e9:>9,.2f} {bytes_out / 1e9:>9,.2f}"
    return f"{split:<12} {sizes} {format_duration(hours * 3600):>14}"


def _plan_split(parts: Sequence[Part], requested: int, settings: ShardSettings, cpus: int) -> SplitPlan:
    """Read and encode the first images of a few parts spread over the source, except parts that limit concurrency."""
    candidates = [part for part in parts if part.max_concurrent is None]
    chosen = candidates[:: max(1, len(candidates) // _SAMPLED_PARTS)][:_SAMPLED_PARTS]
    sampled = usable = bytes_in = bytes_out = 0
    read_seconds = encode_seconds = 0.0  # by one task, with its concurrent requests; by one core
    for part in chosen:
        start = time.perf_counter()
        images = []
        with contextlib.closing(iter(part)) as pairs:  # pyright: ignore[reportArgumentType] # they are generators
            for _, payload in itertools.islice(pairs, _SAMPLED_IMAGES // len(chosen)):
                sampled += 1
                with contextlib.suppress(FileNotFoundError):
                    if not isinstance(payload, Exception):
                        images.append(payload if isinstance(payload, bytes) else storage.read_bytes(os.fspath(payload)))
        read_seconds += time.perf_counter() - start
        bytes_in += sum(map(len, images))
        start = time.perf_counter()
        for data in images:
            with contextlib.suppress(UndecodableError):
                bytes_out += len(prepare_image(data, settings).data)
                usable += 1
        encode_seconds += time.perf_counter() - start
    count = requested * (usable / sampled if sampled else 1.0)
    per_sampled = count / max(usable, 1)
    part_bytes = [part.bytes for part in parts]
    tasks = min(cpus, max(1, len(parts)))
    return SplitPlan(
        requested=requested,
        images=count,
        bytes_in=per_sampled * bytes_in if None in part_bytes else sum(size or 0 for size in part_bytes),
        bytes_out=per_sampled * bytes_out + count * _TAR_BYTES_PER_IMAGE,
        hours=per_sampled * max(encode_seconds / cpus, read_seconds / tasks) / 3600,
        sampled=sampled,
        usable=usable,
    )
