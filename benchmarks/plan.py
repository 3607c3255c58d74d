"""The plan of an epoch at the size of Open Images, by simulation: what it costs, what a node reads, how it mixes.

    python benchmarks/plan.py [--images 9011219 --shards 10000] [--out benchmarks/plan]

Prints the tables and writes them to OUT.txt, with a plot OUT.png. No image is made: the plan of `paml.data.plan` is
drawn for the shards of a data set of that size, whose sizes differ as those of hashed shards do, and followed step by
step. Seconds and memory are those of one worker process on a manifest and a label table made for it.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from paml.data.plan import EpochPlan, Samples, join, plan_epoch, shard_uses, worker_slots

IMAGE_BYTES = 46_000  # of a training picture of 448 px
WORKERS_OF_NODE, SLOTS_OF_WORKER = 8, 32
WINDOWS = (1, 1024, 4096, 16384)
WORKERS = (8, 64, 1024)
GROUPS = 100  # of neighbouring shards, as of shards that somebody filled class by class


def samples_of(num_images: int, num_shards: int) -> Samples:
    """Images of a manifest whose shards were drawn by a hash of the key."""
    sizes = np.random.default_rng(0).multinomial(num_images, np.full(num_shards, 1 / num_shards))
    shard = np.repeat(np.arange(num_shards, dtype=np.int32), sizes)
    return Samples(index=np.arange(num_images), row=np.arange(num_images), shard=shard)


def node_slots(batch_size: int, node: int, workers: int) -> tuple[int, int]:
    """The slots of all workers of a node: neighbours."""
    first = worker_slots(batch_size, node * WORKERS_OF_NODE, workers)
    return first[0], worker_slots(batch_size, (node + 1) * WORKERS_OF_NODE - 1, workers)[1]


def sequence(samples: Samples, plan: EpochPlan, slots: tuple[int, int]) -> np.ndarray:
    """int32: the shards that a node reads from, image after image."""
    return np.concatenate([samples.shard[plan.batch(step, slots)[1]] for step in range(plan.steps)])


def fetches(shards: np.ndarray, cache_shards: int) -> int:
    """How often a shard must be fetched with a cache of so many, of which the least recently used goes."""
    cache: collections.OrderedDict[int, None] = collections.OrderedDict()
    missed = 0
    for shard in shards.tolist():
        if shard in cache:
            cache.move_to_end(shard)
        else:
            missed += 1
            cache[shard] = None
            if len(cache) > cache_shards:
                cache.popitem(last=False)
    return missed


def in_play(first: np.ndarray, last: np.ndarray, steps: int) -> int:
    """The most shards that are needed before and after one step."""
    change = np.bincount(first, minlength=steps + 1) - np.bincount(last + 1, minlength=steps + 1)
    return int(np.cumsum(change).max())


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the nodes read in an epoch."""

    nodes: int
    window: int
    steps: int
    images: tuple[int, int]
    """Least and most of a node."""
    shards: tuple[int, int]
    """Least and most of a node."""
    all_shards: int
    """Of all nodes together."""
    in_play: int
    """The most of a node at one step."""
    fetched: dict[float, float]
    """Shards fetched for each shard used (node 0), by cache size in shares of `in_play`."""


def reading(samples: Samples, workers: int, window: int, cache_shares: tuple[float, ...]) -> Reading:
    batch_size, nodes = workers * SLOTS_OF_WORKER, workers // WORKERS_OF_NODE
    plan = plan_epoch(samples, batch_size=batch_size, epoch=1, seed=0, window=window)
    own = [node_slots(batch_size, node, workers) for node in range(nodes)]
    uses = [shard_uses(samples, plan, slots) for slots in own]
    lengths = np.bincount(np.arange(len(samples)) % batch_size, minlength=batch_size)
    images = [int(lengths[lo:hi].sum()) for lo, hi in own]
    most = max(in_play(first, last, plan.steps) for _, first, last in uses)
    shards = sequence(samples, plan, own[0])
    fetched = {share: fetches(shards, max(1, round(share * most))) / len(uses[0][0]) for share in cache_shares}
    counts = [len(used) for used, _, _ in uses]
    return Reading(
        nodes, window, plan.steps, (min(images), max(images)), (min(counts), max(counts)), sum(counts), most, fetched
    )


