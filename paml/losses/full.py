"""Full labels: plain binary cross-entropy, refusing a batch with an unobserved label (on the CPU). Mean over B x K."""

from paml.losses.base import AS_NEGATIVE, Loss

LOSS = Loss(unobserved=AS_NEGATIVE, needs_all_observed=True)
