"""Average precision over annotated pairs against the dense per-class loop, interleaved in one run.

    python benchmarks/metrics.py [--rounds 3] [--images 20000] [--classes 5000]

The loop is that of released code (BridgeGap's `compute_aps_openimages`): dense float32 score and label matrices [N, K]
with -1 for pairs without annotation; each class's column is masked and passed to scikit-learn's
`average_precision_score`. The same loop with plain numpy instead of scikit-learn (there are no ties here) is timed too.
Filling the matrices is not timed. 0.2 % of the pairs are annotated.
"""

import argparse
import statistics
import time
import tracemalloc

import numpy as np
from sklearn.metrics import average_precision_score

from paml.metrics import average_precision_by_class


def by_numpy(label: np.ndarray, score: np.ndarray) -> float:
    label = label[np.argsort(-score, kind="stable")]
    precision = np.cumsum(label) / np.arange(1, len(label) + 1)
    return float((precision * label).sum() / label.sum())


def by_dense_loop(score_NK: np.ndarray, label_NK: np.ndarray, average_precision) -> np.ndarray:
    ap = np.full(label_NK.shape[1], np.nan)
    for k in range(label_NK.shape[1]):
        observed = np.where(label_NK[:, k] != -1)[0]
        score, label = score_NK[observed, k], label_NK[observed, k]
        if label.any():
            ap[k] = average_precision(label, score)
    return ap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=5000)
    options = parser.parse_args()
    N, K = options.images, options.classes
    rng = np.random.default_rng(0)
    flat = np.unique(rng.integers(0, N * K, N * K // 500))
    cls = (flat % K).astype(np.int32)
    score = rng.standard_normal(len(flat)).astype(np.float32)
    positive = rng.random(len(flat)) < 0.5
    score_NK = np.zeros((N, K), np.float32)
    label_NK = np.full((N, K), -1, np.float32)
    score_NK.reshape(-1)[flat] = score
    label_NK.reshape(-1)[flat] = positive

    forms = {"scikit-learn": average_precision_score, "numpy": by_numpy}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    largest = 0.0
    ap = average_precision_by_class(cls, score, positive, K)
    for _ in range(options.rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            dense = by_dense_loop(score_NK, label_NK, form)
            middle = time.perf_counter()
            for _ in range(5):
                ap = average_precision_by_class(cls, score, positive, K)
            times[name].append((middle - start, (time.perf_counter() - middle) / 5))
            largest = max(largest, float(np.nanmax(np.abs(dense - ap))))
    tracemalloc.start()
    average_precision_by_class(cls, score, positive, K)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for name, pairs in times.items():
        loop, fast = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(
            f"N = {N:,}, K = {K:,}, {len(flat):,} pairs: dense loop with {name} {loop:.2f} s, "
            f"paml {fast * 1e3:.1f} ms, {ratio:.0f} times as fast"
        )
    print(
        f"peak memory {peak / 1e6:.0f} MB against {(score_NK.nbytes + label_NK.nbytes) / 1e6:,.0f} MB of matrices; "
        f"largest difference {largest:.1e}"
    )


if __name__ == "__main__":
    main()
