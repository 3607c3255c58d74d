"""Assume negative: every unobserved label is trained as a negative. Mean over B x K."""

from paml.losses.base import AS_NEGATIVE, Loss

LOSS = Loss(unobserved=AS_NEGATIVE)
