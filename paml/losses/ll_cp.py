"""LL-Cp, permanent correction (Kim et al., CVPR 2022): rejected labels are positives from now on. Mean over B x K."""

from paml.losses.base import AS_NEGATIVE, AS_POSITIVE, Loss, constant

LOSS = Loss(unobserved=AS_NEGATIVE, rejected=AS_POSITIVE, rate=constant, rejects=True, corrects=True)