def spread(counts: np.ndarray, shares: np.ndarray) -> float:
    """Chi-square of the groups' counts over its degrees of freedom: 1 for draws at random, more where they clump."""
    expected = counts.sum(axis=1, keepdims=True) * shares
    return float(((counts - expected) ** 2 / expected).sum(axis=1).mean() / (len(shares) - 1))


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How the samples of single batches and of runs of 100 batches are spread."""

    name: str
    shards: float
    """Distinct shards in a batch."""
    batch_groups: float
    """`spread` of a batch over groups of neighbouring shards."""
    run_groups: float
    """The same of 100 batches."""
    batch_classes: float
    """`spread` of a batch over classes that lie in all shards alike."""
    run_classes: float
    neighbours: float
    """Chance of two images of a shard to meet in a batch of an epoch, over that of any two images."""


def mixing(name: str, samples: Samples, order: np.ndarray, batch_size: int) -> Mixing:
    plan = EpochPlan(order, batch_size)
    num_shards = int(samples.shard[-1]) + 1
    classes = np.random.default_rng(5).choice(GROUPS, len(samples), p=_zipf(GROUPS)).astype(np.int64)
    groups = samples.shard.astype(np.int64) * GROUPS // num_shards
    steps = np.random.default_rng(6).choice(max(1, plan.steps - 101), min(60, max(1, plan.steps - 101)), replace=False)
    distinct, pairs, tables = [], 0, {"groups": ([], []), "classes": ([], [])}
    for step in steps.tolist():
        run = [plan.batch(s, (0, batch_size))[1] for s in range(step, min(step + 100, plan.steps - 1))]
        counts = np.bincount(samples.shard[run[0]], minlength=num_shards)
        distinct.append(np.count_nonzero(counts))
        for batch in run:
            of_shard = np.bincount(samples.shard[batch], minlength=num_shards)
            pairs += int((of_shard * (of_shard - 1)).sum())
        for what, of in (("groups", groups), ("classes", classes)):
            tables[what][0].append(np.bincount(of[run[0]], minlength=GROUPS))
            tables[what][1].append(np.bincount(of[np.concatenate(run)], minlength=GROUPS))
    shares = {
        what: np.bincount(of, minlength=GROUPS) / len(of) for what, of in (("groups", groups), ("classes", classes))
    }
    sizes = np.bincount(samples.shard)
    batches = sum(min(100, plan.steps - 1 - step) for step in steps.tolist())
    alike = (sizes * (sizes - 1.0)).sum() / (len(samples) * (len(samples) - 1.0))
    found = {what: [spread(np.array(counts), shares[what]) for counts in tables[what]] for what in tables}
    return Mixing(
        name,
        float(np.mean(distinct)),
        *found["groups"],
        *found["classes"],
        neighbours=pairs / batches / (batch_size * (batch_size - 1)) / alike,
    )


def _zipf(count: int) -> np.ndarray:
    weights = 1 / np.arange(1, count + 1)
    return weights / weights.sum()


def make_data(folder: Path, samples: Samples) -> None:
    """A manifest and a label table of one label an image, for the start of a worker."""
    import pyarrow as pa

    from paml.labels.table import uint64_to_hex, write_table
    from paml.shards.manifest import ShardInfo, make_batch, write_manifest

    count = len(samples)
    values = np.unique(np.random.default_rng(1).integers(0, 2**64 - 1, count + count // 1000, np.uint64))
    keys = np.random.default_rng(2).permutation(values)[:count]
    sizes = np.bincount(samples.shard)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    zeros = np.zeros(count, np.int64)
    batch = make_batch(
        keys=uint64_to_hex(keys),
        shard=samples.shard,
        offset=512 + (np.arange(count) - starts) * (IMAGE_BYTES + 1000),
        size=zeros + IMAGE_BYTES,
        crc32=zeros,
        width=zeros + 448,
        height=zeros + 448,
    )
    infos = [
        ShardInfo(
            f"shard-{number:06}.tar",
            int(size),
            int(size) * (IMAGE_BYTES + 1000) + 10240,
            hashlib.sha256(str(number).encode()).hexdigest(),
        )
        for number, size in enumerate(sizes.tolist())
    ]
    write_manifest(str(folder), batch, infos, settings={}, report={})
    mids = [f"/m/{number}" for number in range(5000)]
    write_table(
        str(folder / "labels.arrow"),
        keys=pa.array(np.sort(keys)),
        offsets=np.arange(count + 1),
        codes=(np.arange(count) % 10_000).astype(np.uint16),
        classes=mids,
        names=mids,
        metadata={},
    )


def memory_mb(name: str) -> float:
    """VmHWM (peak) or RssAnon (own memory, without mapped files) of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) * 1024 / 1e6


