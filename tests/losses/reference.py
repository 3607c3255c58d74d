"""Every loss as its formula in float64, from the labels of the whole batch to one number.

Only the codes of the label states come from paml. p is sigmoid(x); 1 - p is sigmoid(-x), which is not rounded to 0.
Weights that the authors do not differentiate are detached.
"""

import torch
from torch import Tensor, log, sigmoid, where, zeros_like

from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED


def an(x, state, rejected, epoch):
    return where(state == POSITIVE, -log(sigmoid(x)), -log(sigmoid(-x))).mean()


def iu(x, state, rejected, epoch):
    return where(state == UNOBSERVED, 0, where(state == POSITIVE, -log(sigmoid(x)), -log(sigmoid(-x)))).mean()


def ll_r(x, state, rejected, epoch):
    return where(rejected, 0, where(state == POSITIVE, -log(sigmoid(x)), -log(sigmoid(-x)))).mean()


def ll_c(x, state, rejected, epoch):
    return where((state == POSITIVE) | rejected, -log(sigmoid(x)), -log(sigmoid(-x))).mean()


def wan(x, state, rejected, epoch):
    return where(state == POSITIVE, -log(sigmoid(x)), -log(sigmoid(-x)) / (x.shape[1] - 1)).mean()


def an_ls(x, state, rejected, epoch):
    target = where(state == POSITIVE, 0.9, 0.1).double()
    return (-target * log(sigmoid(x)) - (1 - target) * log(sigmoid(-x))).mean()


def epr(x, state, rejected, epoch):
    expected_positives = sigmoid(x).sum(1).mean(0)
    observed = where(state == POSITIVE, -log(sigmoid(x)), where(state == NEGATIVE, -log(sigmoid(-x)), 0))
    return observed.mean() + ((expected_positives - 2.9) / x.shape[1]) ** 2


def asl(x, state, rejected, epoch):
    p = sigmoid(x)
    shifted = (p - 0.05).clamp(min=0)
    negative = -(shifted.detach() ** 4) * log(1 - shifted)
    return where(state == POSITIVE, -log(p), negative).sum() / len(x)


def p_asl(x, state, unobserved_weight):
    p, q = sigmoid(x), sigmoid(-x)
    weight = where(state == UNOBSERVED, unobserved_weight * p**2, p).detach()  # gammas 0, 1 and 2
    return where(state == POSITIVE, -log(p), -weight * log(q)).sum() / len(x)


def p_asl_ignore(x, state, rejected, epoch):
    return p_asl(x, state, 0)


def p_asl_negative(x, state, rejected, epoch):
    return p_asl(x, state, 1)


def p_asl_selective(x, state, rejected, epoch):
    """The 5 * B most likely unobserved labels cost nothing."""
    candidates = x.detach().masked_fill(state != UNOBSERVED, -float("inf")).flatten()
    order = candidates.sort(descending=True, stable=True).indices
    ignored = zeros_like(state, dtype=torch.bool).flatten()
    ignored[order[: 5 * len(x)]] = True
    ignored = ignored.view_as(state) & (state == UNOBSERVED)
    return p_asl(x, state, (~ignored).double())


def em(x, state, rejected, epoch):
    p, q = sigmoid(x), sigmoid(-x)
    entropy = -p * log(p) - q * log(q)
    return where(state == UNOBSERVED, -0.1 * entropy, where(state == POSITIVE, -log(p), -log(q))).mean()


def hill(x, state, rejected, epoch):
    p, p_m, q_m = sigmoid(x), sigmoid(x - 1), sigmoid(1 - x)
    return where(state == POSITIVE, -(q_m**2) * log(p_m), (1.5 - p) * p**2).sum() / len(x)


def splc(x, state, rejected, epoch):
    p, q, p_m, q_m = sigmoid(x), sigmoid(-x), sigmoid(x - 1), sigmoid(1 - x)
    corrected = (state == UNOBSERVED) & (p > 0.6) & (epoch >= 2)
    unobserved_or_negative = where(corrected, -(q**2) * log(p), -(p**2) * log(q))
    return where(state == POSITIVE, -(q_m**2) * log(p_m), unobserved_or_negative).sum() / len(x)


