"""Simulate the epoch plan at the size of Open Images: its cost, the reads of a node, and how well it mixes.

Run: python benchmarks/plan.py [--images 9011219 --shards 10000] [--out benchmarks/plan]

Prints the tables, and writes them to OUT.txt with a plot OUT.png. Needs no images: plans epochs of `paml.data.plan` for
shards with the sizes of hashed shards, and follows them step by step. Seconds and memory are those of one worker
process with a generated manifest and label table.
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

IMAGE_BYTES = 46_000  # of a training image of 448 px
WORKERS_OF_NODE, SLOTS_OF_WORKER = 8, 32
WINDOWS = (1, 1024, 4096, 16384)
WORKERS = (8, 64, 1024)
GROUPS = 100  # groups of neighboring shards, as of shards sorted by class
CACHE_SIZES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def samples_of(num_images: int, num_shards: int) -> Samples:
    """Images assigned to shards by a hash of the key."""
    sizes = np.random.default_rng(0).multinomial(num_images, np.full(num_shards, 1 / num_shards))
    shard = np.repeat(np.arange(num_shards, dtype=np.int32), sizes)
    return Samples(index=np.arange(num_images), row=np.arange(num_images), shard=shard)


def node_slots(batch_size: int, node: int, workers: int) -> tuple[int, int]:
    """The consecutive slots of all workers of a node."""
    first = worker_slots(batch_size, node * WORKERS_OF_NODE, workers)
    return first[0], worker_slots(batch_size, (node + 1) * WORKERS_OF_NODE - 1, workers)[1]


def sequence(samples: Samples, plan: EpochPlan, slots: tuple[int, int]) -> np.ndarray:
    """int32: the shard of each image that a node reads, in order."""
    return np.concatenate([samples.shard[plan.batch(step, slots)[1]] for step in range(plan.steps)])


def fetches(shards: np.ndarray, cache_shards: int) -> int:
    """Number of fetches with an LRU cache of `cache_shards` shards."""
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


def max_in_use(first: np.ndarray, last: np.ndarray, steps: int) -> int:
    """The largest number of shards in use at one step."""
    change = np.bincount(first, minlength=steps + 1) - np.bincount(last + 1, minlength=steps + 1)
    return int(np.cumsum(change).max())


@dataclasses.dataclass(frozen=True)
class NodeReads:
    """The reads of the nodes per epoch."""

    nodes: int
    window: int
    steps: int
    images: tuple[int, int]
    """Minimum and maximum over the nodes."""
    shards: tuple[int, int]
    """Minimum and maximum over the nodes."""
    all_shards: int
    """Sum over the nodes."""
    in_use: int
    """Largest number of shards of a node at one step."""
    fetched: dict[float, float]
    """Fetches per shard (node 0), by cache size as a fraction of `in_use`."""


def simulate_reads(samples: Samples, workers: int, window: int) -> NodeReads:
    batch_size, nodes = workers * SLOTS_OF_WORKER, workers // WORKERS_OF_NODE
    plan = plan_epoch(samples, batch_size=batch_size, epoch=1, seed=0, window=window)
    slots = [node_slots(batch_size, node, workers) for node in range(nodes)]
    uses = [shard_uses(samples, plan, of_node) for of_node in slots]
    lengths = np.bincount(np.arange(len(samples)) % batch_size, minlength=batch_size)
    images = [int(lengths[lo:hi].sum()) for lo, hi in slots]
    in_use = max(max_in_use(first, last, plan.steps) for _, first, last in uses)
    shards = sequence(samples, plan, slots[0])
    fetched = {size: fetches(shards, max(1, round(size * in_use))) / len(uses[0][0]) for size in CACHE_SIZES}
    counts = [len(used) for used, _, _ in uses]
    return NodeReads(
        nodes, window, plan.steps, (min(images), max(images)), (min(counts), max(counts)), sum(counts), in_use, fetched
    )


def spread(counts: np.ndarray, fractions: np.ndarray) -> float:
    """Chi-square per degree of freedom of the counts of groups: 1 for random samples, more for clusters."""
    expected = counts.sum(axis=1, keepdims=True) * fractions
    return float(((counts - expected) ** 2 / expected).sum(axis=1).mean() / (len(fractions) - 1))


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How the samples of single batches and of 100 consecutive batches are spread."""

    name: str
    shards: float
    """Distinct shards in a batch."""
    batch_groups: float
    """`spread` of a batch over groups of neighboring shards."""
    run_groups: float
    """`spread` of 100 batches over these groups."""
    batch_classes: float
    """`spread` of a batch over classes that are in all shards."""
    run_classes: float
    same_shard: float
    """Probability that two images of a shard are in one batch, relative to any two images."""


