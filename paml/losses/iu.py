"""Ignore unobserved: only observed labels cost something. The sum is still divided by B x K, as for AN."""

from paml.losses.base import LEFT_OUT, Loss

LOSS = Loss(unobserved=LEFT_OUT)
