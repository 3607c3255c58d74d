"""LL-R, large-loss rejection (Kim et al., CVPR 2022): the rejected labels cost nothing. Mean over B x K."""

from paml.losses.base import AS_NEGATIVE, LEFT_OUT, Loss, growing

LOSS = Loss(unobserved=AS_NEGATIVE, rejected=LEFT_OUT, rate=growing, rejects=True)
