"""The effect of retaining freed memory on a CPU (`paml.training.allocator`), on training and on evaluation.

python benchmarks/allocator.py [--backbone mobilenet_v2] [--size 160] [--output-stride 16] [--batch 32] [--rounds 3]

Each measurement runs in its own process, because the setting cannot be undone. Both variants alternate. Prints images
per second, page faults per step, and the median ratio of the rounds.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from paml.models import ModelSettings
from paml.models.cam import build_model
from paml.training.allocator import retain_freed_memory

STEPS = 4
VARIANTS = ("retained", "returned")
"""Freed memory is retained by the process, or returned to the system as glibc does by default."""


def measure(step: Callable[[], object], images: int) -> tuple[float, float]:
    """(images per second, page faults per step), after two warm-up steps."""
    step(), step()
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds = time.perf_counter() - start
    return STEPS * images / seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / STEPS


def measure_variant(options: argparse.Namespace) -> None:
    """Measure one variant in this process and print JSON."""
    if options.variant == "retained" and not retain_freed_memory():
        raise SystemExit("this benchmark needs glibc")
    settings = ModelSettings(backbone=options.backbone, weights=None, output_stride=options.output_stride)
    model = build_model(settings, 18)
    images = torch.randn(options.batch, 3, options.size, options.size).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)

    def train() -> None:
        model(images, 5.0).sigmoid().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    training = measure(train, options.batch)
    model.eval()
    with torch.inference_mode():
        evaluation = measure(lambda: model(images), options.batch)
    print(json.dumps({"training": training, "evaluation": evaluation}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=160, help="pixels")
    parser.add_argument("--output-stride", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        measure_variant(options)
        return
    runs: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            runs[variant].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print("| | images/s, memory retained | returned | ratio | page faults per step, retained | returned |")
    print("|---|---|---|---|---|---|")
    for work in ("training", "evaluation"):
        retained, returned = ([run[work] for run in runs[variant]] for variant in VARIANTS)
        ratio = statistics.median(a[0] / b[0] for a, b in zip(retained, returned, strict=True))
        (rate, faults), (returned_rate, returned_faults) = (
            [statistics.median(column) for column in zip(*rows, strict=True)] for rows in (retained, returned)
        )
        print(
            f"| {work} | {rate:.1f} | {returned_rate:.1f} | **{ratio:.2f}** | {faults:,.0f} | {returned_faults:,.0f} |"
        )


if __name__ == "__main__":
    main()
