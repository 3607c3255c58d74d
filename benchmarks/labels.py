"""Time and memory of building a label table, compared with pandas + numpy and DuckDB + numpy.

    python benchmarks/labels.py [--v3] [--repeats 5] [--rows 3000000 --images 1300000] [--folder FOLDER]

The file is synthetic: long-tailed images and classes, rows in random order, some unknown classes, duplicates and
contradictions; `--v3` uses the size of Open Images V3 (9,011,219 images, 20,868,755 rows). The three implementations
make the same arrays: keys, offsets, codes. Each runs in its own process, in alternating order. Prints medians,
medians of the ratios within a round, in wall-clock and CPU time (less affected by other load), and the peak memory of
each process. Only paml also writes every rejected row to a file, hashes its sources and flushes to disk.
Then the table's join, look-ups and edits are timed.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np

V3_IMAGES, V3_ROWS = 9_011_219, 20_868_755
SOURCES = ["verification", "crowdsource-verification"]


def write_annotations(path: Path, classes: list[str], num_images: int, num_rows: int, seed: int = 0) -> None:
    """A shuffled annotation file of `num_rows` rows: 1 % unknown classes, 0.1 % repeated, 0.1 % contradicted."""
    import pyarrow as pa
    import pyarrow.csv as pacsv

    from paml.labels.keys import uint64_to_hex

    rng = np.random.default_rng(seed)
    keys = uint64_to_hex(rng.integers(0, 2**64 - 1, num_images, np.uint64, endpoint=True))
    known = pa.array([*classes, *(f"/x/unknown{number}" for number in range(100))])
    num_unknown, num_repeated, num_contradicting = num_rows // 100, num_rows // 1000, num_rows // 1000
    num_more = num_rows - num_images - num_unknown - num_repeated - num_contradicting
    # Every image has a label, some have many; classes follow Zipf's law.
    weights = 1 / np.arange(1, len(classes) + 1) ** 0.9
    first = np.arange(num_images) * len(known) + rng.choice(len(classes), num_images, p=weights / weights.sum())
    more = np.empty(0, np.int64)
    while len(more) < num_more:
        image = rng.integers(0, num_images, num_more)
        cls = rng.choice(len(classes), num_more, p=weights / weights.sum())
        more = np.setdiff1d(np.concatenate([more, image * len(known) + cls]), first, assume_unique=False)
    image, cls = np.divmod(np.concatenate([first, rng.choice(more, num_more, replace=False)]), len(known))
    state = (rng.random(len(image)) < 0.47).astype(np.int8)
    counts = (num_unknown, num_repeated, num_contradicting)
    unknown, repeated, contradicting = (rng.integers(0, len(image), n) for n in counts)
    image = np.concatenate([image, image[unknown], image[repeated], image[contradicting]])
    cls = np.concatenate([cls, len(classes) + unknown % 100, cls[repeated], cls[contradicting]])
    state = np.concatenate([state, state[unknown], state[repeated], 1 - state[contradicting]])
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


def build_with_pandas(annotations: str, classes: str, out: str) -> None:
    """read_csv, map the classes, number the images, one sorted array of pairs, offsets."""
    import pandas as pd

    mids = Path(classes).read_text().split()
    names = ["ImageID", "LabelName", "Confidence"]
    frame = pd.read_csv(annotations, usecols=names, dtype=dict.fromkeys(names, str))
    frame["cls"] = frame["LabelName"].map({mid: number for number, mid in enumerate(mids)})
    usable = frame.loc[frame["cls"].notna() & frame["Confidence"].isin(["0", "1"])]
    image, texts = pd.factorize(usable["ImageID"])
    values = np.frombuffer(bytes.fromhex("".join(texts)), ">u8").astype(np.uint64)
    order = np.argsort(values)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    codes = (usable["cls"].to_numpy(np.int64) << 1) | (usable["Confidence"] == "1").to_numpy()
    save(out, values[order], (rank[image] << 32) | codes)


def build_with_duckdb(annotations: str, classes: str, out: str) -> None:
    """SQL reads, joins the classes and turns keys into numbers; numpy sorts, which is faster here than ORDER BY."""
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET preserve_insertion_order = false")
    connection.execute(
        "CREATE TABLE classes AS SELECT mid, (row_number() OVER () - 1)::INTEGER AS cls "
        f"FROM read_csv('{classes}', header = false, columns = {{'mid': 'VARCHAR'}})"
    )
    columns = ", ".join(f"'{name}': 'VARCHAR'" for name in ("ImageID", "Source", "LabelName", "Confidence"))
    labels = connection.sql(
        "SELECT ('0x' || ImageID)::UBIGINT AS key, (2 * cls + Confidence::INTEGER)::UINTEGER AS code "
        f"FROM read_csv('{annotations}', header = true, auto_detect = false, quote = '', escape = '', "
        f"columns = {{{columns}}}) JOIN classes ON LabelName = mid WHERE Confidence IN ('0', '1')"
    ).fetchnumpy()
    connection.close()
    order = np.argsort(labels["key"])
    keys = labels["key"][order]
    starts = np.ones(len(keys), bool)
    starts[1:] = keys[1:] != keys[:-1]
    save(out, keys[starts], ((np.cumsum(starts) - 1) << 32) | labels["code"][order])


def save(out: str, keys: np.ndarray, pairs: np.ndarray) -> None:
    """Resolve repeats and contradictions of row << 32 | code (negative wins) and write the three arrays."""
    pairs.sort()
    first = np.ones(len(pairs), bool)
    first[1:] = (pairs[1:] >> 1) != (pairs[:-1] >> 1)
    unique = pairs[first]
    offsets = np.zeros(len(keys) + 1, np.int32)
    np.cumsum(np.bincount(unique >> 32, minlength=len(keys)), out=offsets[1:])
    np.savez(out, keys=keys, offsets=offsets, codes=(unique & 0xFFFFFFFF).astype(np.uint16))


def build_with_paml(annotations: str, classes: str, out: str) -> None:
    from paml.labels import build_label_table

    build_label_table(annotations, classes, out + ".arrow")


SIDES: dict[str, tuple[Callable[[str, str, str], None], tuple[str, ...]]] = {
    "paml": (build_with_paml, ("paml.labels",)),
    "duckdb": (build_with_duckdb, ("duckdb",)),
    "pandas": (build_with_pandas, ("pandas",)),
}


def run_process(*arguments: str) -> dict[str, float]:
    """Run one implementation in its own process: wall-clock and CPU seconds without imports, peak memory in MB."""
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory_mb() -> float:
    """Peak memory of this process only: on Linux ru_maxrss includes the parent's size at the fork."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def run_implementation(side: str, annotations: str, classes: str, out: str) -> None:
    build, modules = SIDES[side]
    for module in modules:
        importlib.import_module(module)
    start, cpu_start = time.perf_counter(), time.process_time()
    build(annotations, classes, out)
    seconds = {"clock": time.perf_counter() - start, "cpu": time.process_time() - cpu_start}
    print(json.dumps({**seconds, "peak_mb": peak_memory_mb()}))