def measure_mixing(name: str, samples: Samples, order: np.ndarray, batch_size: int) -> Mixing:
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
        for grouping, group_of in (("groups", groups), ("classes", classes)):
            tables[grouping][0].append(np.bincount(group_of[run[0]], minlength=GROUPS))
            tables[grouping][1].append(np.bincount(group_of[np.concatenate(run)], minlength=GROUPS))
    fractions = {
        grouping: np.bincount(group_of, minlength=GROUPS) / len(group_of)
        for grouping, group_of in (("groups", groups), ("classes", classes))
    }
    sizes = np.bincount(samples.shard)
    batches = sum(min(100, plan.steps - 1 - step) for step in steps.tolist())
    random_pairs = (sizes * (sizes - 1.0)).sum() / (len(samples) * (len(samples) - 1.0))
    spreads = {
        grouping: [spread(np.array(counts), fractions[grouping]) for counts in table]
        for grouping, table in tables.items()
    }
    return Mixing(
        name,
        float(np.mean(distinct)),
        *spreads["groups"],
        *spreads["classes"],
        same_shard=pairs / batches / (batch_size * (batch_size - 1)) / random_pairs,
    )


def _zipf(count: int) -> np.ndarray:
    weights = 1 / np.arange(1, count + 1)
    return weights / weights.sum()


