"""Time and memory of building a label table, against pandas + numpy doing the same job.

    python benchmarks/labels.py [--rows 3000000] [--repeats 5] [--classes CLASSES_TRAINABLE_TXT] [--v3]

The file is synthetic: images and classes drawn long-tailed, rows in random order, a share of unknown classes,
duplicates and contradictions. Both sides run in processes of their own, in turn; printed are the median of the
ratios of neighbouring runs, the peak memory of each process, and that both made the same labels. `--v3` then
builds one table of the size of Open Images V3 (9.0 M images, 20.9 M rows) and times its look-ups.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SOURCES = ["verification", "crowdsource-verification"]


def write_annotations(path: Path, classes: list[str], num_images: int, num_rows: int, seed: int = 0) -> None:
    """A shuffled annotation file of about `num_rows` rows: 1 % unknown classes, 0.1 % twice, 0.1 % contradicted."""
    import pyarrow as pa
    import pyarrow.csv as pacsv

    from paml.labels.table import uint64_to_hex

    rng = np.random.default_rng(seed)
    keys = uint64_to_hex(rng.integers(0, 2**64 - 1, num_images, np.uint64, endpoint=True))
    known = pa.array([*classes, *(f"/x/unknown{number}" for number in range(100))])
    # Every image has a label, some have many; classes follow Zipf's law.
    image = np.concatenate([np.arange(num_images), rng.integers(0, num_images, max(0, num_rows - num_images))])
    weights = 1 / np.arange(1, len(classes) + 1) ** 0.9
    cls = rng.choice(len(classes), len(image), p=weights / weights.sum())
    distinct = np.unique(image * np.int64(len(known)) + cls)
    image, cls = np.divmod(distinct, len(known))
    state = (rng.random(len(image)) < 0.47).astype(np.int8)
    unknown = rng.integers(0, len(image), len(image) // 100)
    again = rng.integers(0, len(image), len(image) // 1000)
    against = rng.integers(0, len(image), len(image) // 1000)
    image = np.concatenate([image, image[unknown], image[again], image[against]])
    cls = np.concatenate([cls, len(classes) + unknown % 100, cls[again], cls[against]])
    state = np.concatenate([state, state[unknown], state[again], 1 - state[against]])
    order = rng.permutation(len(image))
    options = pacsv.WriteOptions(include_header=False, quoting_style="none")
    with open(path, "wb") as file:
        file.write(b"ImageID,Source,LabelName,Confidence\n")
        for start in range(0, len(order), 1 << 20):
            part = order[start : start + (1 << 20)]
            rows = {
                "ImageID": keys.take(pa.array(image[part])),
                "Source": pa.array(SOURCES).take(pa.array(part % 2)),
                "LabelName": known.take(pa.array(cls[part])),
                "Confidence": pa.array(state[part]),
            }
            pacsv.write_csv(pa.table(rows), file, options)


def build_with_pandas(annotations: str, classes: str, out: str) -> dict[str, int]:
    """The reference: read_csv, map the classes, settle repeats and contradictions, sort, offsets, one .npz file."""
    import pandas as pd

    mids = Path(classes).read_text().split()
    frame = pd.read_csv(annotations, dtype={"ImageID": str, "LabelName": str, "Confidence": str})
    frame["cls"] = frame["LabelName"].map({mid: number for number, mid in enumerate(mids)})
    known = frame["cls"].notna()
    right = known & frame["Confidence"].isin(["0", "1"])
    usable = frame.loc[right, ["ImageID", "cls", "Confidence"]]
    found, names = pd.factorize(usable["ImageID"])
    values = np.array([int(name, 16) for name in names], np.uint64)
    order = np.argsort(values)
    keys, rank = values[order], np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    image = rank[found]
    state = (usable["Confidence"] == "1").to_numpy()
    codes = (image << 32) | (usable["cls"].to_numpy(np.int64) << 1) | state
    single = np.unique(codes)
    lost = np.zeros(len(single), bool)
    lost[1:] = (single[1:] >> 1) == (single[:-1] >> 1)
    kept = single[~lost]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(kept >> 32, minlength=len(keys)))])
    low = (kept & 0xFFFFFFFF).astype(np.uint16)
    np.savez(out, keys=keys, offsets=offsets.astype(np.int32), codes=low)
    return {"images": len(keys), "annotations": len(kept), "code_sum": int(low.astype(np.int64).sum())}


def build_with_paml(annotations: str, classes: str, out: str) -> dict[str, int]:
    from paml.labels import LabelTable, build_label_table

    report = build_label_table(annotations, classes, out + ".arrow")
    positives, negatives = LabelTable.open(report.path).class_counts()
    weights = np.arange(len(positives))
    code_sum = int((2 * weights * (positives + negatives) + positives).sum())
    return {"images": report.images, "annotations": report.annotations, "code_sum": code_sum}


def in_a_process(side: str, *arguments: str) -> dict[str, float]:
    """Run one side in its own process: its counts, its seconds without imports, its peak memory in MB."""
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--side", side, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory_mb() -> float:
    """Peak memory of this process alone: on Linux ru_maxrss also remembers the parent's size at the fork."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def run_side(side: str, annotations: str, classes: str, out: str) -> None:
    if side == "paml":
        build, modules = build_with_paml, ("duckdb", "paml.labels")
    else:
        build, modules = build_with_pandas, ("pandas",)
    for module in modules:
        importlib.import_module(module)
    start = time.perf_counter()
    counts: dict[str, float] = dict(build(annotations, classes, out))
    counts["seconds"] = time.perf_counter() - start
    counts["peak_mb"] = peak_memory_mb()
    print(json.dumps(counts))