def gr(x, state, rejected, epoch):
    """In a run of eight epochs."""
    p, q = sigmoid(x), sigmoid(-x)
    w, mu, sigma = 2 * (epoch - 1) / 8, 0.5 + 0.3 * epoch / 8, 2 - 1.5 * epoch / 8
    k = 1 / (1 + (2 - w * p.detach()).exp())
    v = (-0.5 * ((p.detach() - mu) / sigma) ** 2).exp()
    unobserved = v * (k * (1 - p**0.01) / 0.01 + (1 - k) * (1 - q))
    return where(state == UNOBSERVED, unobserved, where(state == POSITIVE, -log(p), -log(q))).mean()


def loss_state_of(name: str, x: Tensor, state: Tensor) -> Tensor | None:
    """A plausible `loss_state`, computed from the logits alone, so that it does not depend on a label's position."""
    noise = 2 * torch.sin(7 * x.detach().float().nan_to_num(0, 0, 0))
    if name == "role":
        return noise
    if name == "em-apl":
        return where((state == UNOBSERVED) & (noise > 0), sigmoid(noise - 4), float("nan"))
    return None


def role(x, state, rejected, epoch):
    estimate = loss_state_of("role", x, state)
    assert estimate is not None
    p, q = sigmoid(x), sigmoid(-x)
    g, h = sigmoid(estimate.double()), sigmoid(-estimate.double())
    positive, negative = state == POSITIVE, state == NEGATIVE
    total = zeros_like(x).sum()
    for own, own_not, other, other_not in ((p, q, g, h), (g, h, p, q)):
        observed = where(positive, -log(own), where(negative, -log(own_not), 0)).mean()
        from_other = (-other.detach() * log(own) - other_not.detach() * log(own_not)).mean()
        surplus = own.sum(1).mean() - 2.9
        total = total + (observed + from_other + (surplus / x.shape[1]) ** 2) / 2
    return total


def em_apl(x, state, rejected, epoch):
    p, q = sigmoid(x), sigmoid(-x)
    target = loss_state_of("em-apl", x, state)
    assert target is not None
    t = target.double().nan_to_num(0)
    pseudo = 0.9 * (-t * log(p) - (1 - t) * log(q))
    unobserved = where(target.isnan(), -0.1 * (-p * log(p) - q * log(q)), pseudo)
    return where(state == UNOBSERVED, unobserved, where(state == POSITIVE, -log(p), -log(q))).mean()


def curriculum(x, state, rejected, epoch):
    sure = (epoch >= 2) & (state == UNOBSERVED)
    present = (state == POSITIVE) | (sure & (x > 2))
    absent = (state == NEGATIVE) | (sure & (x < -2))
    return where(present, -log(sigmoid(x)), where(absent, -log(sigmoid(-x)), 0)).mean()


FORMULAS = {
    "an": an,
    "iu": iu,
    "full": an,
    "ll-r": ll_r,
    "ll-ct": ll_c,
    "ll-cp": ll_c,
    "wan": wan,
    "an-ls": an_ls,
    "epr": epr,
    "asl": asl,
    "p-asl-ignore": p_asl_ignore,
    "p-asl-negative": p_asl_negative,
    "p-asl-selective": p_asl_selective,
    "em": em,
    "hill": hill,
    "splc": splc,
    "gr": gr,
    "role": role,
    "em-apl": em_apl,
    "curriculum": curriculum,
}
"""(x, state, rejected, epoch) -> the loss with default settings; only LL-* use `rejected`."""


def by_formula(name: str, logits: Tensor, state: Tensor, rejected: Tensor | None, epoch: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a whole batch in float64."""
    x = logits.double().requires_grad_()
    if rejected is None:
        rejected = zeros_like(state, dtype=torch.bool)
    loss = FORMULAS[name](x, state, rejected, epoch)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad
