"""What a preparation would take: images, bytes, hours and money, from a sample of the real source. Writes nothing."""

import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence

from paml import storage
from paml.prepare import PrepareSettings, PriceSettings, Source, fetch, has_release, label_table, source_of
from paml.shards.assemble import GROUP_BYTES
from paml.shards.encode import PIECE_BYTES
from paml.shards.images import BadImage, prepare_image
from paml.shards.progress import duration
from paml.shards.settings import ShardSettings
from paml.sources.parts import Part

_SAMPLED_PARTS, _SAMPLED_IMAGES = 4, 128
_TAR_BYTES_AN_IMAGE = 768


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some images of a source, read and encoded as the preparation would."""

    asked: int = 0
    found: int = 0
    """Of those asked for: the others are absent or cannot be read."""
    bytes_in: int = 0
    bytes_out: int = 0
    read_seconds: float = 0.0
    """By one task, which has many requests under way."""
    encode_seconds: float = 0.0
    """By one core."""

    def __add__(self, other: "Sample") -> "Sample":
        return Sample(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """What a split would take."""

    split: str
    asked: int
    """Images that would be asked for."""
    images: float
    """Images that the shards would hold, going by the sample."""
    bytes_in: float
    bytes_out: float
    hours: float
    requests_read: float
    requests_written: float
    sample: Sample


def plan(settings: PrepareSettings, *, cpus: int, say: Callable[[str], None] = print) -> list[SplitPlan]:
    """Print a table of what `prepare` would take on so many CPUs, and what it would cost. Raises as `prepare`."""
    with tempfile.TemporaryDirectory(prefix="paml-plan-") as folder:
        if settings.own.labels is None and settings.release_from is not None and not has_release(settings):
            settings = dataclasses.replace(settings, release=os.path.join(folder, "2017_11"))
            fetch(settings, say)
        plans = []
        for split in settings.splits:
            table = label_table(settings, split, folder, lambda line: None)
            source = source_of(settings, split, table)
            plans.append(plan_split(split, source, settings, cpus))
    for line in report_lines(plans, settings, cpus):
        say(line)
    return plans


def plan_split(split: str, source: Source, settings: PrepareSettings, cpus: int) -> SplitPlan:
    """Reckon one split, from a sample of its parts."""
    sample = take_sample(source.parts, settings.shards)
    asked = source.expected_count
    share = sample.found / sample.asked if sample.asked else 1.0
    found = max(sample.found, 1)
    known = [part.bytes for part in source.parts]
    bytes_in = sum(size or 0 for size in known) if None not in known else asked * share * sample.bytes_in / found
    images = asked * share
    bytes_out = images * (sample.bytes_out / found + _TAR_BYTES_AN_IMAGE)
    tasks = min(cpus, max(1, len(source.parts)))
    encode_hours = images * sample.encode_seconds / found / cpus / 3600
    read_hours = images * sample.read_seconds / found / tasks / 3600
    remote_in, remote_out = storage.is_remote(settings.images), storage.is_remote(settings.out)
    pieces = max(len(source.parts), bytes_out / PIECE_BYTES)
    shards = max(1.0, images / settings.shards.samples_per_shard)
    groups = max(1.0, min(shards, bytes_out / GROUP_BYTES))
    return SplitPlan(
        split=split,
        asked=asked,
        images=images,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        hours=max(encode_hours, read_hours),
        requests_read=(asked if remote_in else 0) + (pieces * (groups + 2) + shards if remote_out else 0),
        requests_written=pieces + 2 * shards if remote_out else 0,
        sample=sample,
    )


def take_sample(parts: Sequence[Part], settings: ShardSettings) -> Sample:
    """Read and encode the first images of a few parts spread over the source; addresses of Flickr are not asked."""
    asked = [part for part in parts if not hasattr(part, "at_a_time")]
    chosen = asked[:: max(1, len(asked) // _SAMPLED_PARTS)][:_SAMPLED_PARTS]
    total = Sample()
    for part in chosen:
        begun = time.perf_counter()
        pairs = iter(part)
        payloads = [payload for _, payload in itertools.islice(pairs, _SAMPLED_IMAGES // len(chosen))]
        if (close := getattr(pairs, "close", None)) is not None:
            close()
        images = []
        for payload in payloads:
            if not isinstance(payload, Exception | bytes):
                try:
                    payload = storage.read_bytes(os.fspath(payload))
                except FileNotFoundError as error:
                    payload = error
            if isinstance(payload, bytes):
                images.append(payload)
        read_seconds, begun = time.perf_counter() - begun, time.perf_counter()
        sizes = [size for data in images if (size := _encoded_size(data, settings)) is not None]
        total += Sample(
            len(payloads), len(sizes), sum(map(len, images)), sum(sizes), read_seconds, time.perf_counter() - begun
        )
    return total


def _encoded_size(data: bytes, settings: ShardSettings) -> int | None:
    try:
        image = prepare_image(
            data,
            size=settings.size,
            resize=settings.resize,
            quality=settings.quality,
            chroma=settings.chroma,
            max_pixels=settings.max_pixels,
            strict=settings.strict,
        )
    except BadImage:
        return None
    return len(image.data)


def costs(plans: Sequence[SplitPlan], settings: PrepareSettings, cpus: int) -> dict[str, float]:
    """Money by kind, in the currency of the price table."""
    prices = settings.prices
    bytes_in = sum(p.bytes_in for p in plans) if storage.is_remote(settings.images) else 0.0
    stored = sum(p.bytes_out for p in plans) if storage.is_remote(settings.out) else 0.0
    nodes = prices.nodes or max(1, -(-cpus // prices.cpus_per_node))
    return {
        "nodes": sum(p.hours for p in plans) * nodes * prices.node_hour,
        "egress": bytes_in / 1e9 * prices.egress_per_gb,
        "requests": sum(p.requests_read for p in plans) / 1e3 * prices.get_per_1000
        + sum(p.requests_written for p in plans) / 1e3 * prices.put_per_1000,
        "storage a month": stored / 1e9 * prices.storage_gb_month,
    }


def planned_cpus(prices: PriceSettings, at_hand: int) -> int:
    """CPUs that a plan reckons with."""
    return at_hand if prices.nodes is None else prices.nodes * prices.cpus_per_node


def report_lines(plans: Sequence[SplitPlan], settings: PrepareSettings, cpus: int) -> list[str]:
    """The plan as text."""
    sample = sum((p.sample for p in plans), Sample())
    lines = [
        f"plan for {settings.out}; nothing was written",
        f"{'split':<12} {'asked for':>11} {'images':>11} {'GB in':>9} {'GB out':>9} {'time':>14}",
    ]
    lines += [
        f"{p.split:<12} {p.asked:>11,} {p.images:>11,.0f} {p.bytes_in / 1e9:>9,.2f} {p.bytes_out / 1e9:>9,.2f} "
        f"{duration(p.hours * 3600):>14}"
        for p in plans
    ]
    seconds = 3600 * sum(p.hours for p in plans)
    lines.append(
        f"{'all':<12} {sum(p.asked for p in plans):>11,} {sum(p.images for p in plans):>11,.0f} "
        f"{sum(p.bytes_in for p in plans) / 1e9:>9,.2f} {sum(p.bytes_out for p in plans) / 1e9:>9,.2f} "
        f"{duration(seconds):>14}"
    )
    if sample.found:
        lines.append(
            f"from a sample of {sample.asked} images ({sample.found} usable): "
            f"{sample.found / max(sample.encode_seconds, 1e-9):,.0f} images/s a core to decode, resize and encode, "
            f"{sample.bytes_in / max(sample.read_seconds, 1e-9) / 1e6:,.1f} MB/s read by one task; {cpus} CPUs"
        )
    else:
        lines.append("no image of the source could be sampled: sizes, time and money are unknown")
    money = costs(plans, settings, cpus)
    parts = ", ".join(f"{name} {value:,.2f}" for name, value in money.items())
    once = sum(value for name, value in money.items() if name != "storage a month")
    lines.append(f"US dollars: {once:,.2f} once ({parts}); by the price table in `prices`: check it")
    return lines
