"""What keeping memory between steps is worth on a CPU: training and scoring with and without, in turn.

python benchmarks/allocator.py [--backbone mobilenet_v2] [--size 160] [--output-stride 16] [--batch 32] [--rounds 3]

Each side is a process of its own, since what the C library is told holds until a process ends. Prints images a second,
page faults a step, and the medians of the paired ratios.
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
from paml.training.allocator import keep_memory

STEPS = 4


def rate(step: Callable[[], object], images: int) -> tuple[float, float]:
    """(images a second, page faults a step), after two steps that are not counted."""
    step(), step()
    faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds = time.perf_counter() - started
    return STEPS * images / seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / STEPS


def one_side(options: argparse.Namespace) -> None:
    """Measure in this process and print JSON."""
    if options.side == "kept" and not keep_memory():
        raise SystemExit("the C library of this machine is not glibc: there is nothing to compare")
    settings = ModelSettings(backbone=options.backbone, weights=None, output_stride=options.output_stride)
    model = build_model(settings, 18)
    images = torch.randn(options.batch, 3, options.size, options.size).contiguous(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(model.parameters(), 1e-5)

    def train() -> None:
        model(images, 5.0).sigmoid().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    training = rate(train, options.batch)
    model.eval()
    with torch.inference_mode():
        scoring = rate(lambda: model(images), options.batch)
    print(json.dumps({"training": training, "scoring": scoring}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=160, help="pixels")
    parser.add_argument("--output-stride", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("kept", "returned"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        one_side(options)
        return
    found: dict[str, list[dict]] = {"kept": [], "returned": []}
    for _ in range(options.rounds):
        for side, runs in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print("| | images/s, memory kept | returned | ratio | page faults a step | returned |\n|---|---|---|---|---|---|")
    for work in ("training", "scoring"):
        kept, returned = ([run[work] for run in found[side]] for side in ("kept", "returned"))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(kept, returned, strict=True))
        (fast, few), (slow, many) = (
            [statistics.median(column) for column in zip(*s, strict=True)] for s in (kept, returned)
        )
        print(f"| {work} | {fast:.1f} | {slow:.1f} | **{ratio:.2f}** | {few:,.0f} | {many:,.0f} |")


if __name__ == "__main__":
    main()