def compare(folder: Path, classes: Path, num_rows: int, repeats: int) -> None:
    annotations = folder / "annotations-human.csv"
    write_annotations(annotations, classes.read_text().split(), num_rows * 9 // 21, num_rows)
    size = annotations.stat().st_size
    ratios, peaks, seconds = [], {"pandas": 0.0, "paml": 0.0}, {"pandas": [], "paml": []}
    for repeat in range(repeats):
        pair = {}
        for side in ("pandas", "paml") if repeat % 2 else ("paml", "pandas"):
            pair[side] = in_a_process(side, str(annotations), str(classes), str(folder / side))
            peaks[side] = max(peaks[side], pair[side]["peak_mb"])
            seconds[side].append(pair[side]["seconds"])
        same = all(pair["pandas"][name] == pair["paml"][name] for name in ("images", "annotations", "code_sum"))
        if not same:
            raise SystemExit(f"the two sides disagree: {pair}")
        ratios.append(pair["pandas"]["seconds"] / pair["paml"]["seconds"])
    print(f"{num_rows:,} rows drawn ({size / 1e6:.0f} MB), {len(ratios)} pairs of runs, same labels in each")
    for side in ("pandas", "paml"):
        print(f"{side:7} {statistics.median(seconds[side]):6.2f} s (median), peak {peaks[side]:,.0f} MB")
    print(f"ratio pandas / paml: median {statistics.median(ratios):.2f} (of {', '.join(f'{r:.2f}' for r in ratios)})")


def at_v3_size(folder: Path, classes: Path) -> None:
    from paml.labels import LabelTable

    annotations = folder / "v3.csv"
    # Classes that repeat within an image are drawn once, so draw some more to end near 20.9 M rows.
    write_annotations(annotations, classes.read_text().split(), 9_011_219, 21_100_000)
    found = in_a_process("paml", str(annotations), str(classes), str(folder / "v3"))
    size = os.path.getsize(folder / "v3.arrow") / 1e6
    print(
        f"V3 size: {annotations.stat().st_size / 1e6:,.0f} MB of CSV, {found['annotations']:,.0f} labels of "
        f"{found['images']:,.0f} images in {found['seconds']:.1f} s, peak {found['peak_mb']:,.0f} MB, "
        f"table {size:.1f} MB"
    )
    start = time.perf_counter()
    table = LabelTable.open(str(folder / "v3.arrow"))
    opened = time.perf_counter() - start
    rng = np.random.default_rng(0)
    keys = table.keys()
    order = rng.permutation(len(keys))
    shuffled = [keys[i] for i in order]
    start = time.perf_counter()
    rows = table.rows_of(shuffled)
    joined = time.perf_counter() - start
    if not (rows == order).all():
        raise SystemExit("the join found wrong rows")
    batches = rng.integers(0, table.num_images, (2000, 512))
    times = []
    for batch in batches:
        start = time.perf_counter()
        table.lookup(batch)
        times.append(time.perf_counter() - start)
    print(
        f"open {opened * 1e3:.1f} ms; all {len(keys):,} keys to rows in {joined:.2f} s; look-up of 512 random rows "
        f"{statistics.median(times) * 1e6:.0f} us (median)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3_000_000, help="rows of the compared file")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    parser.add_argument("--classes", type=Path, help="class list; 5,000 made-up MIDs by default")
    parser.add_argument("--v3", action="store_true", help="also build a table of the size of Open Images V3")
    parser.add_argument("--folder", help="where to write (2 GB for --v3); the system's temporary folder by default")
    parser.add_argument("--side", choices=["pandas", "paml"], help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options.side, *options.files)
        return
    with tempfile.TemporaryDirectory(prefix="paml-labels-", dir=options.folder) as name:
        folder = Path(name)
        classes = options.classes or folder / "classes.txt"
        if options.classes is None:
            classes.write_text("".join(f"/m/0{number:04x}\n" for number in range(5000)))
        compare(folder, classes, options.rows, options.repeats)
        if options.v3:
            at_v3_size(folder, classes)


if __name__ == "__main__":
    main()
