"""Losses, forward and backward on the CPU, against a plain implementation of each, interleaved in one run.

    python benchmarks/losses.py [--threads 2] [--rounds 15]           # LL-R against the usual form with `topk`
    python benchmarks/losses.py --all [--threads 2] [--rounds 15]     # every loss against its formula in the tests

Prints for each shape the median milliseconds of both, and the median of the paired ratios. With --all the plain forms
of LL-R, LL-Ct and LL-Cp get the rejected labels as input, so their time is that of the cost alone.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import LOSSES, BatchContext, LossSettings, partial_label_loss

SHAPES = ((16, 80, 0.03), (64, 80, 0.03), (128, 5000, 0.002), (512, 5000, 0.002))


def by_topk(logits_BK: Tensor, state_BK: Tensor, rate: Fraction) -> Tensor:
    """The usual form: the loss of every label, topk of the unobserved, those from the k-th on set to zero, mean."""
    cost_BK = torch.nn.functional.binary_cross_entropy_with_logits(
        logits_BK, (state_BK == POSITIVE).float(), reduction="none"
    )
    unobserved_BK = state_BK == UNOBSERVED
    unobserved_cost_BK = cost_BK.detach() * unobserved_BK
    k = math.ceil(rate * int(unobserved_BK.sum()))
    threshold = torch.topk(unobserved_cost_BK.flatten(), k).values[-1]
    return torch.where(unobserved_cost_BK < threshold, cost_BK, 0.0).mean()


def by_paml(
    logits_BK: Tensor, state_BK: Tensor, settings: LossSettings, context: BatchContext, loss_state: Tensor | None = None
) -> Tensor:
    return partial_label_loss(logits_BK, state_BK, settings, context, loss_state=loss_state).loss


def seconds(form: Callable[[], Tensor], logits_BK: Tensor, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        logits_BK.grad = None
        form().backward()
    return (time.perf_counter() - start) / times


def compare(
    title: str, plain: Callable[[], Tensor], paml: Callable[[], Tensor], logits_BK: Tensor, rounds: int
) -> None:
    """Print the medians of both, interleaved, after two warm-up rounds."""
    times = max(1, 100_000 // logits_BK.numel())
    pairs = [[seconds(form, logits_BK, times) * 1e3 for form in (plain, paml)] for _ in range(rounds + 2)][2:]
    plain_ms, paml_ms = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{title}: plain {plain_ms:.3f} ms, paml {paml_ms:.3f} ms, {ratio:.2f} times as fast", flush=True)


def labels(B: int, K: int, annotated: float) -> tuple[Tensor, Tensor]:
    logits_BK = (torch.randn(B, K) * 1.8 - 4).requires_grad_()
    state_BK = torch.full((B, K), UNOBSERVED, dtype=torch.int8)
    state_BK[torch.rand(B, K) < annotated] = NEGATIVE
    state_BK[torch.rand(B, K) < annotated / 2] = POSITIVE
    return logits_BK, state_BK


def every_loss(rounds: int, threads: int) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.losses.reference import FORMULAS, loss_state_of

    rate = Fraction(1, 100)
    context = BatchContext(epoch=2, num_epochs=8)
    for B, K, annotated in SHAPES[2:]:
        for name in LOSSES:
            logits_BK, state_BK = labels(B, K, 1.5 if name == "full" else annotated)
            rejected_BK = (state_BK == UNOBSERVED) & (torch.rand(B, K) < float(rate))
            settings = LossSettings(name=name, reject_rate_step=float(rate))
            loss_state = loss_state_of(name, logits_BK, state_BK)
            plain = partial(FORMULAS[name], logits_BK, state_BK, rejected_BK, 2)
            paml = partial(by_paml, logits_BK, state_BK, settings, context, loss_state)
            compare(f"({B}, {K}) {name}, {threads} threads", plain, paml, logits_BK, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.all:
        every_loss(options.rounds, options.threads)
        return
    for B, K, annotated in SHAPES:
        for rate in (Fraction(1, 100), Fraction(5, 100)):
            logits_BK, state_BK = labels(B, K, annotated)
            plain = partial(by_topk, logits_BK, state_BK, rate)
            settings, context = LossSettings(reject_rate_step=float(rate)), BatchContext(epoch=2)
            paml = partial(by_paml, logits_BK, state_BK, settings, context)
            title = f"({B}, {K}) rate {float(rate):.0%}, {options.threads} threads"
            compare(title, plain, paml, logits_BK, options.rounds)


if __name__ == "__main__":
    main()