def start_worker(folder: Path, workers: int) -> dict[str, float]:
    """Open, join and plan as worker 0 does; seconds by clock and processor, memory, and a batch's microseconds."""
    from paml.labels import LabelTable
    from paml.shards import Manifest

    took: dict[str, float] = {}

    def lap(name: str, work):
        begun, processor = time.perf_counter(), time.process_time()
        result = work()
        took[name], took[f"{name} processor"] = time.perf_counter() - begun, time.process_time() - processor
        return result

    manifest, table = lap("open", lambda: (Manifest.open(folder), LabelTable.open(folder / "labels.arrow")))
    before = memory_mb("RssAnon")
    samples = lap("join", lambda: join(manifest, table))
    batch_size = workers * SLOTS_OF_WORKER
    slots = worker_slots(batch_size, 0, workers)
    given = {"batch_size": batch_size, "seed": 0, "window": WINDOWS[1]}
    plan = lap("own streams", lambda: plan_epoch(samples, epoch=1, **given, slots=slots))
    took["own MB"] = memory_mb("RssAnon") - before
    took["peak MB"] = memory_mb("VmHWM")
    steps = range(min(1000, plan.steps))
    lap("batch", lambda: [plan.batch(step, slots) for step in steps])
    took["batch"] /= len(steps)
    lap("whole plan", lambda: plan_epoch(samples, epoch=1, **given))
    return took


