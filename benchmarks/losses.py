"""LL-R, forward and backward on the CPU, beside the form with a float32 `topk`; both interleaved in one run.

    python benchmarks/losses.py [--threads 2] [--rounds 15]

Prints for each shape the median milliseconds of both, and the median of the paired ratios.
"""

import argparse
import math
import statistics
import time
from fractions import Fraction

import torch
from torch import Tensor

from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.losses import LossSettings, partial_label_loss

SHAPES = ((16, 80, 0.03), (128, 5000, 0.002), (512, 5000, 0.002))


def by_topk(logits_BK: Tensor, state_BK: Tensor, rate: Fraction) -> Tensor:
    """The usual form: loss of every label, topk among the unobserved, those from the k-th on set to zero, mean."""
    cost_BK = torch.nn.functional.binary_cross_entropy_with_logits(
        logits_BK, (state_BK == POSITIVE).float(), reduction="none"
    )
    unobserved_BK = state_BK == UNOBSERVED
    unobserved_cost_BK = cost_BK.detach() * unobserved_BK
    k = math.ceil(rate * int(unobserved_BK.sum()))
    threshold = torch.topk(unobserved_cost_BK.flatten(), k).values[-1]
    return torch.where(unobserved_cost_BK < threshold, cost_BK, 0.0).mean()


def by_paml(logits_BK: Tensor, state_BK: Tensor, rate: Fraction) -> Tensor:
    settings = LossSettings(name="ll-r", reject_rate_step=float(rate))
    B = len(logits_BK)
    return partial_label_loss(
        logits_BK,
        state_BK,
        settings=settings,
        epoch=2,
        divisor=logits_BK.numel(),
        slots_B=torch.arange(B),
        batch_size=B,
    ).loss


def seconds(form, logits_BK: Tensor, state_BK: Tensor, rate: Fraction, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        logits_BK.grad = None
        form(logits_BK, state_BK, rate).backward()
    return (time.perf_counter() - start) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for B, K, annotated in SHAPES:
        for rate in (Fraction(1, 100), Fraction(5, 100)):
            logits_BK = (torch.randn(B, K) * 1.8 - 4).requires_grad_()
            state_BK = torch.full((B, K), UNOBSERVED, dtype=torch.int8)
            state_BK[torch.rand(B, K) < annotated] = NEGATIVE
            state_BK[torch.rand(B, K) < annotated / 2] = POSITIVE
            times = max(1, 100_000 // (B * K))
            pairs = []
            for round_ in range(options.rounds + 2):
                pair = [seconds(form, logits_BK, state_BK, rate, times) * 1e3 for form in (by_topk, by_paml)]
                if round_ >= 2:
                    pairs.append(pair)
            topk, paml = (statistics.median(values) for values in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            print(
                f"({B}, {K}) rate {float(rate):.0%}, {options.threads} threads: topk {topk:.3f} ms, "
                f"paml {paml:.3f} ms, {ratio:.1f} times as fast"
            )


if __name__ == "__main__":
    main()