def make_data(folder: Path, samples: Samples) -> None:
    """Write a manifest and a label table with one label per image, for `start_worker`."""
    import pyarrow as pa

    from paml.labels.keys import uint64_to_hex
    from paml.labels.table_file import make_contents, write_contents
    from paml.shards.manifest import SCHEMA, ShardInfo, write_manifest

    count = len(samples)
    values = np.unique(np.random.default_rng(1).integers(0, 2**64 - 1, count + count // 1000, np.uint64))
    keys = np.random.default_rng(2).permutation(values)[:count]
    sizes = np.bincount(samples.shard)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    zeros = np.zeros(count, np.int64)
    batch = pa.RecordBatch.from_pydict(
        {
            "key": uint64_to_hex(keys),
            "shard": samples.shard,
            "offset": 512 + (np.arange(count) - starts) * (IMAGE_BYTES + 1000),
            "size": zeros + IMAGE_BYTES,
            "crc32": zeros,
            "width": zeros + 448,
            "height": zeros + 448,
        },
        schema=SCHEMA,
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
    codes = (np.arange(count) % 10_000).astype(np.uint16)
    contents = make_contents(pa.array(np.sort(keys)), np.arange(count + 1), codes, mids, mids, {})
    write_contents(str(folder / "labels.arrow"), contents)


def memory_mb(name: str) -> float:
    """VmHWM (peak) or RssAnon (without mapped files) of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) * 1024 / 1e6


def start_worker(folder: Path, workers: int) -> dict[str, float]:
    """Open, join and plan as worker 0. Returns wall-clock and CPU seconds, memory, and seconds per batch."""
    from paml.labels import LabelTable
    from paml.shards import Manifest

    measured: dict[str, float] = {}

    def lap(name: str, work):
        start, cpu = time.perf_counter(), time.process_time()
        result = work()
        measured[name], measured[f"{name} CPU"] = time.perf_counter() - start, time.process_time() - cpu
        return result

    manifest, table = lap("open", lambda: (Manifest.open(folder), LabelTable.open(folder / "labels.arrow")))
    before = memory_mb("RssAnon")
    samples = lap("join", lambda: join(manifest, table))
    batch_size = workers * SLOTS_OF_WORKER
    slots = worker_slots(batch_size, 0, workers)
    common = {"batch_size": batch_size, "seed": 0, "window": WINDOWS[1]}
    plan = lap("own streams", lambda: plan_epoch(samples, epoch=1, **common, slots=slots))
    measured["own MB"] = memory_mb("RssAnon") - before
    measured["peak MB"] = memory_mb("VmHWM")
    steps = range(min(1000, plan.steps))
    lap("batch", lambda: [plan.batch(step, slots) for step in steps])
    measured["batch"] /= len(steps)
    lap("whole plan", lambda: plan_epoch(samples, epoch=1, **common))
    return measured


def start_table(samples: Samples) -> list[str]:
    lines = [
        "| workers | open | join | plan of its streams | plan of all streams | per batch | memory "
        "| peak with mapped files |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="paml-plan-") as name:
        make_data(Path(name), samples)
        for workers in WORKERS:
            command = [sys.executable, os.path.abspath(__file__), "--worker", name, str(workers)]
            measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            seconds = [
                f"{measured[lap]:.2f} s ({measured[f'{lap} CPU']:.2f})"
                for lap in ("open", "join", "own streams", "whole plan")
            ]
            lines.append(
                f"| {workers:,} | {' | '.join(seconds)} | {measured['batch'] * 1e6:.0f} us "
                f"| {measured['own MB']:.0f} MB | {measured['peak MB']:.0f} MB |"
            )
    return lines


def plot(out: str, reads: list[NodeReads], mixings: list[Mixing], shard_gb: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for number, nodes in enumerate(sorted({r.nodes for r in reads})):
        for r, style in zip([r for r in reads if r.nodes == nodes], ("-.", "-", "--", ":"), strict=True):
            sizes = [size * r.in_use * shard_gb for size in r.fetched]
            label = f"{nodes} node{'s' * (nodes > 1)}, window {r.window:,}"
            left.plot(sizes, list(r.fetched.values()), style, marker=".", color=f"C{number}", label=label)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="cache per node in GB",
        ylabel="fetches per shard and epoch",
        title="Fetches by cache size",
    )
    left.legend(fontsize=6, loc="upper right")
    left.set_xlim(right=4000)
    names = [mixing.name for mixing in mixings]
    x = np.arange(len(names))
    right.bar(x - 0.2, [mixing.run_groups for mixing in mixings], 0.4, label="shards sorted by class")
    right.bar(x + 0.2, [mixing.run_classes for mixing in mixings], 0.4, label="shards by hash (paml)")
    right.axhline(1, color="gray", linewidth=0.8)
    right.set_xticks(x, names, fontsize=7, rotation=15)
    right.set(
        yscale="log",
        ylabel="chi-square per degree of freedom",
        title="100 batches of 256 by class (1: random)",
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
    reads = [simulate_reads(samples, workers, window) for workers in WORKERS for window in WINDOWS]
    orders = {
        f"window {window:,}": plan_epoch(samples, batch_size=256, epoch=1, seed=0, window=window).order
        for window in WINDOWS
    }
    orders["full shuffle"] = np.random.default_rng(3).permutation(len(samples))
    mixings = [measure_mixing(name, samples, order, 256) for name, order in orders.items()]
    lines = [
        f"{len(samples):,} images in {options.shards:,} shards of about {shard_gb * 1e3:.0f} MB; "
        f"{WORKERS_OF_NODE} workers per node, {SLOTS_OF_WORKER} slots of the global batch per worker",
        "",
        f"Start of worker 0: wall-clock seconds (CPU seconds); windows of {WINDOWS[1]:,}",
        *start_table(samples),
        "",
        *reads_tables(reads, len(samples), options.shards, shard_gb),
        "",
        *mixing_table(mixings),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    Path(options.out + ".txt").write_text(text)
    plot(options.out + ".png", reads, mixings, shard_gb)


def reads_tables(reads: list[NodeReads], images: int, shards: int, shard_gb: float) -> list[str]:
    lines = [
        "Reads of a node per epoch",
        "| workers | nodes | window | steps | images, min and max | shards, min and max | GB "
        "| all nodes / data set | shards in use | cache that fetches each once |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.nodes * WORKERS_OF_NODE:,} | {r.nodes} | {r.window:,} | {r.steps:,} "
        f"| {r.images[0]:,} to {r.images[1]:,} | {r.shards[0]:,} to {r.shards[1]:,} | {r.shards[1] * shard_gb:.1f} "
        f"| {r.all_shards / shards:.3f} | {r.in_use:,} | {r.in_use * shard_gb:.1f} GB |"
        for r in reads
    ]
    nodes = max(r.nodes for r in reads)
    touched = shards * (1 - np.exp(-images / nodes / shards))
    lines += [
        "A shard that is split between two streams is at the end of one and the start of the next: it counts as in use "
        "for the whole epoch.",
        f"A full shuffle would make each of the {nodes} nodes read {touched:,.0f} shards, "
        f"{touched * shard_gb:,.0f} GB per epoch.",
        "",
        "Fetches per shard and epoch (hit rate in parentheses), by cache size",
        "| workers | window | " + " | ".join(f"{size:.0%} of the shards in use" for size in CACHE_SIZES) + " |",
        "|---|---|" + "---|" * len(CACHE_SIZES),
    ]
    for r in reads:
        per_shard = r.images[0] / r.shards[0]
        cells = [f"{fetches:.2f} ({1 - fetches / per_shard:.1%})" for fetches in r.fetched.values()]
        lines.append(f"| {r.nodes * WORKERS_OF_NODE:,} | {r.window:,} | {' | '.join(cells)} |")
    return lines


def mixing_table(mixings: list[Mixing]) -> list[str]:
    return [
        "Mixing with a global batch of 256: groups are 100 neighboring shards each, as if sorted by class; classes are "
        "spread over all shards",
        "| order | shards in a batch | groups, 1 batch | groups, 100 batches | classes, 1 batch | classes, 100 batches "
        "| two images of a shard in one batch |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {m.name} | {m.shards:.1f} | {m.batch_groups:.2f} | {m.run_groups:.2f} | {m.batch_classes:.2f} "
            f"| {m.run_classes:.2f} | {m.same_shard:.2f} |"
            for m in mixings
        ),
    ]


if __name__ == "__main__":
    main()