def arrays_of(side: str, folder: Path) -> tuple[np.ndarray, ...]:
    """(keys, offsets, codes) that the implementation wrote."""
    if side == "paml":
        from paml.labels import LabelTable

        table = LabelTable.open(folder / "paml.arrow")
        rows = np.arange(table.num_images)
        triples = table.lookup(rows)
        offsets = np.concatenate([[0], np.cumsum(table.label_counts(rows))])
        return table.key_column().to_numpy(), offsets, 2 * triples.cls + triples.state
    with np.load(folder / f"{side}.npz") as arrays:
        return arrays["keys"], arrays["offsets"], arrays["codes"]


def compare(folder: Path, annotations: Path, classes: Path, num_rows: int, repeats: int, sides: list[str]) -> None:
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side in sides if repeat % 2 else sides[::-1]:
            runs[side].append(run_process("--side", side, str(annotations), str(classes), str(folder / side)))
            print(f"round {repeat + 1}: {side:6} {runs[side][-1]['clock']:7.2f} s", file=sys.stderr)
    ours = arrays_of("paml", folder)
    for side in sides:
        if not all(np.array_equal(a, b) for a, b in zip(ours, arrays_of(side, folder), strict=True)):
            raise SystemExit(f"the arrays of paml and {side} differ")
    megabytes = annotations.stat().st_size / 1e6
    print(
        f"{num_rows:,} rows ({megabytes:,.0f} MB), {len(ours[0]):,} images, {len(ours[2]):,} labels; {repeats} rounds; "
        "all arrays are equal"
    )
    print("| implementation | s | M rows/s | CPU s | peak MB | speed-up of paml (CPU time) |")
    print("|---|---|---|---|---|---|")
    for side in sides:
        clock, cpu = ([run[name] for run in runs[side]] for name in ("clock", "cpu"))
        ratios = [
            statistics.median(run[name] / ours[name] for run, ours in zip(runs[side], runs["paml"], strict=True))
            for name in ("clock", "cpu")
        ]
        peak = max(run["peak_mb"] for run in runs[side])
        print(
            f"| {side} | {statistics.median(clock):.2f} | {num_rows / statistics.median(clock) / 1e6:.2f} "
            f"| {statistics.median(cpu):.2f} | {peak:,.0f} | {ratios[0]:.2f} ({ratios[1]:.2f}) times |"
        )