def start_tables(samples: Samples) -> list[str]:
    lines = [
        "| workers | open | join | plan of its own streams | plan of all streams | a batch | own memory "
        "| peak, files included |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="paml-plan-") as name:
        make_data(Path(name), samples)
        for workers in WORKERS:
            command = [sys.executable, os.path.abspath(__file__), "--worker", name, str(workers)]
            took = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            seconds = [
                f"{took[lap]:.2f} s ({took[f'{lap} processor']:.2f})"
                for lap in ("open", "join", "own streams", "whole plan")
            ]
            lines.append(
                f"| {workers:,} | {' | '.join(seconds)} | {took['batch'] * 1e6:.0f} us | {took['own MB']:.0f} MB "
                f"| {took['peak MB']:.0f} MB |"
            )
    return lines


def plot(out: str, readings: list[Reading], mixings: list[Mixing], shard_gb: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for number, nodes in enumerate(sorted({reading.nodes for reading in readings})):
        for reading, style in zip([r for r in readings if r.nodes == nodes], ("-.", "-", "--", ":"), strict=True):
            sizes = [share * reading.in_play * shard_gb for share in reading.fetched]
            label = f"{nodes} node{'s' * (nodes > 1)}, window {reading.window:,}"
            left.plot(sizes, list(reading.fetched.values()), style, marker=".", color=f"C{number}", label=label)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="cache of a node, GB",
        ylabel="fetches of a shard in an epoch",
        title="A cache of the shards in play fetches each once",
    )
    left.legend(fontsize=6, loc="upper right")
    left.set_xlim(right=4000)
    names = [mixing.name for mixing in mixings]
    places = np.arange(len(names))
    right.bar(places - 0.2, [mixing.run_groups for mixing in mixings], 0.4, label="shards filled class by class")
    right.bar(places + 0.2, [mixing.run_classes for mixing in mixings], 0.4, label="shards filled by hash (paml's)")
    right.axhline(1, color="grey", linewidth=0.8)
    right.set_xticks(places, names, fontsize=7, rotation=15)
    right.set(
        yscale="log",
        ylabel="chi-square / degrees of freedom",
        title="100 batches of 256, by class (1: drawn at random)",
    )
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=9_011_219)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--out", default=str(Path(__file__).with_suffix("")))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(start_worker(Path(options.worker[0]), int(options.worker[1]))))
        return
    samples = samples_of(options.images, options.shards)
    shard_gb = IMAGE_BYTES * len(samples) / options.shards / 1e9
    lines = [
        f"{len(samples):,} images in {options.shards:,} shards of about {shard_gb * 1e3:.0f} MB; "
        f"{WORKERS_OF_NODE} workers a node, {SLOTS_OF_WORKER} slots of the global batch a worker",
        "",
        f"Start of worker 0: seconds by clock (of the processor); windows of {WINDOWS[1]:,}",
        *start_tables(samples),
        "",
        "What a node reads in an epoch",
        "| workers | nodes | window | steps | images, least and most | shards, least and most | GB "
        "| all nodes over the data set | shards in play | cache that fetches each once |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cache_shares = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    readings = []
    for workers in WORKERS:
        for window in WINDOWS:
            found = reading(samples, workers, window, cache_shares)
            readings.append(found)
            lines.append(
                f"| {workers:,} | {found.nodes} | {window:,} | {found.steps:,} "
                f"| {found.images[0]:,} to {found.images[1]:,} "
                f"| {found.shards[0]:,} to {found.shards[1]:,} | {found.shards[1] * shard_gb:.1f} "
                f"| {found.all_shards / options.shards:.3f} | {found.in_play:,} | {found.in_play * shard_gb:.1f} GB |"
            )
    share = len(samples) / max(r.nodes for r in readings)
    touched = options.shards * (1 - np.exp(-share / options.shards))
    lines += [
        "A shard that is cut between two streams stands at the end of one and the start of the next: it counts as in "
        "play all the epoch, but may go between.",
        f"A full shuffle would make each of the {max(r.nodes for r in readings)} nodes touch {touched:,.0f} shards, "
        f"{touched * shard_gb:,.0f} GB an epoch.",
        "",
        "Fetches of a shard in an epoch (1: each once; in brackets the share of reads that hit), by cache size",
        "| workers | window | " + " | ".join(f"{share:.0%} of the shards in play" for share in cache_shares) + " |",
        "|---|---|" + "---|" * len(cache_shares),
    ]
    for found in readings:
        reads = found.images[0] / found.shards[0]
        cells = [f"{times:.2f} ({1 - times / reads:.1%})" for times in found.fetched.values()]
        lines.append(f"| {found.nodes * WORKERS_OF_NODE:,} | {found.window:,} | {' | '.join(cells)} |")
    lines += [
        "",
        "Mixing, global batch of 256: groups are 100 neighbouring shards each, as if filled class by class; classes "
        "lie in all shards alike",
        "| order | shards in a batch | groups, a batch | groups, 100 batches | classes, a batch | classes, 100 batches "
        "| two images of a shard meet |",
        "|---|---|---|---|---|---|---|",
    ]
    mixings = [
        mixing(
            f"window {window:,}",
            samples,
            plan_epoch(samples, batch_size=256, epoch=1, seed=0, window=window).order,
            256,
        )
        for window in WINDOWS
    ]
    mixings.append(mixing("full shuffle", samples, np.random.default_rng(3).permutation(len(samples)), 256))
    lines += [
        f"| {m.name} | {m.shards:.1f} | {m.batch_groups:.2f} | {m.run_groups:.2f} | {m.batch_classes:.2f} "
        f"| {m.run_classes:.2f} | {m.neighbours:.2f} |"
        for m in mixings
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    Path(options.out + ".txt").write_text(text)
    plot(options.out + ".png", readings, mixings, shard_gb)


if __name__ == "__main__":
    main()