def use_table(path: Path) -> None:
    """Time the join, the look-ups and the edits of a table."""
    from paml.labels import LabelTable
    from paml.labels.edit import export_csv, filter_labels, filter_table, merge, split
    from paml.labels.keys import uint64_to_hex
    from paml.labels.states import POSITIVE

    start = time.perf_counter()
    table = LabelTable.open(path)
    print(f"table of {os.path.getsize(path) / 1e6:.1f} MB, opened in {(time.perf_counter() - start) * 1e3:.1f} ms")
    rng = np.random.default_rng(0)
    order = rng.permutation(table.num_images)
    shuffled = uint64_to_hex(table.key_column().to_numpy()[order])
    start = time.perf_counter()
    rows = table.rows_of(shuffled)
    print(f"join of {len(rows):,} shuffled keys to rows: {time.perf_counter() - start:.2f} s")
    if not (rows == order).all():
        raise SystemExit("the join returned wrong rows")
    times = []
    for batch in rng.integers(0, table.num_images, (2000, 512)):
        start = time.perf_counter()
        table.lookup(batch)
        times.append(time.perf_counter() - start)
    worst = statistics.quantiles(times, n=100)[98]
    print(f"look-up of 512 random rows: {statistics.median(times) * 1e6:.0f} us, 99th percentile {worst * 1e6:.0f} us")
    out, half = path.parent, list(table.classes[: table.num_classes // 2])
    edits: dict[str, Callable[[], object]] = {
        "half of the classes": lambda: filter_table(table, str(out / "half.arrow"), classes=half),
        "positives": lambda: filter_labels(table, str(out / "p.arrow"), lambda labels: labels.state == POSITIVE),
        "split into 80, 10, 10 %": lambda: split(
            table, [str(out / f"{n}.arrow") for n in range(3)], [0.8, 0.1, 0.1], 0
        ),
        "merge of the three parts": lambda: merge([str(out / f"{n}.arrow") for n in range(3)], str(out / "m.arrow")),
        "to CSV": lambda: export_csv(table, str(out / "back.csv")),
    }
    for name, edit in edits.items():
        start = time.perf_counter()
        edit()
        print(f"{name}: {time.perf_counter() - start:.2f} s")
    if LabelTable.open(out / "m.arrow").digest != table.digest:
        raise SystemExit("the merged parts differ from the table")
    print(f"peak memory of these steps {peak_memory_mb():,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--v3", action="store_true", help="the size of Open Images V3 (2 GB on disk, 9 GB for pandas)")
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--images", type=int, default=1_300_000)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--folder", type=Path, help="where to write; existing files are reused")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--use", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_implementation(options.side, *options.files)
        return
    if options.use:
        use_table(options.use)
        return
    num_images, num_rows = (V3_IMAGES, V3_ROWS) if options.v3 else (options.images, options.rows)
    with tempfile.TemporaryDirectory(prefix="paml-labels-") as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        classes, annotations = folder / "classes.txt", folder / f"annotations-{num_images}-{num_rows}.csv"
        mids = [f"/m/0{number:04x}" for number in range(5000)]
        classes.write_text("".join(f"{mid}\n" for mid in mids))
        if not annotations.exists():
            write_annotations(annotations, mids, num_images, num_rows)
        sides = [side for side in SIDES if side in {"paml", *options.sides}]
        compare(folder, annotations, classes, num_rows, options.repeats, sides)
        sys.stdout.flush()
        # In its own process, to measure its peak memory.
        command = [sys.executable, os.path.abspath(__file__), "--use", str(folder / "paml.arrow")]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])})


if __name__ == "__main__":
    main()
